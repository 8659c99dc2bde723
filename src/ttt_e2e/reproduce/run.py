"""`ttt-e2e reproduce figure1`, `ablations` and `warmstart`: from prepared tokens to tables and pictures."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import in_bytes, in_tokens
from ttt_e2e.reproduce import report, workers
from ttt_e2e.reproduce.evaluate import books as cut_books
from ttt_e2e.reproduce.plan import Job, Plan, estimates, jobs, keep, latency, specification, timed
from ttt_e2e.reproduce.scales import Scale
from ttt_e2e.reproduce.systems import choose
from ttt_e2e.training.parallelize import choose_device


def reproduce(
    what: str,
    scale: Scale,
    out: Path,
    *,
    data: Path | None = None,
    books: Path | None = None,
    systems: list[str] | None = None,
    seeds: list[int] | None = None,
    contexts: list[int] | None = None,
    worker_count: int | None = None,
    compile: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: bool = True,
) -> workers.Outcome:
    """Make the comparison `what`, a key of `systems.BASELINE`, at a scale, in the folder `out` that `plan` describes.

    What is done there already, by another comparison too, is not done again, and what was interrupted goes on. data:
    prepared tokens (default: Python's library, prepared in OUT/tokens). books: those to train on for longer contexts
    and to evaluate on (default: `data`). systems, seeds, contexts: only these (default: all; seed 0). worker_count:
    jobs at a time (default: one a core, on a GPU one; 0: in this process, one after the other). compile: train
    compiled; it may differ from call to call. dry_run: only say what would be done. Raises UserError for what does not
    fit.
    """
    if worker_count is not None and worker_count < 0:
        raise UserError(f"--workers must not be negative, it is {worker_count}.")
    with workers.locked(out) as lock:
        plan = _plan(what, scale, out, data, books, systems, seeds, contexts, device, compile, progress)
        whole = keep(plan, out)
        count = worker_count
        if count is None:
            count = 1 if plan.device == "cuda" else os.cpu_count() or 1

        def told(job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
            return specification(plan, job, out, results)

        print(f"{scale.needs}\nMeasuring how fast every system is here.")
        measured = workers.run(estimates(plan), out, told, lock=lock, workers=count, progress=progress)
        if measured.interrupted:
            return _stopped(measured, out)
        todo = jobs(plan)
        seconds = _expected(todo, measured.results)
        print(_described(plan, todo, seconds, count, measured, out))
        if dry_run:
            return measured

        # The report has all that this folder knows, also of systems that this call leaves alone.
        union = dataclasses.replace(
            plan,
            systems=choose(what, scale, whole["systems"]),
            seeds=tuple(whole["seeds"]),
            contexts=tuple(sorted(whole["contexts"])),
        )

        def tell(job: Job, result: dict[str, Any]) -> None:
            if job.kind == "evaluate":
                report.write(union, out, {})

        outcome = workers.run(
            todo,
            out,
            told,
            lock=lock,
            workers=count,
            seconds=seconds,
            done=tell,
            progress=progress,
        )
        if timed(union) and not outcome.interrupted:
            # Alone: other work would be in its way. Of all systems, so that they can be compared.
            timing = workers.run(
                [latency(union)],
                out,
                lambda job, _: specification(union, job, out, {}),
                lock=lock,
                workers=min(count, 1),
                progress=progress,
            )
            outcome.interrupted = timing.interrupted
            outcome.results |= timing.results
            outcome.troubles |= timing.troubles
        report.write(union, out, outcome.troubles)
        if outcome.interrupted:
            return _stopped(outcome, out)
        print(f"{out / what}.md, {out / what}.png, {out / what}-along.png; all numbers in {out / what}.json")
        return outcome


def _plan(
    what: str,
    scale: Scale,
    out: Path,
    data: Path | None,
    books: Path | None,
    systems: list[str] | None,
    seeds: list[int] | None,
    contexts: list[int] | None,
    device: str,
    compile: bool,
    progress: bool,
) -> Plan:
    chosen = choose(what, scale, systems)
    for context in contexts or []:
        if context not in scale.contexts:
            known = ", ".join(map(in_tokens, scale.contexts))
            raise UserError(f"Scale {scale.name} has no context of {in_tokens(context)}; it has {known}.")
    if any(seed < 0 for seed in seeds or []):
        raise UserError("A seed must not be negative.")
    place = choose_device(device).type
    if scale.processes > 1 and place == "cpu":
        raise UserError(f"Scale {scale.name} does not run here. {scale.needs}")
    if data is None:
        data = out / "tokens"
        prepare(None, data, vocab_size=scale.vocab_size, val_share=scale.val_share, progress=progress)
    books = data if books is None else books
    first, held = TokenSet.open(data, "train"), TokenSet.open(books, "val")
    first.check_vocabulary(scale.vocab_size)
    held.check_vocabulary(scale.vocab_size)
    more = TokenSet.open(books, "train")
    read = cut_books(held, max(scale.contexts), scale.eval_tokens)
    return Plan(
        what,
        scale,
        chosen,
        tuple(seeds or [0]),
        tuple(sorted(contexts or scale.contexts)),
        data,
        books,
        first.digest,
        held.digest,
        more.digest,
        place,
        sum(len(book.tokens) - 1 for book in read),
        compile,
    )


def _expected(todo: list[Job], measured: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds that each job should take, from the speeds at the shortest context and the longest.

    A token's cost is a constant and, for full attention, a share that grows with the context.
    """
    seconds = {}
    for job in todo:
        assert job.system is not None
        speeds = measured.get(f"estimate/{job.system.name}", {}).get("speeds")
        if speeds:
            key = "read" if job.kind == "evaluate" else "train"
            (x0, y0), (x1, y1) = ((speed["context"], speed[key]) for speed in speeds)
            slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
            per_token = max(min(y0, y1), y0 + slope * (job.context - x0))
            seconds[job.folder] = workers.START_SECONDS + job.tokens * per_token
    return seconds


def _described(
    plan: Plan, todo: list[Job], seconds: Mapping[str, float], count: int, measured: workers.Outcome, out: Path
) -> str:
    """What will be done, for people."""
    contexts = ", ".join(map(in_tokens, plan.contexts))
    lines = [
        f"\n{plan.what} at scale {plan.scale.name}: {', '.join(system.name for system in plan.systems)}",
        f"seeds {', '.join(map(str, plan.seeds))}; contexts {contexts}; {plan.book_tokens:,} tokens of held-out books",
        "",
        f"{'':<30}{'jobs':>6}{'done':>6}{'tokens':>20}{'hours of one worker':>22}",
    ]
    left = 0.0
    for kind, words in (
        ("sweep", "learning rates tried"),
        ("pretrain", "pre-training"),
        ("extend", "training on, by context"),
        ("evaluate", "evaluation on books"),
    ):
        some = [job for job in todo if job.kind == kind]
        missing = [job for job in some if workers.result_of(out / job.folder) is None]
        hours = sum(seconds.get(job.folder, 0.0) for job in missing) / 3600
        left += hours
        tokens = sum(job.tokens for job in some)
        lines.append(f"{words:<30}{len(some):>6}{len(some) - len(missing):>6}{tokens:>20,}{hours:>22.2f}")
    memory = sorted((result.get("bytes", 0) for result in measured.results.values()), reverse=True)[: max(1, count)]
    lines += [
        "",
        f"To do: about {left / max(1, count):.1f} hours with {max(1, count)} at a time on {plan.device}, and up to "
        f"{in_bytes(sum(memory))} of memory.{' (Then the latency of all systems, in a few minutes.)' * timed(plan)}",
    ]
    unknown = [f"{folder}: {why}" for folder, why in measured.troubles.items()]
    unknown += [f"{folder}: {result['failed']}" for folder, result in measured.results.items() if "failed" in result]
    return "\n".join([*lines, *(f"Not measured, and not in these figures: {line}" for line in unknown)])


def _stopped(outcome: workers.Outcome, out: Path) -> workers.Outcome:
    outcome.interrupted = True
    print(f"Stopped; nothing that is done is lost: the same command goes on in {out}.", file=sys.stderr)
    return outcome
