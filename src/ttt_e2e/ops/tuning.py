"""Thresholds and tile sizes of the operators, each with the measurement behind it."""

# Up to this many scores (B H T S), by type of device, `inner_loop_attention` keeps them and computes nothing again: 64
# MiB in float32. Not on a GPU, where memory traffic costs more than products.
KEPT_SCORES = {"cpu": 2**24}

# Up to this many scores (B H T S), `sdpa` computes masked attention in bfloat16 on a CPU by plain matrix products:
# forward and backward 2.5 to 2.9 times as fast as PyTorch's kernel, which does not use the CPU's bfloat16
# instructions. 128 MiB.
UNFUSED_SCORES = 2**26
