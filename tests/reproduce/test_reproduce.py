"""The comparison from end to end, at a scale of a few steps. Run as a program, this file makes it in a process of its
own that a test can kill."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import made_up_tokens, small_config, small_model

from ttt_e2e.cli import main as cli
from ttt_e2e.config.presets import preset
from ttt_e2e.convert.from_standard import warm_start
from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.evaluation.documents import standard_error
from ttt_e2e.inner_loop.step import sequence_loss
from ttt_e2e.model.cost import parameters
from ttt_e2e.reproduce import job, workers
from ttt_e2e.reproduce.evaluate import books, choose_inner_lr, evaluate_documents, position_edges
from ttt_e2e.reproduce.plan import Plan, jobs
from ttt_e2e.reproduce.run import reproduce
from ttt_e2e.reproduce.scales import SCALES, Scale
from ttt_e2e.reproduce.statistics import difference, mean
from ttt_e2e.reproduce.systems import SYSTEMS, WARM_STARTS, ablations, choose, extending, pretraining
from ttt_e2e.reproduce.timing import LatencyRow
from ttt_e2e.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MINUTE = dataclasses.replace(
    SCALES["tiny"],
    name="minute",
    sliding_window=8,
    mini_batch_size=4,
    settings=(
        "hidden_size=16",
        "num_attention_heads=2",
        "num_hidden_layers=4",
        "intermediate_size=24",
        "vocab_size=272",
        "checkpoint_every=2",
    ),
    pretrain_context=8,
    pretrain_tokens=64 * 8,
    contexts=(8, 32),
    extend_tokens=64 * 3,
    warm_tokens=64 * 2,
    tokens_per_step=64,
    extend_tokens_per_step=64,
    piece_tokens=32,
    sweep=(0.25, 1.0, 4.0),
    sweep_tokens=64 * 3,
    choose_tokens=64,
    eval_tokens=64,
    eval_batch_tokens=64,
    latency_contexts=(8, 32),
    vocab_size=272,
)
ROWS = ["full", "window", "dynamic", "ttt-e2e"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, some of them shorter than a sequence."""
    return made_up_tokens(tmp_path_factory.mktemp("data"), 60)


def make(out: Path, data: Path, scale: Scale = MINUTE, what: str = "figure1", **options: Any) -> workers.Outcome:
    """The comparison in this process, latency made up."""

    def measure(configs: dict[str, Any], contexts: list[int], **_: Any) -> list[LatencyRow]:
        return [LatencyRow(name, context, 1.0 * context, 2.0, None) for context in contexts for name in configs]

    options = {"systems": ROWS, "worker_count": 0, "device": "cpu", "progress": False} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_MEASURE_SECONDS", 1e-9)
        patch.setattr("ttt_e2e.reproduce.timing.measure", measure)
        return reproduce(what, scale, out, data=data, **options)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    outcome = make(out, data, seeds=[0, 1])
    assert not outcome.troubles and not outcome.interrupted
    return out


