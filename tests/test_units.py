"""Numbers with units, as they stand on the command line."""

import argparse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.units import rate, size, tokens

KINDS = {tokens: 1024, size: 1024, rate: 1000}


@given(kind=st.sampled_from(list(KINDS)), number=st.integers(1, 5000), power=st.integers(0, 4), small=st.booleans())
def test_numbers_with_units(kind: Callable[[str], int], number: int, power: int, small: bool) -> None:
    text = f"{number}{'KMGTP'[power - 1] if power else ''}"
    assert kind(text.lower() if small else text) == number * KINDS[kind] ** power


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1.5M", "12X", "1KK", "²", "9" * 30, "99999P", "fast"])
def test_what_is_none(kind: Callable[[str], int], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of"):
        kind(text)
