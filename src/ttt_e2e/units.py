"""Numbers on the command line, in a range or with units: tokens, bytes, operations a second. Types for argparse."""

import argparse
import math
import re
import reprlib
from collections.abc import Callable

_UNITS = "KMGTP"
_LARGEST = 2**63 - 1


def whole(least: int, most: int = _LARGEST) -> Callable[[str], int]:
    """The type of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        # Python takes other digits, too, and refuses to read very many of them.
        is_number = re.fullmatch(r"[+-]?[0-9]{1,30}", text) is not None
        if not is_number or not least <= int(text) <= most:
            limit = f"of at least {least}" if most == _LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not a whole number {limit}")
        return int(text)

    return parse


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of numbers from `least` to `most`; above: without `least` itself."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most:
            limit = f"{'above' if above else 'of at least'} {least:g} and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not a number {limit}")
        return value + 0.0  # no minus zero

    return parse


count, natural = whole(1), whole(0)
amount, share, part = number(0, 1e9), number(0, 1), number(0, 1, above=True)


def tokens(text: str) -> int:
    """A number of tokens, such as 8192, 128K (times 1024) or 2M (times 1024 x 1024)."""
    return _with_unit(text, 1024, "number of tokens; write one such as 8192, 128K or 2M")


def size(text: str) -> int:
    """A number of bytes, such as 512M or 2G, in powers of 1024."""
    return _with_unit(text, 1024, "number of bytes; write one such as 512M or 2G")


def rate(text: str) -> int:
    """A number of operations a second, such as 400T, in powers of 1000."""
    return _with_unit(text, 1000, "number of operations a second; write one such as 400T")


def _with_unit(text: str, base: int, what: str) -> int:
    power = _UNITS.find(text[-1:].upper()) + 1 if text else 0
    digits = text[:-1] if power else text
    if not re.fullmatch("[0-9]{1,30}", digits) or not 0 < int(digits) * base**power <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not a {what}")
    return int(digits) * base**power
