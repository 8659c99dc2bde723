"""Jobs as processes, several at a time: what is done stays done, what is interrupted goes on the next time.

The processes share the lock of the folder and end when this one does, so that after a `kill -9` nothing works on
unseen, and a second call waits until the last of them has gone.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.files import write_text
from ttt_e2e.model.checkpoint import read_json
from ttt_e2e.reproduce import job as one_job
from ttt_e2e.reproduce.job import JOB
from ttt_e2e.reproduce.plan import RESULT, RUN, Job
from ttt_e2e.training.metrics import FILE as METRICS

START_SECONDS = 5.0
"""What a process takes to begin."""
_LOG = "log.txt"
_POLL_SECONDS = 0.05
_SHOW_SECONDS = 1.0
_LOCK_SECONDS = 60.0

Specification = Callable[[Job, Mapping[str, dict[str, Any]]], dict[str, Any]]


@dataclass
class Outcome:
    """How a call of `run` ended. results: by folder, those of earlier calls included; one may say "failed".

    troubles: by folder, why a job could not be done this time. interrupted: by Ctrl-C.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the lock of the folder `out`; yields its file descriptor, for the processes that share it.

    Raises UserError if another holds it for a minute.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - started > _LOCK_SECONDS:
                    raise UserError(f"Another `ttt-e2e reproduce` is at work in {out}; wait for it.") from error
                time.sleep(0.2)
        yield handle.fileno()


