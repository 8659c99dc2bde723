"""Commands that write, killed before any of their file operations and run again: they end as if they had not been."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from stress_helpers import Figures, contents, rounds, run_copy
from test_damaged_files import TRAIN

pytestmark = pytest.mark.stress

READ = ["read", "text.txt", "--no-plot", "--quiet", "--save-every", "0"]
CASES = [
    [*READ, "--save", "out.session"],
    [*READ, "--session", "old.session", "--save", "out.session"],
    [*READ, "--session", "old.session", "--save", "old.session"],
    [*READ, "--save", "out.session", "--notebook"],
    [*READ, "--session", "old.session", "--save", "old.session", "--notebook"],
    ["generate", "The", "--session", "old.session", "--learn", "--save", "out.session", "--seed", "1"],
    ["prepare", "rows.jsonl", "--out", "out", "--vocab-size", "270", "--quiet"],
    [*TRAIN, "steps=3", "--resume"],
    ["convert", "to-hf", "MODEL", "out"],
]
WRITES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "sqlite3.connect",
    "os.link",
}


def watch(kill_at: int, count: Path | None = None) -> None:
    """Kill this process before its write operation number `kill_at`, or count them in a file."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        opens_to_write = event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in WRITES or opens_to_write:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count is not None:
                os.pwrite(counter, str(seen).encode(), 0)

    if count is not None:
        counter = os.open(count, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(hook)


def result(folder: Path) -> dict[str, Any]:
    """What is on disk, without measured times, older checkpoints, and what a database or a lock keeps for itself."""
    found: dict[str, Any] = {}
    newest = max((path.name for path in folder.glob("run/checkpoints/step-*")), default="")
    for name, content in contents(folder).items():
        if "/checkpoints/" in name and newest not in name:
            continue  # a kill may come before it is removed
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in content.splitlines()]
            found[name] = [{k: v for k, v in line.items() if not re.search("second|crc32", k)} for line in lines]
        elif name.endswith("trainer.json"):
            found[name] = "seconds are in it"
        elif "notebook" in name:
            found[name.partition(".notebook")[0]] = "a notebook"
        elif ".lock" not in name:
            found[name] = content
    return found


@pytest.mark.parametrize("share", range(2))  # two processes make use of two cores
def test_killed_and_run_again(shipped: Path, fresh: Any, figures: Figures, tmp_path: Path, share: int) -> None:
    folder = fresh.template
    assert (
        run_copy(["read", "text.txt", "--no-plot", "--quiet", "--save", "old.session", "--notebook"], folder).code == 0
    )
    expected, operations, shown = [], [], []
    cases = [[word.replace("MODEL", str(shipped)) for word in argv] for argv in CASES]
    search = ["notebook", "search", "PLACE", "grey geese", "--count", "50"]
    for argv in cases:
        here = fresh()
        outcome = run_copy(argv, here, before=lambda: watch(0, tmp_path / "count"))
        assert outcome.code == 0, (argv, outcome.stderr)
        expected.append(result(here))
        operations.append(int((tmp_path / "count").read_text()))
        (tmp_path / "count").unlink()
        place = argv[argv.index("--save") + 1] if "--notebook" in argv else ""
        shown.append(run_copy([place or word if word == "PLACE" else word for word in search], here) if place else None)
    for name, choices in rounds(share, 2):
        here, number = fresh(), choices.randrange(len(cases))
        argv, points = cases[number], []
        for _ in range(choices.choice((1, 1, 2, 3))):
            point = choices.randint(1, operations[number])
            points.append(point)
            outcome = run_copy(argv, here, before=lambda: watch(point))  # noqa: B023 - called at once
            figures.add("kills", outcome.code == -signal.SIGKILL)
            if outcome.code != -signal.SIGKILL:
                break
        else:
            outcome = run_copy(argv, here)
        where = f"{name}: {' '.join(argv)} killed at {points} of {operations[number]}"
        if outcome.code == 1 and argv[0] in ("prepare", "convert"):
            # It may have been complete before the kill; then it is not made twice.
            assert "exists" in outcome.stderr or "not empty" in outcome.stderr, f"{where}: {outcome.stderr}"
        else:
            assert outcome.code == 0, f"{where}: {outcome.stderr}"
        figures.add("operations", len(points) + 1)
        after = result(here)
        different = {
            file for file in after.keys() | expected[number].keys() if after.get(file) != expected[number].get(file)
        }
        assert not different, f"{where}: another result in {different}"
        if shown[number] is not None:
            place = argv[argv.index("--save") + 1]
            found = run_copy([place if word == "PLACE" else word for word in search], here)
            assert found == shown[number], f"{where}: another notebook"
