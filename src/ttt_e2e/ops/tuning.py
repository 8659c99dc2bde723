"""Thresholds and tile sizes of the operators, each with the measurement behind it.

Where no other machine is named, it is one thread of a server CPU (x86, float32), and the measurement covers the forward
pass, the backward pass and the gradient of the backward pass.
"""

# -- reading ----------------------------------------------------------------------------------------------------------

# Tokens that the prefix reads at once, for several mini-batches: SmolLM2-135M in bfloat16, window 512, learning takes
# 0.82 times as long with 128 tokens, 0.78 with 256 and 0.81 with 512 in mini-batches of 32, and 1.02, 0.95 and 0.98
# times in mini-batches of 128. The model that ships, window 256, in mini-batches of 16: 0.83 with 64 tokens, 0.78 with
# 128, 0.74 with 256.
PREFIX_TOKENS = 256

# -- attention ---------------------------------------------------------------------------------------------------------

# Up to this many scores (B H T S), by type of device, `inner_loop_attention` keeps the softmax, 64 MiB in float32:
# against recomputing it in tiles 1.6 times as fast at 1.3 million scores, 1.1 times at 10 million, 0.8 times at 17
# million. Not on a GPU, where memory traffic costs more than products.
KEPT_SCORES = {"cpu": 2**24}

# Up to this many scores (B H T S), 128 MiB, `sdpa` computes masked attention in bfloat16 on a CPU by matrix products:
# forward and backward 2.5 to 2.9 times as fast as PyTorch's kernel, which does not use the CPU's bfloat16 instructions.
UNFUSED_SCORES = 2**26

# Up to this many scores (B H T S), "auto" takes the reference of attention: up to here it is as fast as the tiles or a
# little faster; beyond, the tiles are faster, the more so the more scores there are.
REFERENCE_SCORES = 2**15

# Queries and keys of a tile: at a head dimension of 64 the fastest of 64 x 128 (1.2 to 1.4 times the time) to 1024 x
# 2048 (1.3 to 1.6 times).
TILE_QUERIES = 256
TILE_KEYS = 512

# Blocks of the Triton kernels as (queries, keys, warps, pipeline stages), by head dimension. In 16 bits: the largest
# that fit an H100's registers (255 a thread) and shared memory, by the compiler's report. Row programs hold one
# accumulator [queries, K], column programs two [keys, K], and the double backward four tiles of scores besides. Float32
# takes twice the memory and three products for one: every kernel gets the same small blocks.
TritonBlocks = tuple[int, int, int, int]
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
TRITON_FORWARD = ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2))
TRITON_BACKWARD_ROWS = ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2))
TRITON_BACKWARD_COLUMNS = ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 8, 1))
TRITON_DOUBLE_BACKWARD_ROWS = ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1))
TRITON_DOUBLE_BACKWARD_COLUMNS = ((64, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 16, 8, 1))
TRITON_FLOAT32 = ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1))

# -- linear cross-entropy ----------------------------------------------------------------------------------------------

# Up to this many logits (tokens x vocabulary) the head keeps them, 64 MiB in float32: twice as fast as computing them
# again in chunks, at any number of logits.
KEPT_LOGITS = 2**24

# Logits that exist at one time, all buffers together, 32 MiB in float32: the fastest of 2^18 to 2^24, by 1 to 7 %.
LOGITS_AT_ONCE = 2**23

# Logits of a row that a Triton program holds at once: 16 numbers a thread.
TRITON_LOGITS_BLOCK = 4096

# -- recurrences -------------------------------------------------------------------------------------------------------

# Tokens of a chunk of Mamba 2's SSD: the fastest of 32, 64, 128 and 256, forward and backward, at a head dimension of
# 64 and a state size of 128.
SSD_CHUNK = 64

# Tokens of a chunk in mamba-ssm's kernel: the default of its own Mamba 2 layer.
SSD_KERNEL_CHUNK = 256

# Tokens of a chunk of the gated delta rule: the fastest of 16, 32 and 64, forward and backward, at head dimensions of
# 32 to 128.
DELTA_RULE_CHUNK = 32

# Up to this many tokens without gradients, flash-linear-attention's kernel goes token by token, as in its own layer.
DELTA_RULE_RECURRENT_TOKENS = 64

# Elements of a block of tokens over which the short convolution's weight gradient is summed at once, so that they stay
# in the cache: forward and backward as fast as with 2^19; 2^13 takes 1.3 times as long, 2^23 1.7 times.
CONVOLUTION_BLOCK = 2**17
