"""The mathematical operators of the model: plain definitions, and faster implementations of some of them."""
