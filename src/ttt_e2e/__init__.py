"""End-to-end test-time training: a language model that keeps learning while it reads."""

__version__ = "0.1.0"
