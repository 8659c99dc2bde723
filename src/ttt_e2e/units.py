"""Numbers on the command line, some with units: tokens, bytes, operations a second. Types for argparse."""

import argparse

_UNITS = "KMGTP"
_LARGEST = 2**63


def count(text: str) -> int:
    """A whole number, at least 1."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < _LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def tokens(text: str) -> int:
    """A number of tokens, such as 8192, 128K (times 1024) or 2M (times 1024 x 1024)."""
    return _number(text, 1024, "number of tokens; write one such as 8192, 128K or 2M")


def size(text: str) -> int:
    """A number of bytes, such as 512M or 2G, in powers of 1024."""
    return _number(text, 1024, "number of bytes; write one such as 512M or 2G")


def rate(text: str) -> int:
    """A number of operations a second, such as 400T, in powers of 1000."""
    return _number(text, 1000, "number of operations a second; write one such as 400T")


def _number(text: str, base: int, what: str) -> int:
    power = _UNITS.find(text[-1:].upper()) + 1 if text else 0
    digits = text[:-1] if power else text
    if not (digits.isascii() and digits.isdigit() and 0 < int(digits) * base**power < _LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
    return int(digits) * base**power
