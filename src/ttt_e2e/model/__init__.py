"""The network: blocks and their mixers, a model as a folder, what it costs."""
