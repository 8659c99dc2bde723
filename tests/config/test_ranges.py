"""The range of every setting: both ends are accepted, and what is beyond is refused by name, wherever it comes from."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.config.components import (
    GatedDeltaNetConfig,
    InnerLoopConfig,
    Mamba2Config,
    MemoryConfig,
    RopeScaling,
)
from ttt_e2e.config.parse import from_dict, override, to_dict
from ttt_e2e.config.presets import preset
from ttt_e2e.config.ranges import Range, ranges_of
from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig
from ttt_e2e.errors import UserError

SECTIONS: dict[str, type] = {
    "model.": ModelConfig,
    "model.inner_loop.": InnerLoopConfig,
    "model.rope_scaling.": RopeScaling,
    "model.mamba2.": Mamba2Config,
    "model.gated_deltanet.": GatedDeltaNetConfig,
    "model.memory.": MemoryConfig,
    "train.": TrainConfig,
}
RANGES = {prefix + name: range_ for prefix, cls in SECTIONS.items() for name, range_ in ranges_of(cls).items()}
# What the preset's other settings say to an end of a range.
COMBINED = (
    r"hidden_size \d+ does not divide into \d+ heads|query heads cannot share \d+ key/value heads|even head_dim, not 1"
    r"|suffix of \d+ blocks does not fit|is longer than the window|needs a rope_scaling.rope_type"
    r"|does not split into \d+ equal parts"
)


def from_json(name: str, text: str) -> RunConfig:
    """The preset with a setting as a JSON file has it, in which any number and more can stand."""
    values: Any = to_dict(preset("tiny"))
    *path, last = name.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    inner[last] = json.loads(text)
    return from_dict(RunConfig, values, "a.json")


def test_every_number_has_a_range() -> None:
    for cls in SECTIONS.values():
        for field in dataclasses.fields(cls):
            if field.type in (int, float, int | None, float | None):
                pytest.fail(f"{cls.__name__}.{field.name} has no range")


@pytest.mark.parametrize(("name", "range_"), RANGES.items())
def test_both_ends_are_accepted(name: str, range_: Range) -> None:
    for end in range_[:2]:
        for make in (lambda text: override(preset("tiny"), [f"{name}={text}"]), lambda text: from_json(name, text)):
            try:
                value: Any = make(repr(end))
            except UserError as error:
                assert re.search(COMBINED, str(error)), error
                continue
            for part in name.split("."):
                value = getattr(value, part)
            assert value == end and type(value) is type(end)


@pytest.mark.parametrize(("name", "range_"), RANGES.items())
def test_anything_beyond_is_refused_by_name(name: str, range_: Range) -> None:
    whole = isinstance(range_.low, int)
    beyond = [range_.low - 1, range_.high * 2, min(-1, range_.low - 1), 10**30 * 2, -(10**30)]
    texts = [*map(repr, beyond), "1e400", "-1e400", "true", '"7"', '""', "[1]", "{}", "1" + "0" * 400]
    texts += ["NaN", "Infinity", "-Infinity"]  # which Python writes to JSON, and reads from it
    texts += ["1.5"] if whole else []
    if not whole and range_.low > 0:
        texts += ["0", "-0.0", "1e-400", repr(math.nextafter(range_.low, 0))]
    for text in texts:
        for make in (lambda text: override(preset("tiny"), [f"{name}={text}"]), lambda text: from_json(name, text)):
            with pytest.raises(UserError, match=name.rpartition(".")[2]) as error:
                make(text)
            assert len(str(error.value)) < 250


def test_a_file_with_a_value_out_of_range_is_named() -> None:
    with pytest.raises(UserError, match=r"^In a\.json: inner_loop\.lr must be at most 1e\+30, not inf\.$"):
        from_json("model.inner_loop.lr", "1e400")


def test_minus_zero_is_zero() -> None:
    assert override(preset("tiny"), ["inner_loop.lr=-0.0", "steps=10.0", "eval_every=-0.0"]).train.eval_every == 0
    assert not override(preset("tiny"), ["inner_loop.lr=-0.0"]).model.can_learn


@pytest.mark.parametrize("value", [True, 2.0, "8", None, math.nan, 10**5000, -(10**5000), [], 8j], ids=lambda _: "")
def test_values_given_in_python_are_checked_too(value: Any) -> None:
    with pytest.raises(UserError, match="vocab_size must be "):
        ModelConfig(value, 8, 1, 1, 8)
    with pytest.raises(UserError, match="sliding_window must be "):
        ModelConfig(8, 8, 1, 1, 8, sliding_window=value)
    if value != 2.0:
        with pytest.raises(UserError, match=r"inner_loop\.lr must be "):
            InnerLoopConfig(value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainConfig(dtype="float64"), "dtype must be one of float32, bfloat16, not 'float64'"),  # type: ignore[arg-type]
        (lambda: RopeScaling("ntk"), "rope_scaling.rope_type must be one of default, linear"),  # type: ignore[arg-type]
        (lambda: Mamba2Config(kernels="cuda"), "mamba2.kernels must be one of auto"),  # type: ignore[arg-type]
        (lambda: ModelConfig(8, 8, 1, 1, 8, qk_norm=1), "qk_norm must be true or false, not 1"),  # type: ignore[arg-type]
        (lambda: TrainConfig(betas=("a", "b")), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: TrainConfig(betas=(math.nan, 0.9)), "betas must be two numbers"),
    ],
)
def test_words_and_flags_given_in_python_are_checked_too(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


MANY = ("[" * 9**5, "9" * 9999)


@settings(max_examples=50)
@given(
    name=st.sampled_from([*RANGES, "model.pattern", "train.betas", "train.dtype", "model.qk_norm"]),
    text=st.text(max_size=20) | st.floats().map(repr) | st.integers().map(str) | st.sampled_from(MANY),
)
def test_any_text_is_a_setting_or_a_sentence(name: str, text: str) -> None:
    try:
        override(preset("tiny"), [f"{name}={text}"])
    except UserError as error:
        assert len(str(error)) < 400
