"""What a setting may be: ranges of numbers, written in the types of fields, and the check of a value against them."""

import dataclasses
import functools
import reprlib
import typing
from typing import Annotated, Any, Literal, NamedTuple

from ttt_e2e.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


class Range(NamedTuple):
    """The numbers that a setting may be, both ends included; whole ones if the ends are. none: whether None, too."""

    low: float
    high: float
    none: bool = False


# What a size, a number of tokens or of steps can be in an int32 or a float64, and what float32 can hold and square.
Size = Annotated[int, Range(1, 2**24)]
Width = Annotated[int, Range(1, 2**20)]
Heads = Annotated[int, Range(1, 2**16)]
Tokens = Annotated[int, Range(1, 2**30)]
Steps = Annotated[int, Range(0, 2**40)]
Rate = Annotated[float, Range(0.0, 1e30)]
Norm = Annotated[float, Range(1e-18, 1e18)]


def check(config: Any, section: str = "") -> None:
    """Raise UserError, with the setting's full name, for a field of another type or out of its range."""
    ranges = ranges_of(config.__class__)
    for field_ in dataclasses.fields(config):
        value, where = getattr(config, field_.name), section + field_.name
        if typing.get_origin(field_.type) is Literal:
            words = typing.get_args(field_.type)
            if value not in words:
                raise UserError(f"{where} must be one of {', '.join(words)}, not {shown(value)}.")
        elif field_.type is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where} must be true or false, not {shown(value)}.")
        elif field_.name in ranges:
            low, high, none = ranges[field_.name]
            if value is None and (none or field_.default is None):
                continue
            kinds, what = (int, "whole number") if isinstance(low, int) else ((int, float), "number")
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if is_number and low <= value <= high:
                continue
            require(is_number, f"{where} must be a {what}, not {shown(value)}.")
            require(value >= low, f"{where} must be at least {as_text(low)}, not {shown(value)}.")
            require(value <= high, f"{where} must be at most {as_text(high)}, not {shown(value)}.")


def shown(value: Any) -> str:
    """A value as messages show it, however long it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def as_text(number: float) -> str:
    """An end of a range: 16777216, 0, 1e+30."""
    return str(number) if isinstance(number, int) else f"{number:g}"


@functools.cache
def ranges_of(cls: type) -> dict[str, Range]:
    """The ranges of the settings of a class that are numbers, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}
