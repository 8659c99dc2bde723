"""Runs jobs as processes, several at a time: a job that is done is never done again, an interrupted one continues.

The processes inherit the lock on the folder and end with this process, so that even after a `kill -9` nothing runs on
unnoticed: a second call waits until the last of them is gone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.files import check_digest, read_json, write_text
from ttt_e2e.progress import ProgressBar
from ttt_e2e.reproduce import job as job_process
from ttt_e2e.reproduce.plan import JOB, LOG, RESULT, Job

_POLL_SECONDS = 0.05


@dataclass
class Outcome:
    """How a call of `run` ended."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by job; one may say that it "failed"
    problems: dict[str, str] = field(default_factory=dict)  # by job, why it could not be done this time
    interrupted: bool = False  # by Ctrl-C


def run(
    jobs: list[Job],
    out: Path,
    settings: Callable[[Job, Mapping[str, dict[str, Any]]], dict[str, Any]],
    *,
    lock: int,
    num_workers: int,
    on_result: Callable[[Job], None],
    progress: bool = True,
) -> Outcome:
    """Do all `jobs` that have no result yet. Ctrl-C makes them write checkpoints and stop; a second one kills them.

    Args:
        jobs: Each after those that it needs.
        out: The folder that the jobs' folders are in.
        settings: Makes the content of a job's job.json from the results so far, once all that the job needs has ended.
            Its UserError says why the job cannot be done.
        lock: File descriptor of the lock on `out`, which the processes inherit.
        num_workers: Jobs at a time. With 0 they run one after the other in this process.
        on_result: Called after every new result.
        progress: Whether to show a progress bar on a terminal.
    """
    outcome = Outcome(results_of(jobs, out))
    waiting = [job for job in jobs if job.folder not in outcome.results]
    running: dict[Job, subprocess.Popen] = {}
    hide_bar = None if progress and waiting else True  # None: shown on a terminal only
    with ProgressBar(total=len(jobs), initial=len(outcome.results), unit="job", disable=hide_bar, leave=False) as bar:

        def record(job: Job, problem: str) -> None:
            """Note a job's result or, if it has none, the problem."""
            result = results_of([job], out).get(job.folder)
            if result is None:
                outcome.problems[job.folder] = problem
                news = f"not done: {problem}"
            else:
                outcome.results[job.folder] = result
                loss = f"loss {result['loss']:.4f}, " if "loss" in result else ""
                news = f"failed: {result['failed']}" if "failed" in result else f"{loss}{result['seconds']:,.0f} s"
            bar.update()
            count = len(outcome.results) + len(outcome.problems)
            tqdm.write(f"{count} of {len(jobs)}  {job.folder}  {news}", file=sys.stdout)
            sys.stdout.flush()
            if result is not None:
                on_result(job)

        try:
            while waiting or running:
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    record(job, _finish(out / job.folder, running.pop(job)))
                ended = {*outcome.results, *outcome.problems}
                ready = [job for job in waiting if ended.issuperset(job.needs)]
                for job in ready[: max(1, num_workers) - len(running)]:
                    waiting.remove(job)
                    try:
                        content = settings(job, outcome.results)
                    except UserError as error:
                        record(job, str(error))
                        continue
                    write_text(out / job.folder / JOB, json.dumps(content, indent=1) + "\n")
                    if num_workers:
                        running[job] = _start(out / job.folder, content, lock)
                    else:
                        log = out / job.folder / LOG
                        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
                            code = job_process.main(log.parent)
                        if code == INTERRUPTED:
                            raise KeyboardInterrupt
                        record(job, f"see {log}")
                bar.set_postfix_str(" ".join(job.folder for job in running))
                time.sleep(_POLL_SECONDS if running else 0)
        except KeyboardInterrupt:
            outcome.interrupted = True
            tqdm.write("Stopping: the jobs that are running write their checkpoints.", file=sys.stderr)
            _stop(running.values())
            outcome.results |= results_of(running, out)
        except BaseException:
            _stop(running.values())
            raise
    return outcome


def results_of(jobs: Iterable[Job], out: Path) -> dict[str, dict[str, Any]]:
    """The results of those `jobs` that are done, by job folder. Raises UserError if one was altered."""
    results = {}
    for job in jobs:
        if (path := out / job.folder / RESULT).is_file():
            result = read_json(path)
            check_digest(result, path)
            del result["sha256"]
            results[job.folder] = result
    return results


def _start(folder: Path, settings: Mapping[str, Any], lock: int) -> subprocess.Popen:
    """The process that does the job in `folder`; under torchrun, several."""
    command = [sys.executable, "-m"]
    if settings.get("processes", 1) > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(settings["processes"]), "-m"]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # seconds to finish a step and write a checkpoint
    if settings["threads"] is not None:
        environment["OMP_NUM_THREADS"] = str(settings["threads"])
    with (folder / LOG).open("ab") as log:
        # A session of its own: Ctrl-C in the terminal is for this process, which passes it on. The job's standard input
        # is a pipe that closes when this process ends.
        return subprocess.Popen(
            [*command, "ttt_e2e.reproduce.job", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            pass_fds=(lock,),
            start_new_session=True,
        )


def _finish(folder: Path, process: subprocess.Popen) -> str:
    """How the process of a job has ended, and the last that it printed."""
    process.communicate()
    log = folder / LOG
    lines = log.read_text(errors="replace").strip().splitlines()
    how = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return f"{how}: {lines[-1] if lines else 'it printed nothing'} (see {log})"


def _stop(processes: Collection[subprocess.Popen]) -> None:
    """Stop all processes and wait for their ends: gently at first, and at once after another Ctrl-C."""
    number = signal.SIGTERM
    while any(process.poll() is None for process in processes):
        try:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            while any(process.poll() is None for process in processes):
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            number = signal.SIGKILL
    for process in processes:
        process.communicate()
