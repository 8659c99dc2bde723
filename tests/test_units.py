"""Numbers with units on the command line."""

import argparse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.units import count, rate, size, tokens

BASES = {tokens: 1024, size: 1024, rate: 1000}


@given(kind=st.sampled_from(list(BASES)), number=st.integers(1, 5000), power=st.integers(0, 4), lower=st.booleans())
def test_units_multiply_the_number(kind: Callable[[str], int], number: int, power: int, lower: bool) -> None:
    text = f"{number}{'KMGTP'[power - 1] if power else ''}"
    assert kind(text.lower() if lower else text) == number * BASES[kind] ** power


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1.5M", "12X", "1KK", "²", "9" * 30, "99999P", "fast"])
def test_units_reject_anything_else(kind: Callable[[str], int], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of"):
        kind(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1K", "²", "9" * 30])
def test_count_rejects_anything_but_positive_whole_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        count(text)
    assert count("12") == 12
