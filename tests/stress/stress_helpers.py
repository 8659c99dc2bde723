"""What the stress tests share: rounds until the time is up, and commands in copies of this process.

`pytest -m stress` runs them, each for `TTT_E2E_STRESS_SECONDS` (default 60). A failure names the seed and the round;
with `TTT_E2E_STRESS_SEED` and `TTT_E2E_STRESS_ROUND` that round is made again.
"""

import faulthandler
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import start_command

SECONDS = float(os.environ.get("TTT_E2E_STRESS_SECONDS", "60"))
SEED = int(os.environ.get("TTT_E2E_STRESS_SEED", str(random.SystemRandom().randrange(10**6))))
ROUND = os.environ.get("TTT_E2E_STRESS_ROUND")

PATIENCE = 300
"""Seconds that a command may take before it is stopped: more than any of them needs on a busy machine, which may have
to compile first."""

TEXT = "".join(f"{i} grey geese flew over the {'lake' if i % 2 else 'wood'} at dusk, naß 雨.\n" for i in range(30))


def rounds(share: int = 0, shares: int = 1) -> Iterator[tuple[str, random.Random]]:
    """The name of a round, for messages, and its choices; new rounds until the time is up.

    share: which one this is of the `shares` tests that divide the time among them.
    """
    end, number = time.monotonic() + SECONDS / shares, share * 10**6
    first = number
    while time.monotonic() < end and (ROUND is None or number == first):
        name = ROUND or str(number)
        yield f"TTT_E2E_STRESS_SEED={SEED} TTT_E2E_STRESS_ROUND={name}", random.Random(f"{SEED}/{name}")
        number += 1


@dataclass
class Outcome:
    """How a command ended. code: negative for a signal, as in `subprocess`."""

    code: int
    stdout: str
    stderr: str


def run_copy(
    argv: list[str], folder: Path, *, stdin: bytes = b"", before: Callable[[], object] = lambda: None
) -> Outcome:
    """Run a command line in a copy of this process, in `folder`; unlike a new one it has imported everything.

    before: called in the copy first.
    """
    names = [folder.parent / f"{folder.name}.{stream}" for stream in ("stdin", "stdout", "stderr")]
    names[0].write_bytes(stdin)

    def prepare() -> None:
        os.chdir(folder)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        faulthandler.dump_traceback_later(PATIENCE - 5, file=errors)  # where it hangs
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before()

    with names[0].open("rb") as given, names[1].open("wb") as out, names[2].open("wb") as errors:
        child = start_command(argv, given.fileno(), out.fileno(), errors.fileno(), prepare)
    _, status = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(status), *(name.read_text(errors="replace") for name in names[1:]))


def complaint(outcome: Outcome) -> str | None:
    """What is wrong with how a command ended: it must succeed, or say in one sentence why it cannot."""
    lines = outcome.stderr.strip().splitlines()
    if "Traceback" in outcome.stderr or outcome.code not in (0, 1, 2, 130):
        return f"exit code {outcome.code}: {outcome.stderr[-3000:]}"
    if (
        outcome.code in (1, 2)
        and not (lines and lines[-1].startswith("ttt-e2e: error: "))
        and "usage:" not in (outcome.stdout)
    ):
        return f"exit code {outcome.code} without a sentence: {outcome.stderr[-1000:]!r}"
    return None


@dataclass
class Figures:
    """What a stress test did, printed at its end."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + count

    def show(self) -> None:
        said = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        # Past pytest's capture: figures are what a run by hand is for.
        with open(os.environ.get("TTT_E2E_STRESS_FIGURES", "/dev/stderr"), "a") as out:  # noqa: PTH123
            out.write(f"\n{self.name}: {said}; seed {SEED}, {SECONDS:g} s, torch {torch.__version__}\n")


def damage(choices: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """`data` with something wrong in it: bits, bytes, length, a part, or all of it. other: bytes of another file."""
    if not data:
        return choices.randbytes(choices.randint(1, 64))
    kind, at = choices.randrange(8), choices.randrange(len(data))
    if choices.random() < 0.5:
        at = choices.randrange(min(len(data), 4096))  # headers decide most
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << choices.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + choices.randbytes(choices.choice((1, 100)))
    if kind == 3:
        length = choices.choice((1, 8, 512))
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    if kind == 4:
        return data[:at] + choices.randbytes(choices.choice((1, 2, 8))) + data[at:]
    if kind == 5:
        return data[:at] + data[at + choices.choice((1, 2, 8)) :]
    if kind == 6:
        words = [b"-1", b"0", b"1e999", b"NaN", b"null", b'""', b"[]", b"{}", b"true", b"9" * 40, b'"\\ud800"', b"\xff"]
        numbers = [i for i, byte in enumerate(data[:4096]) if 48 <= byte < 58]
        at = choices.choice(numbers) if numbers else at
        end = at
        while end < len(data) and 48 <= data[end] < 58:
            end += 1
        return data[:at] + choices.choice(words) + data[max(end, at + 1) :]
    return choices.choice((b"", other or b"\0" * 100, choices.randbytes(len(data)), data[::-1]))


def contents(folder: Path) -> dict[str, Any]:
    """All files below `folder` by their relative paths, with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
