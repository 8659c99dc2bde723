"""Operators of the model that have more than one implementation."""

import importlib.util

# Triton takes a while to import, and the package works without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
