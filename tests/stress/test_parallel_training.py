"""Training by several processes: the same as by one over many steps, and as if nothing had happened after kills."""

import errno
import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import flipped, run_group, set_back_clock, start_group
from parallel_cases import CASES, MORE_CASES, differences, disturb, measured, train, train_cases
from stress_helpers import Figures, rounds

from ttt_e2e.errors import INTERRUPTED
from ttt_e2e.inner_loop import meta_loss
from ttt_e2e.training import checkpoint
from ttt_e2e.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.stress


def test_fifty_steps_are_those_of_one_process(
    model_folder: Path, figures: Figures, tmp_path: Path, one_thread: None
) -> None:
    """To 1e-6, where rounding in float64 has grown to 1e-9. model_folder: so that all modules have been imported."""
    every = CASES | MORE_CASES
    for name, choices in rounds():
        case = choices.choice([*every])
        count, replicate = choices.choice([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
        folders = [tmp_path / name.split("=")[-1] / kind for kind in ("one", "several")]
        for folder in folders:
            folder.mkdir(parents=True)
        train_cases({case: every[case]}, 50, 1, folders[0], 1e-4)
        codes = run_group(count, train_cases, {case: every[case]}, 50, replicate, folders[1], 1e-4)
        where = f"{name}: {case}, {count} processes in {replicate} groups"
        assert codes == [0] * count, where
        difference = differences({case: every[case]}, *folders)[case]
        assert difference < 1e-6, f"{where}: {difference}"
        figures.add("runs")


def test_killed_and_damaged_runs_end_as_undisturbed_ones(
    model_folder: Path, fresh: Any, figures: Figures, capfd: pytest.CaptureFixture[str]
) -> None:
    """Random processes are killed at random moments, their disks fill up, or they get a batch with NaN.

    Between, the newest checkpoint is cut or altered. The clock goes backwards in all of them.
    """
    data, whole, seconds = fresh.template / "tokens", {}, {}
    for name, choices in rounds():
        count = choices.choice((2, 4))
        if count not in whole:
            whole[count] = fresh.template.parent / f"whole{count}"
            started = time.monotonic()
            assert run_group(count, lambda: train(data, whole[count])) == [0] * count  # noqa: B023
            seconds[count] = time.monotonic() - started
        out = fresh() / "run"
        for _ in range(choices.randint(1, 3)):
            rank, step = choices.randrange(count), choices.randrange(1, 6)
            fault, sentence = choices.choice([*[(None, "not answer|not found each other")] * 3, *FAULTS])
            before = partial(set_back_and_disturb, rank, step, fault)
            processes = start_group(count, lambda: train(data, out, "--resume", before=before))  # noqa: B023
            if fault is None:
                # A run that is resumed takes less time than a whole one.
                time.sleep(choices.uniform(0, 0.7 * seconds[count]))
                processes[rank].kill()
            for process in processes:
                process.join()
            codes, errors = [process.exitcode for process in processes], capfd.readouterr().err
            where = f"{name}: rank {rank} of {count}, {fault}, exit codes {codes}: {errors}"
            said = [line for line in errors.splitlines() if line.startswith("ttt-e2e: error: ")]
            assert {*codes} <= ({0, 1, -9} if fault is None else {0, 1}), where
            assert all(code == 0 for code in codes if code != -9) or said, where
            assert len(said) < 2 or fault is None, (
                where
            )  # processes that have not found each other speak for themselves
            assert all(re.search(sentence, line) for line in said), where
            figures.add("kills" if fault is None else fault.__name__, {*codes} != {0})
            figures.add("damaged checkpoints", damage_newest(out, choices))
        where = f"{name}, {count} processes"
        assert run_group(count, lambda: train(data, out, "--resume")) == [0] * count, where  # noqa: B023
        assert measured(out) == measured(whole[count]), where
        weights = [run / "model/model.safetensors" for run in (out, whole[count])]
        assert weights[0].read_bytes() == weights[1].read_bytes(), where


def test_checkpoint_of_four_processes_is_resumed_by_eight(model_folder: Path, fresh: Any) -> None:
    data = fresh.template / "tokens"
    whole, out = data.parent / "whole", data.parent / "run"
    assert run_group(4, lambda: train(data, whole)) == [0] * 4
    before = partial(disturb, 2, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run_group(4, lambda: train(data, out, before=before)) == [INTERRUPTED] * 4
    assert run_group(8, lambda: train(data, out, "--resume")) == [0] * 8
    losses = [[line["loss"] for line in measured(run) if "loss" in line] for run in (out, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 6


def full_disk() -> None:
    """Let no more tensors be written."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.save_safetensors = full  # type: ignore[assignment]


def batch_with_nan() -> None:
    """Let the next losses be no numbers."""
    meta_loss.mini_batch_mean = lambda nll_BT, mask_BT, b: nll_BT.mean(1) * float("nan")


FAULTS: list[tuple[Callable[[], None], str]] = [
    (full_disk, r"No space left on the disk while writing .*step-\d+; the previous one is kept\."),
    (batch_with_nan, r"Step \d+ has a loss of nan .*(last checkpoint is kept: .*step-|no checkpoint yet)"),
]


def set_back_and_disturb(chosen: int, step: int, fault: Callable[[], None] | None, rank: int) -> None:
    """`disturb` one process, if there is a fault, and set back every process's clock."""
    set_back_clock()
    if fault is not None:
        disturb(chosen, step, fault, rank)


def damage_newest(run: Path, choices: random.Random) -> bool:
    """Perhaps cut or alter a file of the newest checkpoint, if there is another one."""
    checkpoints = list_checkpoints(run)
    if len(checkpoints) < 2 or choices.random() < 0.5:
        return False
    file = choices.choice(sorted(path for path in checkpoints[0].rglob("*") if path.is_file()))
    content = file.read_bytes()
    cut = content[: choices.randrange(len(content))]
    file.write_bytes(choices.choice([cut, flipped(content, choices.randrange(8 * len(content)))]))
    return True
