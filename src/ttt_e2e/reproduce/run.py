"""`ttt-e2e reproduce figure1`, `ablations`, `warmstart`, `pretrained`: from prepared tokens to tables and pictures."""

import dataclasses
import os
import sys
import time
from pathlib import Path

from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_folder
from ttt_e2e.hardware import choose_device
from ttt_e2e.model.checkpoint import load_transformer, model_digest, stored_digest
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.reproduce import report, workers
from ttt_e2e.reproduce.held_out import held_out_books
from ttt_e2e.reproduce.plan import Comparison, Job, job_settings, latency_jobs, training_jobs, write_plan
from ttt_e2e.reproduce.scales import Scale
from ttt_e2e.reproduce.systems import choose

LOCK_SECONDS = 60.0
PICTURE_SECONDS = 60.0  # between two drawings of the pictures while jobs are done


def reproduce(
    name: str,
    scale: Scale,
    out: Path,
    *,
    data: Path | None = None,
    books: Path | None = None,
    systems: list[str] | None = None,
    seeds: list[int] | None = None,
    contexts: list[int] | None = None,
    num_workers: int | None = None,
    compile: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: bool = True,
) -> workers.Outcome:
    """Make a comparison in the folder `out`, see `plan`: do the jobs that are missing there, and write the report.

    Args:
        name: A key of `systems.BASELINE`.
        scale: The numbers of the comparison.
        out: The folder. Another comparison at the same scale may be in it too.
        data: Prepared tokens to train on. None: those of Python's library, prepared in OUT/tokens.
        books: Prepared tokens to train on for longer contexts, and to evaluate on. None: `data`.
        systems: Names of the systems. None: the default ones.
        seeds: Every training is done once with each. None: 0.
        contexts: Some of the scale's. None: all.
        num_workers: Jobs at a time. None: one per CPU core, or one on a GPU. 0: one after the other in this process.
        compile: Whether to train compiled.
        device: "auto", "cpu" or "cuda".
        dry_run: Only print the plan.
        progress: Whether to show progress bars.

    Raises:
        UserError: For unknown names, data that does not fit the scale, or a folder of another comparison.
    """
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--workers must not be negative, it is {num_workers}.")
    for context in contexts or []:
        if context not in scale.contexts:
            known = ", ".join(map(in_tokens, scale.contexts))
            raise UserError(f"Scale {scale.name} has no context of {in_tokens(context)}; it has {known}.")
    if any(seed < 0 for seed in seeds or []):
        raise UserError("A seed must not be negative.")
    chosen, device = choose(name, scale, systems), choose_device(device).type
    if scale.processes > 1 and device == "cpu":
        raise UserError(f"Scale {scale.name} does not run on a CPU. {scale.requirements}")
    out.mkdir(parents=True, exist_ok=True)
    in_use = f"Another `ttt-e2e reproduce` is using {out}; wait until it has ended."
    with lock_folder(out, in_use, LOCK_SECONDS) as lock:
        if data is None:
            assert scale.start_from is None, "the tokens must be those of the model's tokenizer"
            data = out / "tokens"
            prepare(None, data, vocab_size=scale.vocab_size, val_share=scale.val_share, progress=progress)
        books = data if books is None else books
        tokens = {"data": TokenSet.open(data, "train")}
        tokens |= {f"books_{split}": TokenSet.open(books, split) for split in ("train", "val")}
        for some in tokens.values():
            some.check_vocabulary(scale.vocab_size)
        read = held_out_books(tokens["books_val"], max(scale.contexts), scale.eval_tokens)
        comparison = Comparison(
            name=name,
            scale=scale,
            systems=chosen,
            seeds=tuple(seeds or [0]),
            contexts=tuple(sorted(contexts or scale.contexts)),
            data=data,
            books=books,
            digests={key: some.digest for key, some in tokens.items()} | _start_digest(scale),
            device=device,
            book_tokens=sum(len(book.tokens) - 1 for book in read),
            compile=compile,
        )
        named = write_plan(comparison, out)
        # The report covers all that the folder has of this comparison, also what this call does not name.
        whole = dataclasses.replace(
            comparison,
            systems=choose(name, scale, named["systems"]),
            seeds=tuple(named["seeds"]),
            contexts=tuple(sorted(named["contexts"])),
        )
        jobs = training_jobs(comparison)
        jobs += latency_jobs(whole, needs=tuple(job.folder for job in jobs))
        print(f"{name} at scale {scale.name}: {', '.join(system.name for system in chosen)}")
        print(
            f"Seeds {', '.join(map(str, comparison.seeds))}; "
            f"contexts {', '.join(map(in_tokens, comparison.contexts))}; "
            f"{comparison.book_tokens:,} tokens of held-out books. {scale.requirements}"
        )
        print(f"\n{'jobs':<12}{'all':>6}{'done':>6}{'tokens':>20}")
        for kind in dict.fromkeys(job.kind for job in jobs):
            alike = [job for job in jobs if job.kind == kind]
            done = len(workers.results_of(alike, out))
            print(f"{kind:<12}{len(alike):>6}{done:>6}{sum(job.tokens for job in alike):>20,}")
        if dry_run:
            return workers.Outcome()

        drawn = time.monotonic()

        def on_result(job: Job) -> None:
            nonlocal drawn
            if job.kind in ("evaluate", "ngram"):
                pictures = time.monotonic() - drawn >= PICTURE_SECONDS
                report.write_report(whole, out, {}, pictures=pictures)
                drawn = time.monotonic() if pictures else drawn

        if num_workers is None:
            num_workers = 1 if device == "cuda" else os.cpu_count() or 1
        outcome = workers.run(
            jobs,
            out,
            lambda job, results: job_settings(whole, job, out, results),
            lock=lock.fileno(),
            num_workers=num_workers,
            on_result=on_result,
            progress=progress,
        )
        report.write_report(whole, out, outcome.problems)
    if outcome.interrupted:
        print(f"Stopped. Nothing that is done is lost: repeat the command to continue in {out}.", file=sys.stderr)
    else:
        print(f"The report is {out / name}.md, with pictures and all numbers ({name}.json) beside it.")
    return outcome


def _start_digest(scale: Scale) -> dict[str, str]:
    """The digest of the model that all systems start from, if there is one."""
    start = scale.start_from
    # A file that names none is no model of ours, as loading it says.
    return {} if start is None else {"start_from": stored_digest(start) or model_digest(load_transformer(start))}
