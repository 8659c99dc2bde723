"""Thresholds and tile sizes of the operators, each with the measurement behind it."""

# -- attention ---------------------------------------------------------------------------------------------------------

# Up to this many scores (B H T S), by type of device, `inner_loop_attention` keeps them and computes nothing again: 64
# MiB in float32. Not on a GPU, where memory traffic costs more than products.
KEPT_SCORES = {"cpu": 2**24}

# Up to this many scores (B H T S), `sdpa` computes masked attention in bfloat16 on a CPU by plain matrix products:
# forward and backward 2.5 to 2.9 times as fast as PyTorch's kernel, which does not use the CPU's bfloat16
# instructions. 128 MiB.
UNFUSED_SCORES = 2**26

# Up to this many scores (B H T S), implementation "auto" of the attention operators takes the reference: on a CPU in
# float32, up to here it is as fast as the tiles or a little faster; beyond, the tiles are faster, the more the larger.
REFERENCE_SCORES = 2**15

# Queries and keys of a tile: large enough for matrix products to run at speed, small enough for a tile of a few heads
# to stay in a CPU's cache.
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

# Up to this many logits (tokens x vocabulary) the head keeps them, 64 MiB in float32; beyond, it makes them in parts,
# three times over.
KEPT_LOGITS = 2**24

# Up to this many logits, "auto" takes the reference: 4 MiB in float32, less than one chunk of the others.
REFERENCE_LOGITS = 2**20

# Logits that exist at one time, all buffers together, 32 MiB in float32: chunks of 2048 tokens x 4096 words are large
# enough for matrix products at full speed.
LOGITS_AT_ONCE = 2**23

# Logits of a row that a Triton program holds at once: 16 numbers a thread.
TRITON_LOGITS_BLOCK = 4096

# -- recurrences -------------------------------------------------------------------------------------------------------

# Tokens of a chunk of Mamba 2's SSD: on a CPU the fastest of 32, 64, 128 and 256, forward and backward, at a head
# dimension of 64 and a state size of 128.
SSD_CHUNK = 64

# Tokens of a chunk in mamba-ssm's kernel: the default of its own Mamba 2 layer.
SSD_KERNEL_CHUNK = 256

# Tokens of a chunk of the gated delta rule: on a CPU the fastest of 16, 32 and 64, forward and backward, at head
# dimensions of 32 to 128.
DELTA_RULE_CHUNK = 32

# Up to this many tokens without gradients, flash-linear-attention's kernel that goes token by token is the faster one.
DELTA_RULE_RECURRENT_TOKENS = 64

# Elements of a block of tokens over which the short convolution's weight gradient is summed at once: they stay in a
# CPU's cache.
CONVOLUTION_BLOCK = 2**17

# -- the mini-batch loop -----------------------------------------------------------------------------------------------

# The recomputed loop keeps the graph of this many mini-batches at the end of a sequence: the backward pass begins with
# them, before it holds anything else, so that keeping them raises no peak.
KEPT_GRAPHS = 2