def numbers(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "figure1.json").read_text())
    return report


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {str(f.parent.relative_to(out)): json.loads(f.read_text()) for f in out.glob("runs/**/result.json")}


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_everything_is_there(whole: Path) -> None:
    report = numbers(whole)
    assert report["finished"] and not report["failed"] and report["hours"] > 0
    assert (
        report["plan"]["comparisons"]["figure1"]["seeds"] == [0, 1] and report["machine"]["torch"] == torch.__version__
    )
    assert list(report["systems"]) == ROWS
    assert {(e["system"], e["seed"], e["context"]) for e in report["evaluations"]} == {
        (name, seed, context) for name in ROWS for seed in (0, 1) for context in (8, 32)
    }
    for system in report["systems"].values():
        rates = [row["lr"] for row in system["sweep"]]
        assert len(rates) == 5 and rates == sorted(rates)
        best = min(system["sweep"], key=lambda row: row["loss"])
        assert system["lr"] == best["lr"] and system["parameters"] > 0
    for evaluation in report["evaluations"]:
        assert len(evaluation["books"]) >= 2
        assert ("frozen" in evaluation) == (evaluation["system"] in ("dynamic", "ttt-e2e"))
        assert ("inner_lr" in evaluation) == (evaluation["system"] == "dynamic")
    for row in report["comparison"]:
        assert row["difference"]["seeds"] == 2 and row["difference"]["books_error"] is not None
        if row["system"] == "full":
            assert row["difference"]["mean"] == 0
    assert report["along"]["context"] == 32 and len(report["along"]["rows"]) == 4
    assert len(report["latency"]) == 2 * len(ROWS)
    for name in ("figure1.png", "figure1-along.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert str(whole.parent) not in (whole / "figure1.json").read_text()  # not a word of where it was made
    text = (whole / "figure1.md").read_text()
    assert "All of it is done." in text and text.count("| TTT-E2E |") == 6 and "(seeds " in text
    assert not [path for path in whole.rglob("*") if path.name in ("checkpoints",)]


def test_every_system_reads_the_same_tokens(whole: Path) -> None:
    by_stage: dict[str, list[Any]] = {}
    for folder, result in results(whole).items():
        if "read" in result:
            _, _, stage = folder.split("/", 2)
            by_stage.setdefault("sweep" if "sweep" in stage else stage, []).append((result["read"], result["tokens"]))
    assert {len(seen) for stage, seen in by_stage.items() if stage != "sweep"} == {3} and len(by_stage["sweep"]) == 15
    for seen in by_stage.values():
        assert all(other == seen[0] for other in seen)
    assert by_stage["seed0/pretrain"][0] != by_stage["seed1/pretrain"][0]
    for system in SYSTEMS:
        first, second = (stage(MINUTE, system, 3).train for stage in (pretraining, lambda *a: extending(*a, 32)))
        assert (first.context, first.batch, first.accumulate, first.steps, first.seed) == (8, 8, 2, 8, 3)
        assert (second.context, second.batch, second.accumulate, second.steps, second.seed) == (32, 2, 2, 3, 3)


def test_dynamic_evaluation_is_the_window_model_that_learns(whole: Path) -> None:
    by_row = {(e["system"], e["seed"], e["context"]): e for e in numbers(whole)["evaluations"]}
    for seed, context in ((0, 8), (1, 32)):
        window, dynamic = (by_row[name, seed, context] for name in ("window", "dynamic"))
        for ours, theirs in zip(dynamic["frozen"], window["books"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert dynamic["books"] != dynamic["frozen"]
        tried = {lr: loss for lr, loss in dynamic["inner_lr_losses"] if loss is not None}
        assert tried[dynamic["inner_lr"]] == min(tried.values()) and len(dynamic["inner_lr_losses"]) == 5
    assert not (whole / "runs/dynamic/seed0/pretrain").exists()


def test_nothing_is_done_twice(data: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("result.json")}
    report = numbers(whole)
    make(whole, data, systems=["ttt-e2e"], contexts=[8])
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("result.json")} == before
    assert numbers(whole) == report


def test_narrowed_and_then_widened(data: Path, whole: Path, tmp_path: Path) -> None:
    make(tmp_path, data, systems=["ttt-e2e"], contexts=[32])
    assert {(e["system"], e["context"]) for e in numbers(tmp_path)["evaluations"]} == {("full", 32), ("ttt-e2e", 32)}
    make(tmp_path, data, systems=["full"], contexts=[8])
    report = numbers(tmp_path)
    assert [(r["system"], r["context"]) for r in report["comparison"]] == [("full", 8), ("full", 32), ("ttt-e2e", 32)]
    theirs = {(e["system"], e["seed"], e["context"]): e["books"] for e in numbers(whole)["evaluations"]}
    for e in report["evaluations"]:
        assert e["books"] == theirs[e["system"], e["seed"], e["context"]]


def test_another_plan_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    before = (whole / "plan.json").read_bytes()
    with pytest.raises(UserError, match=r"scale.pretrain_tokens = 512, not 640; give the same"):
        make(whole, data, dataclasses.replace(MINUTE, pretrain_tokens=640))
    (tmp_path / "text.txt").write_text("green fish and blue trees " * 100)
    (tmp_path / "held.txt").write_text("blue fish and green trees " * 100)
    options: dict[str, Any] = {"tokenizer": str(data / "tokenizer.json"), "progress": False}
    prepare([tmp_path / "text.txt"], tmp_path / "tokens", val=[tmp_path / "held.txt"], **options)
    with pytest.raises(UserError, match=r"data in .*, not those in"):
        make(whole, tmp_path / "tokens")
    assert (whole / "plan.json").read_bytes() == before


def test_two_comparisons_share_what_they_have_in_common(data: Path, tmp_path: Path) -> None:
    make(tmp_path, data, systems=["ttt-e2e"], contexts=[8])
    shared = {folder: result for folder, result in results(tmp_path).items() if folder.startswith("runs/ttt-e2e")}
    first = numbers(tmp_path)
    make(tmp_path, data, what="ablations", systems=["no-meta"], contexts=[8])
    assert {folder: results(tmp_path)[folder] for folder in shared} == shared
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert report["finished"] and list(report["systems"]) == ["ttt-e2e", "no-meta"]
    assert numbers(tmp_path) == first and set(report["plan"]["comparisons"]) == {"figure1", "ablations"}
    make(tmp_path, data, systems=["ttt-e2e"], contexts=[8])
    assert list(numbers(tmp_path)["systems"]) == ["full", "ttt-e2e"]


def test_warm_starts(data: Path, tmp_path: Path) -> None:
    outcome = make(tmp_path, data, what="warmstart", systems=None)
    report = json.loads((tmp_path / "warmstart.json").read_text())
    assert report["finished"] and not outcome.troubles
    made = results(tmp_path)
    rows = [row.name for row in WARM_STARTS]
    assert [name for name in report["systems"] if not name.endswith("-first")] == rows
    assert {(e["system"], e["context"]) for e in report["evaluations"]} == {(n, c) for n in rows for c in (8, 32)}
    for name in rows:
        folder = f"runs/{name}/seed0/pretrain"
        if name == "switch":
            assert folder not in made
            continue
        assert made[folder]["tokens"] == 128 and len(report["systems"][name]["sweep"]) == 5
        assert not (tmp_path / folder / "start").exists()
        # All go on from a first stage, and read what the others read.
        assert made[folder]["read"] == made["runs/full-on/seed0/pretrain"]["read"]
        assert made[folder]["read"]["seed"] == 1
    # What a window covers, it does not change: the switch costs nothing at a context of one window.
    losses = {(row["system"], row["context"]): row["loss"]["mean"] for row in report["comparison"]}
    assert losses["switch", 8] == pytest.approx(losses["full-on", 8], abs=1e-6)
    assert losses["switch", 32] != pytest.approx(losses["full-on", 32], abs=1e-6)
    text = (tmp_path / "warmstart.md").read_text()
    assert "full attention, first stage" in text and "Microseconds" not in text


def test_what_does_not_fit_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no system 'wndow'.*there are: full, window"):
        make(tmp_path, data, systems=["wndow"])
    with pytest.raises(UserError, match="no context of 9; it has 8, 32"):
        make(tmp_path, data, contexts=[9])
    with pytest.raises(UserError, match="no document of more than 100000 tokens"):
        make(tmp_path, data, dataclasses.replace(MINUTE, contexts=(8, 100_000), eval_tokens=200_000))
    with pytest.raises(UserError, match=r"paper does not run here\. Eight GPUs"):
        make(tmp_path, data, SCALES["paper"])
    with pytest.raises(UserError, match="vocabulary"):
        make(tmp_path, data, SCALES["tiny"])
    assert not (tmp_path / "plan.json").exists()


def test_a_dry_run_trains_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, data, dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["estimate", "plan.json"]
    text = capsys.readouterr().out
    assert "To do: about" in text and "of memory" in text
    # 3 models trained: 15 sweeps of 3 steps, 3 times 8 steps, 3 times 3 steps of 64 tokens.
    assert all(f"{count:,}" in text for count in (15 * 3 * 64, 3 * 8 * 64, 3 * 3 * 64))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_sweep_that_diverges_counts_as_infinitely_bad(data: Path, tmp_path: Path) -> None:
    make(tmp_path, data, dataclasses.replace(MINUTE, sweep=(1.0, 1e30)), systems=["full"], contexts=[8])
    report = numbers(tmp_path)
    *good, bad = report["systems"]["full"]["sweep"]
    assert all(row["loss"] for row in good) and bad["loss"] is None and "has a loss of" in bad["failed"]
    assert [row["lr"] for row in good] == pytest.approx([0.0015, 0.003, 0.006])
    assert report["systems"]["full"]["lr"] == min(good, key=lambda row: row["loss"])["lr"]
    assert len(report["evaluations"]) == 1
    assert "diverged" in (tmp_path / "figure1.md").read_text()


def test_a_system_that_fails_is_left_out_and_the_rest_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = job.train

    def failing(config: Any, *arguments: Any, **options: Any) -> Any:
        if config.model.suffix_layers and config.train.context == 8:
            raise Divergence("Step 2 has a loss of nan.")
        return train(config, *arguments, **options)

    monkeypatch.setattr(job, "train", failing)
    outcome = make(tmp_path, data, systems=["ttt-e2e"])
    assert set(outcome.troubles) == {
        *(f"runs/ttt-e2e/seed0/{n}" for n in ("pretrain", "extend-32", "evaluate-8", "evaluate-32")),
        *(f"runs/ttt-e2e/sweep/{n}" for n in ("below", "above")),
    }
    assert "Step 2 has a loss of nan" in capsys.readouterr().out
    report = numbers(tmp_path)
    assert not report["finished"] and len(report["evaluations"]) == 2
    assert "every learning rate of its sweep failed" in report["failed"]["runs/ttt-e2e/sweep/above"]


def test_every_training_is_compiled_where_that_is_asked_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, asked = job.train, []

    def plain(*arguments: Any, compile: bool, **options: Any) -> Any:
        asked.append(compile)
        return train(*arguments, **options)  # the compiler itself has tests of its own

    monkeypatch.setattr(job, "train", plain)
    make(tmp_path, data, systems=["ttt-e2e"], contexts=[8], compile=True)
    assert asked == [True] * len(asked) and len(asked) == 2 * (5 + 1)
    make(tmp_path, data, systems=["ttt-e2e"])  # the same folder goes on without
    assert asked[12:] == [False] * 2
    assert numbers(tmp_path)["comparison"][-1]["loss"] is not None


def test_a_full_disk_is_tried_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise UserError("No space left on the disk.") from error

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", full)
        outcome = make(tmp_path, data, systems=["full"], contexts=[8])
    assert outcome.troubles and not results(tmp_path)
    assert "No space left" in (tmp_path / "runs/full/sweep/lr-0.003/log.txt").read_text()
    assert not make(tmp_path, data, systems=["full"], contexts=[8]).troubles
    assert numbers(tmp_path)["finished"]


def test_ctrl_c_in_the_middle_and_on(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = trainer.sequence_loss, []

    def interrupting(*arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 33:  # in the pre-training
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "sequence_loss", interrupting)
    assert make(tmp_path, data, systems=["full"]).interrupted
    assert "the same command goes on" in capsys.readouterr().err
    assert not make(tmp_path, data, systems=["full"]).interrupted
    theirs = {(e["seed"], e["context"]): e["books"] for e in numbers(whole)["evaluations"] if e["system"] == "full"}
    assert {(e["seed"], e["context"]): e["books"] for e in numbers(tmp_path)["evaluations"]} == {
        key: value for key, value in theirs.items() if key[0] == 0
    }


def test_one_at_a_time_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOCK_SECONDS", 0.1)
    with workers.locked(tmp_path), pytest.raises(UserError, match="is at work in"), workers.locked(tmp_path):
        pass
    with workers.locked(tmp_path):
        pass


# -- in processes of their own -----------------------------------------------------------------------------------------


def start(out: Path, data: Path, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, str(out), str(data), str(count)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until `process` has written `count` results; os.walk bears folders that vanish meanwhile, glob does not."""
    while process.poll() is None and sum("result.json" in files for *_, files in os.walk(out / "runs")) < count:
        time.sleep(0.005)


def same_as(whole: Path, out: Path) -> None:
    """Every number of `out` that is no time is that of `whole`."""
    ours, theirs = results(out), results(whole)
    assert len(ours) > 10
    for folder, result in ours.items():
        assert {**result, "seconds": 0} == {**theirs[folder], "seconds": 0}


@pytest.mark.slow
def test_killed_and_gone_on_it_is_the_same(data: Path, whole: Path, tmp_path: Path) -> None:
    for count in (2, 9):
        process = start(tmp_path, data, 0)
        wait_for(tmp_path, count, process)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    make(tmp_path, data)
    same_as(whole, tmp_path)
    assert numbers(tmp_path)["finished"]


@pytest.mark.slow
def test_workers_end_with_their_parent_and_with_ctrl_c(data: Path, whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, data, 2)
    wait_for(tmp_path, 2, process)
    process.kill()  # the workers notice, and let go of the folder's lock
    process.wait()
    with workers.locked(tmp_path):
        done = len(results(tmp_path))
    process = start(tmp_path, data, 2)
    wait_for(tmp_path, done + 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == cli.INTERRUPTED
    make(tmp_path, data)
    same_as(whole, tmp_path)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(7**0.5 / 3**0.5)
    assert standard_error([1.0]) is None and mean({}) is None
    ours = {0: {"a": 2.0, "b": 3.0}, 1: {"a": 4.0, "b": 7.0}}
    theirs = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0, "b": 1.0}, 2: {"a": 9.0, "b": 9.0}}
    # By seed the differences are (1, 2) and (3, 6): means 1.5 and 4.5. By book: 2 and 4.
    found = difference(ours, theirs)
    assert found is not None and (found.books, found.seeds) == (2, 2)
    assert found.mean == pytest.approx(3.0)
    assert found.books_error == pytest.approx(1.0) and found.seeds_error == pytest.approx(1.5)
    assert difference(ours, {5: {"a": 1.0, "b": 1.0}}) is None


def test_dynamic_weights_compute_what_the_window_model_computes() -> None:
    window = small_model(torch.float64, suffix_layers=0, mini_batch_size=None)
    config = small_config(suffix_layers=2, static_mlp=False)
    dynamic = warm_start(window, config)
    tokens_BT1 = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = sequence_loss(dynamic, tokens_BT1, learn=False, dtype=torch.float64).nll_BT
        theirs = sequence_loss(window, tokens_BT1, dtype=torch.float64).nll_BT
        learned = sequence_loss(dynamic, tokens_BT1, inner_lr=0.1, dtype=torch.float64).nll_BT
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned[:, :5], theirs[:, :5], rtol=1e-12, atol=1e-12)
    assert (learned[:, 5:] - theirs[:, 5:]).abs().max() > 1e-3
    assert parameters(config) == parameters(window.config)


def test_books_are_read_as_training_reads(data: Path) -> None:
    held = TokenSet.open(data, "val")
    texts = books(held, 32, 64)
    assert 0 < len(texts) < len(held)  # shorter ones are left out
    assert all(len(book.tokens) - 1 in (32, 64) and book.tokens[0] == held.bos for book in texts)
    model = small_model(vocab_size=272)
    for context in (8, 32):
        for batch_tokens in (8, 1000):
            found = evaluate_documents(model, texts, context, bos=held.bos, batch_tokens=batch_tokens)
            for book, result in zip(texts, found, strict=True):
                starts = range(0, len(book.tokens) - 1, context)
                cut = torch.from_numpy(np.stack([book.tokens[i : i + context + 1] for i in starts]))
                with torch.no_grad():
                    nll_BT = sequence_loss(model, cut).nll_BT
                assert result["tokens"] == len(book.tokens) - 1
                assert result["loss"] == pytest.approx(float(nll_BT.mean()), abs=1e-5)
                widths = np.diff(position_edges(context))
                assert np.dot(result["by_position"], widths) / context == pytest.approx(result["loss"], abs=1e-5)
    assert position_edges(256) == [0, 16, 22, 32, 45, 64, 90, 128, 181, 256] and position_edges(8) == [0, 8]


def test_an_inner_learning_rate_that_diverges_is_not_chosen(data: Path) -> None:
    tokens, model = TokenSet.open(data, "train"), small_model(vocab_size=272)
    options: dict[str, Any] = {"count": 64, "seed": 0, "batch_tokens": 64}
    losses = choose_inner_lr(model, tokens, 16, [0.0, 1e38], **options)
    assert losses[1e38] is None and losses[0.0] is not None
    with torch.no_grad():
        expected = sequence_loss(model, next(SequenceLoader(tokens, 16, 4, 0)), bos=tokens.bos, learn=False)
    mask_BT = expected.mask_BT
    assert losses[0.0] == pytest.approx(float((expected.nll_BT * mask_BT).sum() / mask_BT.sum()), abs=1e-5)
    with pytest.raises(UserError, match="Every inner learning rate diverged"):
        choose_inner_lr(model, tokens, 16, [1e38], **options)


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("what", ["figure1", "ablations"])
def test_the_scales_fit_together(scale: Scale, what: str, tmp_path: Path) -> None:
    chosen = choose(what, scale, None)
    where = tmp_path / "tokens"
    plan = Plan(what, scale, chosen, (0, 1), scale.contexts, where, where, "", "", "", "cpu", 1_000_000)
    folders: set[str] = set()
    for one in jobs(plan):
        assert set(one.needs) <= folders and one.folder not in folders and one.tokens > 0
        folders.add(one.folder)
    assert scale.pretrain_context in scale.contexts and scale.window <= scale.pretrain_context
    base = parameters(pretraining(scale, choose(what, scale, None)[0], 0).model)
    for system in chosen:
        stages = [(pretraining(scale, system, 0), scale.tokens_per_step)]
        stages += [(extending(scale, system, 0, t), scale.extend_tokens_per_step) for t in scale.contexts]
        for config, step in stages:
            assert config.train.batch * config.train.context == step
            assert config.train.batch % (scale.processes * config.train.accumulate) == 0
            assert config.model.vocab_size == scale.vocab_size
            assert abs(parameters(config.model) / base - 1) < 0.03


def test_the_paper_s_schedule() -> None:
    train = pretraining(SCALES["paper"], choose("figure1", SCALES["paper"], ["full"])[0], 0).train
    assert (train.steps, train.batch, train.context, train.lr, train.dtype) == (52_000, 128, 8192, 8e-4, "bfloat16")
    full = extending(SCALES["paper"], SYSTEMS[0], 0, 131_072)
    assert (full.train.steps, full.train.batch, full.train.lr, full.train.inner_warmup) == (1300, 8, 4e-4, 0)
    assert full.model.rope_theta == 1e7
    assert preset("3b-full").model == pretraining(SCALES["paper"], SYSTEMS[0], 0).model


def test_ablations_change_one_thing_each(data: Path, tmp_path: Path) -> None:
    rows = {system.name: pretraining(SCALES["tiny"], system, 0) for system in ablations(SCALES["tiny"])}
    base = rows.pop("ttt-e2e")
    assert rows["window-512"].model.window == 512 and rows["mini-batch-32"].model.mini_batch == 32
    assert rows["suffix-8"].model.suffix_layers == 8 and not rows["no-static-mlp"].model.static_mlp
    assert not rows["no-meta"].train.meta
    for config in rows.values():
        ours, theirs = (dataclasses.asdict(c.model) | dataclasses.asdict(c.train) for c in (config, base))
        assert len({key for key in ours if ours[key] != theirs[key]} - {"mlp_width"}) == 1
    make(tmp_path, data, what="ablations", systems=["no-meta", "no-static-mlp"], contexts=[8])
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["system"] for row in report["comparison"]] == ["ttt-e2e", "no-static-mlp", "no-meta"]
    assert report["finished"] and report["comparison"][0]["difference"]["mean"] == 0
    assert [e["system"] for e in report["evaluations"] if "inner_lr" in e] == ["no-meta"]
    # They take the learning rate of TTT-E2E, which alone is swept.
    assert {name for name, system in report["systems"].items() if system["sweep"]} == {"ttt-e2e"}
    assert len({system["lr"] for system in report["systems"].values()}) == 1
    trained = json.loads((tmp_path / "runs/no-meta/seed0/pretrain/job.json").read_text())
    assert trained["config"]["train"]["lr"] == report["systems"]["ttt-e2e"]["lr"]
    assert not (tmp_path / "runs/no-meta/sweep").exists()


def test_a_comparison_s_models_are_asked_for_needles(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("ttt_e2e.reproduce.needles.run_needles", lambda *_, **options: given.update(options))
    line = ["reproduce", "needles", "--comparison", str(whole), "--models", f"mine={whole}", "--out", "x"]
    assert cli.main([*line, "--tasks", "1,3", "--contexts", "2K"]) == 0
    models = {n: whole / f"runs/{n}/seed0/extend-32/run/model" for n in ("full", "window", "ttt-e2e")}
    assert given["models"] == {"mine": whole} | models  # dynamic evaluation has no model of its own
    assert (given["tasks"], given["contexts"]) == ([1, 3], [2048])


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}

    def kept(*arguments: Any, **options: Any) -> workers.Outcome:
        given.update(options, arguments=arguments)
        return workers.Outcome(interrupted=True)

    monkeypatch.setattr("ttt_e2e.reproduce.run.reproduce", kept)
    words = (
        "reproduce figure1 --scale small --systems window,titans --seeds 0,1 --contexts 512,2K --workers 3 "
        "--compile --dry-run"
    )
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert given["arguments"] == ("figure1", SCALES["small"], tmp_path)
    assert (given["systems"], given["seeds"], given["contexts"]) == (["window", "titans"], [0, 1], [512, 2048])
    assert (given["worker_count"], given["dry_run"], given["data"], given["progress"]) == (3, True, None, True)
    assert given["compile"] is True
    for line, said in (
        ("reproduce figure1 --out x --scale huge", "there are: tiny, small, paper"),
        ("reproduce figure1 --out x --sytems full", "did you mean --systems?"),
        ("reproduce figure1 --out x --seeds one", "no list of numbers"),
        ("reproduce figure2", "'figure1', 'ablations'"),
        ("reproduce needles --out x", "--models or --comparison"),
    ):
        assert cli.main(line.split()) in (1, 2)
        assert said in capsys.readouterr().err


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    torch.set_num_threads(1)
    stopped = make(Path(sys.argv[1]), Path(sys.argv[2]), worker_count=int(sys.argv[3])).interrupted
    sys.exit(cli.INTERRUPTED if stopped else 0)
