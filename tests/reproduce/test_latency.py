"""Time per token: what is timed, with states of which size, on how much memory; never how long it took."""

import dataclasses
import json
from collections.abc import Callable
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
from ttt_e2e.reproduce.timing import LatencyRow, Reader, Setting, groups, measure, take_turns

STANDARD = dict(suffix_layers=0, mini_batch_size=None)
CONFIGS = {
    "full": small_config(pattern=("full",), **STANDARD),
    "sliding_window": small_config(**STANDARD),
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
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "STRETCH", {"cpu": 12, "cuda": 12})


def setting(room: float = 1e12, dtype: torch.dtype = torch.float32, seconds: float = 1e-9) -> Setting:
    return Setting(torch.device("cpu"), dtype, seconds, room)


def operations(work: Callable[[], object], device: torch.device) -> float:
    """In place of the clock: as many seconds as matrix products' operations."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_every_system_at_every_context() -> None:
    rows = measure(CONFIGS, [7, 90], seconds=1e-6, progress=False)
    assert [(row.system, row.context) for row in rows] == [(name, context) for context in (7, 90) for name in CONFIGS]
    for row in rows:
        assert row.prefill_us is not None and row.decode_us is not None and row.train_us is not None
        assert min(row.prefill_us, row.decode_us, row.train_us) > 0
        assert row.whole == (row.context == 7), row


def test_a_short_text_and_one_for_which_there_is_time_are_read_as_a_whole() -> None:
    rows = measure({"sliding_window": CONFIGS["window"]}, [48, 49], seconds=60.0, train=False, progress=False)
    assert [row.whole for row in rows] == [True, True]
    assert [row.train_us for row in rows] == [None, None]
    rows = measure({"sliding_window": CONFIGS["window"]}, [48, 49], seconds=1e-6, train=False, progress=False)
    assert [row.whole for row in rows] == [True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_interpolation_counts_what_the_whole_text_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "clock", operations)
    config, context = CONFIGS[name], 240
    reader = Reader(config, context, setting())
    piece = reader.piece if reader.learns else reader.stretch
    after = reader.read(reader.start(), reader.stretch, piece)
    whole = operations(lambda: reader.read(reader.start(), context, piece), torch.device("cpu")) / context
    assert reader.sampled(after) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_made_up_state_is_as_large_as_a_real_one(name: str) -> None:
    reader = Reader(CONFIGS[name], 120, setting())
    real = reader.read(reader.start(), 120)
    after = reader.read(reader.start(), reader.stretch, reader.piece if reader.learns else reader.stretch)
    made = reader.state_at(after, 120)
    assert made.position == real.position
    shapes = [[tuple(t.shape for t in value) for value in (*(s.static or ()), *s.loop.caches)] for s in (made, real)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["full", "mamba2", "titans", "ttt-e2e"])
def test_bfloat16(name: str) -> None:
    (row,) = measure({name: CONFIGS[name]}, [90], seconds=1e-6, dtype="bfloat16", progress=False)
    assert None not in row


def test_matrices_are_kept_in_the_dtype_of_the_products_but_not_those_that_learn() -> None:
    model = Reader(CONFIGS["ttt-e2e"], 12, setting(dtype=torch.bfloat16)).model
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".fast.w" in name or "norm" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".mlp.w" in name or name == "embedding"} == {torch.bfloat16}


def test_systems_share_memory_as_far_as_it_goes() -> None:
    needs = {"a": 3.0, "b": 4.0, "c": 9.0, "d": 12.0, "e": 1.0}
    assert groups(needs, 10.0, try_all=False) == [["a", "b"], ["c", "e"]]
    assert groups(needs, 10.0, try_all=True) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_what_does_not_fit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_memory", lambda device: 1e6)
    configs = {"full": CONFIGS["full"], "sliding_window": CONFIGS["window"]}
    rows = measure(configs, [100_000], seconds=1e-6, progress=False)
    assert rows[0] == LatencyRow("full", 100_000, None, None, None)
    assert rows[1].prefill_us is not None and rows[1].decode_us is not None and rows[1].train_us is None


def test_running_out_of_memory_leaves_one_figure_out_and_nothing_else() -> None:
    def out_of_memory() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    timers = {("a", "prefill"): out_of_memory, ("b", "prefill"): lambda: 2.0}
    assert take_turns(timers, 1e-6) == {("b", "prefill"): 2.0}

    def broken() -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        take_turns({("a", "prefill"): broken}, 1e-6)


def test_rounds_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_wrong_values_are_refused() -> None:
    for change in ({"seconds": 0.0}, {"threads": 0}, {"dtype": "float8"}, {"device": "abacus"}):
        with pytest.raises(UserError):
            measure({"full": CONFIGS["full"]}, [8], progress=False, **change)  # type: ignore[arg-type]
    for configs, contexts in (({}, [8]), (CONFIGS, []), (CONFIGS, [0])):
        with pytest.raises(UserError, match="Latency needs"):
            measure(configs, contexts, progress=False)


def tiny_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(scale: object, system: object, seed: int) -> object:
        @dataclasses.dataclass
        class Run:
            model: ModelConfig

        return Run(CONFIGS[system.name])  # type: ignore[attr-defined]

    monkeypatch.setattr(latency, "pretraining", config)


def test_the_command_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_scale(monkeypatch)
    monkeypatch.setattr(latency, "LONG", {"tiny": (96,)})
    figures = dataclasses.replace(latency.scale_called("tiny"), latency_contexts=(8, 60))
    monkeypatch.setattr(latency, "scale_called", lambda name: figures)
    systems = ["full", "window", "dynamic", "ttt-e2e"]
    rows = run_latency("tiny", tmp_path, systems=systems, seconds=1e-6, device="cpu", progress=False)
    assert {(row.system, row.context) for row in rows if row.context == 96} == {
        (name, 96) for name in ("window", "dynamic", "ttt-e2e")
    }
    found = json.loads((tmp_path / "latency.json").read_text())
    assert [LatencyRow(**row) for row in found["rows"]] == rows
    assert found["machine"]["torch"] == torch.__version__ and found["seed"] == 0
    by = {(row.system, row.context): row for row in rows}
    assert by["dynamic", 60].train_us == by["window", 60].train_us
    assert by["dynamic", 96].train_us is None
    table = (tmp_path / "latency.md").read_text()
    assert "| full attention |" in table and "~" in table
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latency.json", "latency.md", "latency.png"]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no system 'lstm'"):
        run_latency("tiny", tmp_path, systems=["lstm"], progress=False)
    with pytest.raises(UserError, match="no scale"):
        run_latency("huge", tmp_path, progress=False)
