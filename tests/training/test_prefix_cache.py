"""Outputs of a frozen prefix on disk: what they save, what they belong to, and what is left by processes that end."""

import itertools
import os
import signal
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import made_up_tokens, small_config, start_copy

from ttt_e2e.config.parse import override
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside
from ttt_e2e.model.checkpoint import load_transformer, save_model
from ttt_e2e.model.trainable import set_trainable
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.signals import GracefulStop
from ttt_e2e.training import prefix_cache
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.parallelize import ParallelModel
from ttt_e2e.training.prefix_cache import PrefixCache, digest_below_loop, fill_prefix_cache
from ttt_e2e.training.trainer import TrainResult, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RunConfig(
    small_config(vocab_size=272, initializer_range=0.05),
    TrainConfig(
        context=20, batch=2, steps=3, lr=1e-2, eval_every=0, checkpoint_every=0, trainable="suffix", cache_prefix=True
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_tokens(tmp_path_factory.mktemp("data"), 14)


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(Transformer(CONFIG.model, torch.Generator().manual_seed(1)), folder, data / "tokenizer.json")
    return folder


def fill(data: Path, start: Path, folder: Path, *changes: str, stop: GracefulStop | None = None) -> PrefixCache | None:
    config = override(CONFIG, list(changes)).train
    model = load_transformer(start)
    set_trainable(model, config)
    loader = SequenceLoader(TokenSet.open(data), config.context, config.batch, config.seed, same_windows=True)
    parallel, weights = ParallelModel(model, DistributedContext(0, 1, torch.device("cpu"))), digest_below_loop(model)
    return fill_prefix_cache(folder, parallel, weights, loader, config, stop or GracefulStop(), progress=False)


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    forward_prefix, calls = prefix_cache.forward_prefix, []

    def counting(*args: Any) -> Any:
        calls.append(0)
        return forward_prefix(*args)

    monkeypatch.setattr(prefix_cache, "forward_prefix", counting)
    return calls


def run(data: Path, start: Path, out: Path, *changes: str, **options: Any) -> TrainResult:
    return train(override(CONFIG, list(changes)), data, out, progress=False, device="cpu", start_from=start, **options)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_what_the_prefix_gives(data: Path, start: Path, tmp_path: Path, dtype: str) -> None:
    cache = fill(data, start, tmp_path / "cache", f"dtype={dtype}")
    assert cache is not None
    model, products = load_transformer(start), getattr(torch, dtype)
    loader = SequenceLoader(TokenSet.open(data), 20, 3, 0, same_windows=True)
    for _ in range(2 * loader.windows // 3):  # into the third epoch
        windows, tokens_BT1 = loader.next_batch()
        with torch.no_grad():
            inputs, positions = tokens_BT1[:, :-1], model.positions(0, 20, products)
            expected = model.forward_prefix(inputs, positions, None, products)[0]
        torch.testing.assert_close(cache.read(windows), expected, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-5)
    cache.close()


def test_run_with_the_cache_is_the_run_without(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the prefix run once for a sequence; and other runs find its outputs there."""
    windows = SequenceLoader(TokenSet.open(data), 20, 2, 0).windows
    steps = "steps=4"  # of the first pass, which has the same sequences without a cache
    calls = count_forwards(monkeypatch)
    for name in ("one", "two"):
        run(data, start, tmp_path / name, steps, cache=tmp_path / "cache")
        assert len(calls) == windows
    run(data, start, tmp_path / "plain", steps, "cache_prefix=false")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert not (tmp_path / "one/prefix").exists()
    # The inner loop's settings, and what comes after the prefix, are no matter of the cache.
    run(data, start, tmp_path / "other", "inner_loop.lr=0.5", "mini_batch_size=4", "lr=1e-3", cache=tmp_path / "cache")
    run(data, tmp_path / "one/model", tmp_path / "next", cache=tmp_path / "cache")
    assert len(calls) == windows


def test_same_windows_come_in_another_order(data: Path) -> None:
    tokens = TokenSet.open(data)
    loader = SequenceLoader(tokens, 20, 1, 0, same_windows=True)
    epochs = [
        dict(map(lambda _: (lambda w, t: (w[0], tuple(t[0].tolist())))(*loader.next_batch()), range(loader.windows)))
        for _ in range(2)
    ]
    assert epochs[0] == epochs[1] and [*epochs[0]] != [*epochs[1]]
    position = loader.state()
    again = SequenceLoader(tokens, 20, 1, 0, same_windows=True)
    again.load_state(position)
    assert torch.equal(next(again), next(loader))
    first = SequenceLoader(tokens, 20, 1, 0)
    assert {tuple(next(first)[0].tolist()) for _ in range(first.windows)} == {*epochs[0].values()}
    assert {tuple(next(first)[0].tolist()) for _ in range(first.windows)} != {*epochs[0].values()}


def test_killed_writer_is_continued(data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were finished are kept, and those that a kill left half-written are computed again."""
    monkeypatch.setattr(prefix_cache, "_ROWS_AT_ONCE", 4)
    whole = fill(data, start, tmp_path / "whole")
    assert whole is not None
    windows = [*range(SequenceLoader(TokenSet.open(data), 20, 2, 0).windows)]
    forward_prefix, rows = prefix_cache.forward_prefix, itertools.count(1)

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        if next(rows) == len(windows):
            signal.pause()  # it waits to be killed, in case this process is slow
        return forward_prefix(*args)

    def write_slowly() -> None:
        prefix_cache.forward_prefix = slow
        fill(data, start, tmp_path / "cache")

    process = start_copy(write_slowly)
    while not (tmp_path / "cache/prefix.json").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    calls = count_forwards(monkeypatch)
    cache = fill(data, start, tmp_path / "cache")
    assert cache is not None and 0 < len(calls) <= len(windows) - 4
    assert torch.equal(cache.read(windows), whole.read(windows))
    assert (tmp_path / "cache/prefix.bin").read_bytes() == (tmp_path / "whole/prefix.bin").read_bytes()


def test_ctrl_c_stops_between_rows_and_the_run_resumes(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "_ROWS_AT_ONCE", 4)
    run(data, start, tmp_path / "whole")
    forward_prefix, calls = prefix_cache.forward_prefix, []

    def interrupting(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return forward_prefix(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "forward_prefix", interrupting)
        result = run(data, start, tmp_path / "run")
    assert result.interrupted and result.step == 0 and len(calls) == 8
    assert not run(data, start, tmp_path / "run", resume=True).interrupted
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_cache_of_something_else_is_refused(data: Path, start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert fill(data, start, folder) is not None
    content = {path: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "model"
    save_model(Transformer(CONFIG.model, torch.Generator().manual_seed(2)), other, data / "tokenizer.json")
    with pytest.raises(UserError, match="holds the outputs of another model; name another folder with --cache"):
        fill(data, other, folder)
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match="holds the outputs for other data"):
        fill(made_up_tokens(tmp_path / "more", 15), start, folder)
    for change in ("context=18", "seed=3", "dtype=bfloat16"):
        with pytest.raises(UserError, match=f"holds outputs for {change.split('=')[0]}=.*, not {change.split('=')[1]}"):
            fill(data, start, folder, change)
    assert {path: path.read_bytes() for path in folder.iterdir()} == content
    with pytest.raises(UserError, match="is not empty and holds no outputs of a prefix"):
        fill(data, start, tmp_path)


def test_altered_row_is_refused(data: Path, start: Path, tmp_path: Path) -> None:
    cache = fill(data, start, tmp_path / "cache")
    assert cache is not None
    path = tmp_path / "cache/prefix.bin"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    last = SequenceLoader(TokenSet.open(data), 20, 2, 0).windows - 1
    cache.read([0, last - 1])
    with pytest.raises(UserError, match=f"Row {last} of .* was altered after it was written; remove"):
        cache.read([0, last])
    path.write_bytes(content[:-40])
    with pytest.raises(UserError, match="was altered"):
        cache.read([last])


def test_disk_without_room_and_a_second_writer(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock_beside(tmp_path / "cache", ""), pytest.raises(UserError, match="are being computed by another process"):
        fill(data, start, tmp_path / "cache")
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(
        UserError, match=r"take .*KiB for \d+ sequences of 20 tokens, and the disk of .* has 4\.883 KiB"
    ):
        fill(data, start, tmp_path / "cache")
    assert not (tmp_path / "cache/prefix.bin").exists()