def run(
    jobs: list[Job],
    out: Path,
    specification: Specification,
    *,
    lock: int,
    workers: int,
    seconds: Mapping[str, float] | None = None,
    done: Callable[[Job, dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> Outcome:
    """Do all of `jobs` that have no result yet, `workers` at a time, the longest of those that can begin first.

    specification: what job.json is to say when the job's needs have ended; its UserError means that they gave nothing.
    lock: see `locked`. workers: 0 is one after the other in this very process. seconds: what each is
    expected to take, by folder. done: is called with every new result. Ctrl-C lets the processes write their
    checkpoints; a second one kills them.
    """
    outcome = Outcome(results={job.folder: r for job in jobs if (r := result_of(out / job.folder)) is not None})
    waiting = [job for job in jobs if job.folder not in outcome.results]
    clock = _Clock(waiting, seconds or {})
    running: dict[str, _Running] = {}

    def ended(job: Job, result: dict[str, Any] | None, trouble: str) -> None:
        if result is not None:
            outcome.results[job.folder] = result
        else:
            outcome.troubles[job.folder] = trouble
        clock.ended(job)
        count = len(outcome.results) + len(outcome.troubles)
        line = f"{count} of {len(jobs)}  {job.folder}  {_in_words(result, trouble)}"
        tqdm.write(f"{line}{'' if seconds is None else clock.left()}", file=sys.stdout)
        sys.stdout.flush()
        if done is not None and result is not None:
            done(job, result)

    hidden = None if progress and waiting else True  # None: shown on a terminal only
    form = "{percentage:3.0f}%|{bar}| {postfix}"
    with tqdm(total=1.0, disable=hidden, bar_format=form, leave=False) as bar:
        shown = 0.0
        try:
            while waiting or running:
                for folder in [f for f, process in running.items() if process.ended]:
                    process = running.pop(folder)
                    ended(process.job, *process.close())
                for job in _ready(waiting, outcome, clock)[: max(1, workers) - len(running)]:
                    waiting.remove(job)
                    try:
                        spec = specification(job, outcome.results)
                    except UserError as error:
                        ended(job, None, str(error))
                        continue
                    write_text(out / job.folder / JOB, json.dumps(spec, indent=1) + "\n")
                    if workers:
                        running[job.folder] = _Running(job, out / job.folder, spec, lock)
                    else:
                        ended(job, *_here(out / job.folder))
                if time.monotonic() - shown > _SHOW_SECONDS:
                    shown = time.monotonic()
                    bar.n = clock.share({f: process.share for f, process in running.items()})
                    bar.set_postfix_str(f"{clock.left(bar.n)[2:]}; {' '.join(running)}")
                time.sleep(_POLL_SECONDS if running else 0)
        except KeyboardInterrupt:
            outcome.interrupted = True
            tqdm.write("Stopping: what is under way is being written down.", file=sys.stderr)
            for folder, process in _stopped(running).items():
                result, _ = process.close()
                if result is not None:
                    outcome.results[folder] = result
        except BaseException:
            _stopped(running)
            raise
    return outcome


class _Clock:
    """How much of the work of this call is done, and how long the rest will take at its pace."""

    def __init__(self, jobs: list[Job], seconds: Mapping[str, float]) -> None:
        self.seconds = {job.folder: seconds.get(job.folder, START_SECONDS) for job in jobs}
        self._total = sum(self.seconds.values())
        self._done = 0.0
        self._started = time.monotonic()

    def ended(self, job: Job) -> None:
        self._done += self.seconds[job.folder]

    def share(self, running: Mapping[str, float]) -> float:
        """The share of the work that is done, given those of the jobs that are running."""
        return (self._done + sum(self.seconds[f] * part for f, part in running.items())) / max(self._total, 1e-9)

    def left(self, share: float | None = None) -> str:
        """The time left in words."""
        share = self.share({}) if share is None else share
        if share <= 0:
            return "; time left: not known yet"
        seconds = (time.monotonic() - self._started) * (1 - share) / share
        units = ((3600, "h"), (60, "min"), (1, "s"))
        size, unit = next((size, unit) for size, unit in units if seconds >= size or size == 1)
        return f"; {seconds / size:.{1 if unit == 'h' else 0}f} {unit} left"


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of the job in `folder`, None if it is not done."""
    return read_json(folder / RESULT) if (folder / RESULT).is_file() else None


def _ready(waiting: list[Job], outcome: Outcome, clock: _Clock) -> list[Job]:
    """The jobs that can begin, the longest first."""
    over = {*outcome.results, *outcome.troubles}
    ready = [job for job in waiting if all(need in over for need in job.needs)]
    return sorted(ready, key=lambda job: -clock.seconds[job.folder])


def _in_words(result: dict[str, Any] | None, trouble: str) -> str:
    if result is None:
        return f"not done: {trouble}"
    if "failed" in result:
        return f"failed: {result['failed']}"
    loss = f"loss {result['loss']:.4f}, " if "loss" in result else ""
    return f"{loss}{result['seconds']:,.0f} s"


def _here(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Do the job in this process; its result, or None and why there is none. Raises KeyboardInterrupt."""
    with (folder / _LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        code = one_job.main(folder)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return result_of(folder), f"see {folder / _LOG}"


class _Running:
    """A job's process."""

    def __init__(self, job: Job, folder: Path, spec: dict[str, Any], lock: int) -> None:
        self.job, self.folder = job, folder
        self._steps = spec["config"]["train"]["steps"] if "start_from" in spec else 0
        self._log: IO[bytes] = (folder / _LOG).open("ab")
        command = [sys.executable, "-m"]
        if self._steps and spec["processes"] > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(spec["processes"]), "-m"]
        settings = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # seconds to finish a step and write a checkpoint
        if spec["threads"] is not None:
            settings["OMP_NUM_THREADS"] = str(spec["threads"])
        # A session of its own: Ctrl-C in the terminal is for us, who pass it on. Its standard input is a pipe that ends
        # when we do.
        self._process = subprocess.Popen(
            [*command, "ttt_e2e.reproduce.job", str(folder)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            pass_fds=(lock,),
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def share(self) -> float:
        """How much of the job is done, from 0 to 1."""
        metrics = self.folder / RUN / METRICS
        if not self._steps or not metrics.is_file():
            return 0.0
        with metrics.open("rb") as handle:
            handle.seek(max(0, metrics.stat().st_size - 2048))
            lines = handle.read().split(b"\n")[:-1]
        try:
            return min(1.0, json.loads(lines[-1])["step"] / self._steps) if lines else 0.0
        except ValueError:
            return 0.0

    def stop(self, number: int) -> None:
        """Send the signal to the process and those that it started."""
        if not self.ended:
            os.killpg(self._process.pid, number)

    def close(self) -> tuple[dict[str, Any] | None, str]:
        """Wait for the end; the result, or None and why there is none."""
        code = self._process.wait()
        self._log.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        result = result_of(self.folder)
        if result is not None:
            return result, ""
        with (self.folder / _LOG).open("rb") as handle:
            handle.seek(max(0, (self.folder / _LOG).stat().st_size - 2048))
            lines = handle.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return None, f"{how}: {last} (all of it in {self.folder / _LOG})"


def _stopped(running: Mapping[str, _Running]) -> Mapping[str, _Running]:
    """Stop all processes: first so that they write checkpoints, and if Ctrl-C comes again, at once."""
    number = signal.SIGTERM
    while not all(process.ended for process in running.values()):
        try:
            for process in running.values():
                process.stop(number)
            while not all(process.ended for process in running.values()):
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            number = signal.SIGKILL
    return running
