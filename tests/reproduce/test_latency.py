"""Time per token: what is timed, with states of which size, in how much memory. How long it takes is not tested."""

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import small_config
from torch.utils.flop_counter import FlopCounterMode

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.reproduce import latency, timing
from ttt_e2e.reproduce.latency import run_latency
from ttt_e2e.reproduce.timing import RandomReading, Setup, group_by_memory, measure, take_turns

CPU = torch.device("cpu")
STANDARD = dict(suffix_layers=0, mini_batch_size=None)
CONFIGS = {
    "full": small_config(pattern=("full",), **STANDARD),
    "window": small_config(**STANDARD),
    "hybrid": small_config(pattern=("window", "full"), **STANDARD),
    "mamba2": small_config(pattern=("mamba2", "window"), mamba2__state_size=8, **STANDARD),
    "gated-deltanet": small_config(pattern=("gated-deltanet", "window"), **STANDARD),
    "ttt-kvb": small_config(pattern=("ttt-kvb", "window"), suffix_layers=0, mini_batch_size=4),
    "titans": small_config(
        pattern=("titans", "window"), suffix_layers=0, mini_batch_size=4, memory__num_persistent_tokens=2
    ),
    "dynamic": small_config(static_mlp=False),
    "ttt-e2e": small_config(),
    "full-prefix": small_config(pattern=("full", "full", "window", "window")),
}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "SEGMENT_TOKENS", {"cpu": 12, "cuda": 12})
    monkeypatch.setattr(timing, "WRITTEN_TOKENS", 2)
    gc.freeze()  # `measure` collects garbage: not among all that other tests have imported, which takes a second
    yield
    gc.unfreeze()


def make_setup(memory: float = 1e12, dtype: torch.dtype = torch.float32, seconds: float = 1e-9) -> Setup:
    return Setup(CPU, dtype, seconds, memory)


