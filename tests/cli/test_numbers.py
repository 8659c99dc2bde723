"""Every number that a command takes has a range; what is outside is refused before anything is done."""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.cli import common
from ttt_e2e.cli.main import COMMANDS, main

HUGE = ["1" + "0" * 30, "9" * 5000, "1e400", "-1e400", "inf", "-inf", "nan", "1e999999999"]
ODD = ["", " ", "many", "0x10", "1_000", "１２", "²", ",", "--", "1e", "+-1", "-1", "-0.5", "-99999999999999999999"]


def options(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """The options of a command, and of its actions, that convert their text."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from options(inner, f"{name} {word}")
        elif (
            callable(action.type)
            and action.type not in (Path, common.text)
            and action.dest not in ("models", "systems")
        ):
            yield f"{name} {action.option_strings[-1]}", action.type


def numbers() -> dict[str, Callable[[str], Any]]:
    found: dict[str, Callable[[str], Any]] = {}
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        found |= options(parser, name)
    return found


@pytest.mark.parametrize(("option", "kind"), numbers().items())
def test_numbers_out_of_range_are_refused(option: str, kind: Callable[[str], Any]) -> None:
    assert kind not in (int, float), f"{option} takes any number"
    for text in HUGE + ODD:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert len(str(error.value)) < 150


@given(option=st.sampled_from([*numbers()]), text=st.text() | st.integers().map(str) | st.floats().map(repr))
def test_any_text_is_a_number_in_range_or_refused(option: str, text: str) -> None:
    try:
        value = numbers()[option](text)
    except argparse.ArgumentTypeError:
        return
    if isinstance(value, tuple):  # an address and its port
        _, value = value
        assert value < 2**16
    for one in value if isinstance(value, list) else [value]:
        assert math.isfinite(one) and one >= 0 and (isinstance(one, float) or one < 2**63)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("generate x --top-p 0", "--top-p: '0' is not a number above 0 and at most 1"),
        ("generate x --top-k -1", "--top-k: '-1' is not a whole number of at least 0"),
        ("generate x --temperature nan", "--temperature: 'nan' is not a number of at least 0 and at most 1e+09"),
        ("generate x --min-p 1.5", "--min-p: '1.5' is not a number of at least 0 and at most 1"),
        ("generate x --seed 9223372036854775808", "--seed: '9223372036854775808' is not a whole number"),
        ("generate x --threads 99999", "--threads: '99999' is not a whole number from 1 to 1024"),
        ("read x --save s --save-every -1", "--save-every: '-1' is not a number of at least 0"),
        ("evaluate x --batch 0", "--batch: '0' is not a whole number of at least 1"),
        ("prepare x --out y --vocab-size 1" + "0" * 30, "--vocab-size: '100000000000...0000000000000' is not a whole"),
        ("prepare x --out y --vocab-size 256", "--vocab-size: '256' is not a whole number from 257 to 1048576"),
        ("notebook search s x --count 0", "--count: '0' is not a whole number of at least 1"),
        ("convert from-hf x y --suffix 0", "--suffix: '0' is not a number above 0 and at most 1"),
        ("convert from-official x y --step -1", "--step: '-1' is not a whole number of at least 0"),
        ("reproduce needles --out x --depths 0,101", "--depths: '101' is not a whole number from 0 to 100"),
        ("reproduce figure1 --out x --seeds 0,,1", "--seeds: '' is not a whole number of at least 0"),
        ("serve --port 65536", "--port: '65536' is not a whole number from 0 to 65535"),
    ],
)
def test_the_option_and_its_range_are_named(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err
