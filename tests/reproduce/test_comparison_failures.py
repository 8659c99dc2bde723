"""Comparisons in which jobs fail, or that are interrupted or killed, and then continued."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import start_copy
from reproduce_helpers import FEW_RATES, MINUTE, make_comparison, read_report, read_results

from ttt_e2e.errors import INTERRUPTED, Divergence, UserError
from ttt_e2e.files import lock_folder
from ttt_e2e.reproduce import job
from ttt_e2e.reproduce import report as report_module
from ttt_e2e.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 600.0  # seconds, for a machine under load


# -- failures ----------------------------------------------------------------------------------------------------------


def test_diverging_learning_rate_is_not_chosen(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the reports that are written on the way, only one in a minute has pictures."""
    ticks, drawn, write_report = itertools.count(0, 40), [], report_module.write_report

    def recorded(*arguments: Any, pictures: bool = True) -> None:
        drawn.append(pictures)
        write_report(*arguments, pictures=pictures)

    monkeypatch.setattr(report_module, "write_report", recorded)
    monkeypatch.setattr("ttt_e2e.reproduce.run.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    scale = dataclasses.replace(MINUTE, sweep_factors=(1.0, 1e30))
    make_comparison(tmp_path, data, scale, systems=["full"], contexts=[8])
    assert drawn == [False, True, True]
    report = read_report(tmp_path)
    *good, bad = report["systems"]["full"]["sweep"]
    assert all(row["loss"] for row in good) and bad["loss"] is None and "has a loss of" in bad["failed"]
    assert [row["lr"] for row in good] == pytest.approx([0.0015, 0.003, 0.006])
    assert report["systems"]["full"]["lr"] == min(good, key=lambda row: row["loss"])["lr"]
    assert [e["system"] for e in report["evaluations"]] == ["full", "ngram"]
    assert "diverged" in (tmp_path / "figure1.md").read_text()


def test_failing_system_does_not_stop_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = job.train

    def train_or_diverge(config: Any, *arguments: Any, **options: Any) -> Any:
        if config.model.suffix_layers and config.train.context == 8:
            raise Divergence("Step 2 has a loss of nan.")
        return train(config, *arguments, **options)

    monkeypatch.setattr(job, "train", train_or_diverge)
    outcome = make_comparison(tmp_path, data, systems=["ttt-e2e"])
    assert set(outcome.problems) == {
        *(f"runs/ttt-e2e/seed0/{n}" for n in ("pretrain", "extend-32", "evaluate-8", "evaluate-32")),
        *(f"runs/ttt-e2e/sweep/{n}" for n in ("below", "above")),
    }
    assert "Step 2 has a loss of nan" in capsys.readouterr().out
    report = read_report(tmp_path)
    assert not report["finished"] and [e["system"] for e in report["evaluations"]] == ["full"] * 2 + ["ngram"] * 2
    assert "every learning rate of the sweep failed" in report["failed"]["runs/ttt-e2e/sweep/above"]


def test_compile_option_reaches_every_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, compiled = job.train, []

    def train_eagerly(*arguments: Any, compile: bool, **options: Any) -> Any:
        compiled.append(compile)
        return train(*arguments, **options)  # the compiler has tests of its own

    monkeypatch.setattr(job, "train", train_eagerly)
    make_comparison(tmp_path, data, FEW_RATES, systems=["ttt-e2e"], contexts=[8], compile=True)
    assert compiled == [True] * len(compiled) and len(compiled) == 2 * (3 + 1)
    make_comparison(tmp_path, data, FEW_RATES, systems=["ttt-e2e"])  # the same folder continues without
    assert compiled[8:] == [False] * 2
    assert read_report(tmp_path)["evaluations"][-3]["system"] == "ttt-e2e"


def test_full_disk_is_tried_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise UserError("No space left on the disk.") from error

    with monkeypatch.context() as patch:
        patch.setattr(trainer.CheckpointSaver, "save", full)
        outcome = make_comparison(tmp_path, data, systems=["full"], contexts=[8])
    assert outcome.problems and set(read_results(tmp_path)) == {"runs/ngram/seed0/evaluate-8"}
    assert "No space left" in (tmp_path / "runs/full/sweep/lr-0.003/log.txt").read_text()
    assert not make_comparison(tmp_path, data, systems=["full"], contexts=[8]).problems
    assert read_report(tmp_path)["finished"]


def test_folder_is_used_by_one_call_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.reproduce.run.LOCK_SECONDS", 0.0)
    with lock_folder(tmp_path, "in use"), pytest.raises(UserError, match=r"Another .* is using"):
        make_comparison(tmp_path, data, dry_run=True)
    make_comparison(tmp_path, data, dry_run=True)


@pytest.mark.parametrize("name", ["plan.json", "runs/window/seed0/pretrain/result.json"])
def test_altered_plans_and_results_are_refused(data: Path, undisturbed: Path, tmp_path: Path, name: str) -> None:
    for file in ("plan.json", *(f"{one}/result.json" for one in read_results(undisturbed))):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(undisturbed / file, tmp_path / file)
    make_comparison(tmp_path, data, dry_run=True)
    content = (tmp_path / name).read_bytes()
    altered = [content[:i] + b"9" + content[i + 1 :] for i, byte in enumerate(content) if chr(byte) in "12345678"]
    # Not all are other numbers: of the 17 digits of some, the last one does not matter.
    (tmp_path / name).write_bytes(random.choice([one for one in altered if json.loads(one) != json.loads(content)]))
    with pytest.raises(UserError, match=r"altered after it was written|format version 9|not a ttt-e2e comparison"):
        make_comparison(tmp_path, data, dry_run=True)


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_ctrl_c_and_the_same_command_again(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sequence_loss, calls = trainer.sequence_loss, []

    def interrupting(*arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 33:  # in the pre-training
            os.kill(os.getpid(), signal.SIGINT)
        return sequence_loss(*arguments, **options)

    monkeypatch.setattr(trainer, "sequence_loss", interrupting)
    assert make_comparison(tmp_path, data, systems=["full"]).interrupted
    assert "repeat the command to continue" in capsys.readouterr().err
    assert not make_comparison(tmp_path, data, systems=["full"]).interrupted
    books = {(e["system"], e["seed"], e["context"]): e["books"] for e in read_report(undisturbed)["evaluations"]}
    evaluations = read_report(tmp_path)["evaluations"]
    assert {(e["system"], e["seed"], e["context"]): e["books"] for e in evaluations} == {
        (name, 0, context): books[name, 0, context] for name in ("full", "ngram") for context in (8, 32)
    }


def compare(out: Path, data: Path, num_workers: int) -> None:
    """A comparison that takes no more than there is to interrupt: trainings of two systems, and their evaluations."""
    outcome = make_comparison(out, data, systems=["ttt-e2e"], contexts=[8], num_workers=num_workers)
    sys.exit(INTERRUPTED if outcome.interrupted else 0)


def wait_for_results(out: Path, count: int, process: BaseProcess) -> None:
    """Wait until there are `count` results. Folders may vanish meanwhile, which os.walk allows and glob does not."""
    deadline = time.monotonic() + PATIENCE
    while sum("result.json" in files and ".result" not in folder for folder, _, files in os.walk(out / "runs")) < count:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def finish_and_expect_the_same(out: Path, data: Path, undisturbed: Path) -> None:
    """All numbers but times are those of the comparison that was not interrupted."""
    make_comparison(out, data, systems=["ttt-e2e"], contexts=[8])
    assert read_report(out)["finished"]
    results, expected = read_results(out), read_results(undisturbed)
    assert len(results) > 10
    for folder, result in results.items():
        assert {**result, "seconds": 0} == {**expected[folder], "seconds": 0}


@pytest.mark.slow
def test_killed_comparison_continues_with_the_same_results(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    for count in (2, 9):
        process = start_copy(compare, tmp_path, data, 0)
        wait_for_results(tmp_path, count, process)
        time.sleep(random.uniform(0, 0.1))  # so that it is killed anywhere in its work
        process.kill()
        process.join()
    finish_and_expect_the_same(tmp_path, data, undisturbed)


@pytest.mark.slow
def test_workers_end_with_their_parent_and_with_ctrl_c(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Workers are processes of their own; that of their parent is a copy of this one."""
    process = start_copy(compare, tmp_path, data, 2)
    wait_for_results(tmp_path, 1, process)
    process.kill()  # the workers notice, and give up the folder's lock
    process.join()
    with lock_folder(tmp_path, "the workers of a killed process still run", PATIENCE):
        done = len(read_results(tmp_path))
    process = start_copy(compare, tmp_path, data, 2)
    wait_for_results(tmp_path, done + 1, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == INTERRUPTED
    finish_and_expect_the_same(tmp_path, data, undisturbed)
