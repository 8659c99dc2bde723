"""The comparison of the paper, reproduced: every system on the same tokens, by one command."""
