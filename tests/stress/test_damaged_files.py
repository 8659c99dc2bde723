"""Damaged files of every kind: what reads them does what it does with intact ones, or says in one sentence why not."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stress_helpers import Figures, Outcome, complaint, damage, rounds, run_copy

pytestmark = pytest.mark.stress

TRAIN = shlex.split(
    "train tiny --data tokens --out run --quiet hidden_size=16 num_attention_heads=2 num_hidden_layers=4 "
    "intermediate_size=24 sliding_window=8 mini_batch_size=4 vocab_size=272 context=16 batch=2 eval_tokens=32 "
    "checkpoint_every=1 eval_every=0"
)


def numbers_of(here: Path, outcome: Outcome) -> Any:
    """What a reading measured, without its times."""
    report = json.loads(outcome.stdout)
    return {name: value for name, value in report.items() if not re.search("second|speed", name)}


class Losses(list[float]):
    """Of a run; some may be missing where a warning says so."""

    was_told = False

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Losses)
        return [*self] == [*other] or (
            self.was_told and {*self} < {*other} and [*self] == sorted(self, key=other.index)
        )


def losses(here: Path, outcome: Outcome) -> Any:
    """The losses of a run, and its model."""
    run = here / ("run" if (here / "run").exists() else "stopped")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = Losses(line["loss"] for line in lines if "loss" in line)
    found.was_told = re.search("metrics.jsonl lacks [0-9]+ of", outcome.stderr) is not None
    return found, (run / "model/model.safetensors").read_bytes()


def printed(here: Path, outcome: Outcome) -> Any:
    return re.sub(r"[0-9.,]+ (s|seconds|tokens/s)", "", outcome.stdout)


# The files that are damaged, the command that reads them, and what it found.
Case = tuple[str, list[str], Callable[[Path, Outcome], Any]]
READ = ["read", "text.txt", "--json", "--no-plot", "--quiet"]
CASES: list[Case] = [
    ("s.session", [*READ, "--session", "s.session"], numbers_of),
    ("s.session", ["generate", "The", "--session", "s.session", "--max-tokens", "5", "--seed", "1"], printed),
    ("unfinished.session", [*READ, "--save", "unfinished.session"], numbers_of),
    ("s.session.notebook*", ["notebook", "search", "s.session", "geese", "lake"], printed),
    ("model/*", [*READ, "--model", "model"], numbers_of),
    ("trained/*", ["evaluate", "text.txt", "--model", "trained", "--quiet"], printed),
    ("tokens/**/*", [*TRAIN, "steps=2"], losses),
    ("stopped/**/*", [*TRAIN, "steps=3", "--out", "stopped", "--resume"], losses),
    ("text.txt", READ, lambda here, outcome: None),  # a text is what it is, or no text
    ("rows.jsonl", ["prepare", "rows.jsonl", "--out", "out", "--quiet", "--vocab-size", "270"], lambda *_: None),
]


@pytest.mark.parametrize("share", range(2))  # two processes make use of two cores
def test_damaged_files(shipped: Path, fresh: Any, figures: Figures, share: int) -> None:
    import shutil

    folder = fresh.template
    shutil.copytree(shipped, folder / "model")
    save = [*READ, "--save", "s.session", "--notebook"]
    for argv in (save, [*TRAIN, "steps=3"], ["convert", "to-hf", "model", "hf"]):
        outcome = run_copy(argv, folder)
        assert outcome.code == 0, outcome.stderr
    (folder / "run/model").rename(folder / "trained")
    (folder / "run").rename(folder / "stopped")
    shutil.rmtree(max((folder / "stopped/checkpoints").iterdir()))  # as if it had been killed before its end
    stop = run_copy([*READ, "--save", "unfinished.session", "--save-every", "0"], folder, before=interrupt_reading)
    assert stop.code == 130, stop
    expected = []
    for _, argv, result in CASES:
        here = fresh()
        outcome = run_copy(argv, here)
        assert outcome.code == 0, f"{argv}: {outcome}"
        expected.append(result(here, outcome))
    for name, choices in rounds(share, 2):
        here, number = fresh(), choices.randrange(len(CASES))
        pattern, argv, result = CASES[number]
        files = sorted(path for path in here.glob(pattern) if path.is_file())
        files += [below for path in here.glob(pattern) if path.is_dir() for below in path.rglob("*") if below.is_file()]
        victim = choices.choice([file for file in files if file.name != ".lock"])
        damaged = damage(choices, victim.read_bytes(), choices.choice(files).read_bytes())
        victim.write_bytes(damaged)
        outcome = run_copy(argv, here)
        where = f"{name}: {victim.relative_to(here)} damaged, {' '.join(argv)}"
        assert (wrong := complaint(outcome)) is None, f"{where}: {wrong}"
        figures.add("damaged files")
        figures.add("refused", outcome.code != 0)
        if outcome.code == 0:
            assert result(here, outcome) == expected[number], f"{where}: another result"


def interrupt_reading() -> None:
    """Ctrl-C in the middle of a text."""
    import os
    import signal

    from ttt_e2e.inference.session import Session

    read, calls = Session.read_chunks, []

    def read_chunks(self: Session, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *arguments)

    Session.read_chunks = read_chunks  # type: ignore[method-assign, assignment]