def count_operations(work: Callable[[], object], device: torch.device) -> float:
    """In place of the clock: as many seconds as matrix products' operations."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_measure_has_a_row_for_every_system_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1)
    rows = [row for context in (7, 64) for row in measure(CONFIGS, context, seconds=1e-6, device=CPU)]
    expected = [(name, context) for context in (7, 64) for name in CONFIGS]
    assert [(row["system"], row["context"]) for row in rows] == expected
    for row in rows:
        times = (row["prefill_us"], row["decode_us"], row["train_us"])
        assert all(time is not None and time > 0 for time in times)
        assert row["whole"] == (row["context"] == 7), row


def test_text_is_read_whole_if_it_is_short_or_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1)
    models = {"window": CONFIGS["window"]}
    for context, seconds, whole in ((48, 60.0, True), (49, 60.0, True), (48, 1e-6, True), (49, 1e-6, False)):
        (row,) = measure(models, context, seconds=seconds, device=CPU, train=False)
        assert row["whole"] == whole and row["train_us"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_interpolation_has_as_many_operations_as_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds_of", count_operations)
    config, context = CONFIGS[name], 120
    reading = RandomReading(config, context, make_setup())
    size = reading.segment
    after_first = reading.read(reading.start(), size, size)
    whole = count_operations(lambda: reading.read(reading.start(), context, size), CPU) / context
    assert reading.time_segments(after_first) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_enlarged_state_is_as_large_as_a_real_one(name: str) -> None:
    reading = RandomReading(CONFIGS[name], 120, make_setup())
    real = reading.read(reading.start(), 120)
    after_first = reading.read(reading.start(), reading.segment, reading.segment)
    enlarged = reading.enlarge(after_first, 120)
    assert enlarged.position == real.position
    assert [t.shape for t in enlarged.tensors()] == [t.shape for t in real.tensors()]


@pytest.mark.parametrize("name", ["full", "mamba2", "titans", "ttt-e2e"])
def test_measure_in_bfloat16(name: str) -> None:
    (row,) = measure({name: CONFIGS[name]}, 64, seconds=1e-6, device=CPU, dtype="bfloat16")
    assert None not in row.values()


def test_matrices_but_those_that_learn_are_kept_in_the_dtype_of_the_products() -> None:
    model = RandomReading(CONFIGS["ttt-e2e"], 12, make_setup(dtype=torch.bfloat16)).model
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".fast.w" in name or "norm" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".mlp.w" in name or name == "embedding"} == {torch.bfloat16}


def test_systems_take_turns_if_all_fit_into_memory() -> None:
    needs = {"a": 3.0, "b": 4.0, "c": 9.0, "d": 12.0}
    assert group_by_memory(needs, 28.0, try_all=False) == [["a", "b", "c", "d"]]
    assert group_by_memory(needs, 10.0, try_all=False) == [["a"], ["b"], ["c"]]
    assert group_by_memory(needs, 10.0, try_all=True) == [["a"], ["b"], ["c"], ["d"]]


def test_measure_leaves_out_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_memory", lambda device: 1e6)
    configs = {"full": CONFIGS["full"], "window": CONFIGS["window"]}
    rows = measure(configs, 100_000, seconds=1e-6, device=CPU)
    assert rows[0] == {
        "system": "full",
        "context": 100_000,
        "prefill_us": None,
        "decode_us": None,
        "train_us": None,
        "whole": True,
    }
    assert rows[1]["prefill_us"] is not None and rows[1]["decode_us"] is not None and rows[1]["train_us"] is None


def test_running_out_of_memory_leaves_out_one_figure() -> None:
    def out_of_memory() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    timers = {("a", "prefill"): out_of_memory, ("b", "prefill"): lambda: 2.0}
    assert take_turns(timers, 1e-6) == {("b", "prefill"): 2.0}

    def broken() -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        take_turns({("a", "prefill"): broken}, 1e-6)


def test_timers_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    calls: list[str] = []

    def timer(name: str, *times: float) -> Callable[[], float]:
        left = list(times)

        def run() -> float:
            nonlocal now
            calls.append(name)
            now += left[0]
            return left.pop(0)

        return run

    # The first of each warms up. a is timed until a second is spent, b three times, c, which takes long, once.
    timers = {
        ("a", "x"): timer("a", 9.0, 0.1, 0.3, 0.2, 0.3, 0.3),
        ("b", "x"): timer("b", 9.0, 3.0, 5.0, 4.0),
        ("c", "x"): timer("c", 99.0, 50.0),
    }
    assert take_turns(timers, 1.0) == {("a", "x"): 0.3, ("b", "x"): 4.0, ("c", "x"): 50.0}
    assert "".join(calls) == "abcabcababaa"


def use_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(scale: object, system: object, seed: int) -> object:
        @dataclasses.dataclass
        class Run:
            model: ModelConfig

        return Run(CONFIGS[system.name])  # type: ignore[attr-defined]

    monkeypatch.setattr(latency, "pretraining", config)


def test_run_latency_writes_numbers_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_models(monkeypatch)
    monkeypatch.setattr(latency, "LONG_CONTEXTS", {"tiny": (96,)})
    numbers = dataclasses.replace(latency.find_scale("tiny"), latency_contexts=(8, 60))
    monkeypatch.setattr(latency, "find_scale", lambda name: numbers)
    systems = ["full", "window", "dynamic", "ttt-e2e"]
    rows = run_latency("tiny", tmp_path, systems=systems, seconds=1e-6, device="cpu", progress=False)
    assert {(row["system"], row["context"]) for row in rows if row["context"] == 96} == {
        (name, 96) for name in ("window", "dynamic", "ttt-e2e")
    }
    found = json.loads((tmp_path / "latency.json").read_text())
    assert found["rows"] == rows and (found["format"], found["version"]) == ("ttt-e2e latency", 3)
    assert sorted(found) == [
        *("batch", "configs", "dtype", "format", "machine", "rows", "scale", "seconds", "seed", "version"),
    ]
    assert found["machine"]["torch"] == torch.__version__ and found["seed"] == 0
    by = {(row["system"], row["context"]): row for row in rows}
    assert by["dynamic", 60]["train_us"] == by["window", 60]["train_us"]
    assert by["dynamic", 96]["train_us"] is None
    table = (tmp_path / "latency.md").read_text()
    assert "| full attention |" in table and "~" in table
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latency.json", "latency.md", "latency.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"systems": ["lstm"]}, "no system 'lstm'"),
        ({"scale": "huge"}, "no scale"),
        ({"seconds": 0.0}, "must be positive"),
        ({"device": "abacus"}, "no device"),
    ],
)
def test_run_latency_rejects_invalid_values(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_latency(**{"scale": "tiny", "out": tmp_path, "progress": False} | options)
