"""The report of a comparison: all numbers of the jobs that are done, as JSON, as tables and as pictures."""

import json
import statistics
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from ttt_e2e import __version__
from ttt_e2e.evaluation.documents import standard_error
from ttt_e2e.files import write_text
from ttt_e2e.hardware import machine
from ttt_e2e.reproduce import tables
from ttt_e2e.reproduce.plan import Comparison, best_rate, latency_jobs, read_plan, sweep_rates, training_jobs
from ttt_e2e.reproduce.scales import Scale
from ttt_e2e.reproduce.systems import BASELINE, System
from ttt_e2e.reproduce.workers import results_of

Losses = Mapping[int, Mapping[str, float]]
"""Mean losses by seed and by book."""


def write_report(comparison: Comparison, out: Path, problems: Mapping[str, str], *, pictures: bool = True) -> None:
    """Write NAME.json, NAME.md, NAME.png and NAME-by-position.png into `out`, from the results that it has so far.

    problems: by job, why it could not be done. pictures: whether to draw them, which takes longer than the rest.
    """
    name = comparison.name
    report = build_report(comparison, out, problems)
    write_text(out / f"{name}.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(out / f"{name}.md", tables.comparison_tables(report))
    if not pictures:
        return
    from ttt_e2e.reproduce import plots  # matplotlib is slow to import

    if report["comparison"]:
        plots.plot_comparison(report, out / f"{name}.png")
    if report["by_position"]:
        plots.plot_by_position(report, report["by_position"], out / f"{name}-by-position.png")
    for positions in report["by_kind"]:
        picture = out / f"{name}-{positions['kind']}-{positions['context']}.png"
        plots.plot_by_position(report, positions, picture, f"{positions['kind']}: loss")


def build_report(comparison: Comparison, out: Path, problems: Mapping[str, str]) -> dict[str, Any]:
    """All that is known, as plain values.

    "plan" is plan.json. "finished", "hours": whether all jobs are done, and the time that they took together.
    "systems": by name the label, parameters and sweep of each system, first stages among them. "evaluations": the
    results of all evaluation jobs. "comparison": for each system and context the mean loss, also with frozen fast
    weights, and the difference from the baseline. "by_position": the same by position in the sequence, at the longest
    context of the baseline. "by_kind": the same of a pretrained model at every context, by kind of text, which is the
    folder that the texts were prepared from. "latency": microseconds per token. "failed": by job, what went wrong.
    """
    jobs = [*training_jobs(comparison), *latency_jobs(comparison)]
    starts = [(system.weights_from or system).starts_from for system in comparison.systems]
    systems = [*dict.fromkeys(start for start in starts if start is not None), *comparison.systems, comparison.floor]
    results = results_of(jobs, out)
    evaluations = [
        {"system": job.system.name, "seed": job.seed, **results[job.folder]}
        for job in jobs
        if job.system is not None and "books" in results.get(job.folder, {})
    ]
    failed = dict(problems) | {folder: result["failed"] for folder, result in results.items() if "failed" in result}
    return {
        "name": comparison.name,
        "baseline": BASELINE[comparison.name],
        "version": __version__,
        "plan": read_plan(out),
        "machine": machine(comparison.device),
        "finished": len(results) == len(jobs) and not failed,
        "hours": sum(result["seconds"] for result in results.values()) / 3600,
        "systems": {system.name: _system(comparison.scale, system, results, evaluations) for system in systems},
        "evaluations": evaluations,
        "comparison": _comparison(comparison, evaluations),
        "by_position": _by_position(comparison, evaluations),
        "by_kind": _by_kind(comparison, evaluations) if comparison.name == "pretrained" else [],
        "latency": [row for result in results.values() for row in result.get("rows", [])],
        "failed": failed,
    }


def _system(
    scale: Scale, system: System, results: Mapping[str, Any], evaluations: list[dict[str, Any]]
) -> dict[str, Any]:
    trained = system.weights_from or system
    rates = {} if trained.lr_from is not None else sweep_rates(scale, trained, results)
    tried = [(lr, results[folder]) for folder, lr in rates.items() if folder in results]
    sweep = [{"lr": lr, "loss": result.get("loss"), "failed": result.get("failed")} for lr, result in tried]
    best = best_rate(scale, trained, results)
    return {
        "label": system.label,
        "colour": system.colour,
        "parameters": next((e["parameters"] for e in evaluations if e["system"] == system.name), None),
        "weights_from": None if system.weights_from is None else system.weights_from.name,
        "sweep": sweep,
        "lr_from": None if trained.lr_from is None else trained.lr_from.name,
        "lr": best,
        "lr_at_edge": len(sweep) > 1 and best in (sweep[0]["lr"], sweep[-1]["lr"]),
    }


def _losses(evaluations: list[dict[str, Any]], system: str, context: int, key: str = "books") -> Losses:
    return {
        e["seed"]: {book["name"]: book["loss"] for book in e[key]}
        for e in evaluations
        if e["system"] == system and e["context"] == context and key in e
    }


def _comparison(comparison: Comparison, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for system in (*comparison.systems, comparison.floor):
        for context in comparison.contexts:
            losses = _losses(evaluations, system.name, context)
            if losses:
                baseline = _losses(evaluations, BASELINE[comparison.name], context)
                row: dict[str, Any] = {"system": system.name, "context": context, "loss": mean(losses)}
                row["difference"] = difference(losses, baseline)
                row["frozen_loss"] = mean(_losses(evaluations, system.name, context, "frozen"))
                rows.append(row)
    return rows


def _by_position(comparison: Comparison, evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The loss in each bin of positions, of all systems evaluated at the baseline's longest context."""
    baseline = BASELINE[comparison.name]
    context = max((e["context"] for e in evaluations if e["system"] == baseline), default=None)
    return None if context is None else _positions(comparison, [e for e in evaluations if e["context"] == context])


def _by_kind(comparison: Comparison, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loss in each bin of positions, for each kind of text and each context."""
    kinds = sorted({_kind(book["name"]) for e in evaluations for book in e["books"]})
    found = []
    for kind, context in product(kinds, comparison.contexts):
        some = [e for e in evaluations if e["context"] == context]
        some = [e | {"books": [book for book in e["books"] if _kind(book["name"]) == kind]} for e in some]
        if some:
            found.append({"kind": kind, **_positions(comparison, some)})
    return found


def _kind(name: str) -> str:
    """The folder of the file that a document comes from."""
    return Path(name.partition(" ")[2]).parent.name


def _positions(comparison: Comparison, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss in each bin of positions, of evaluations at one context."""
    baseline, edges = BASELINE[comparison.name], evaluations[0]["position_edges"]

    def losses_in_bin(system: str, i: int) -> Losses:
        return {
            e["seed"]: {b["name"]: b["by_position"][i] for b in e["books"] if b["by_position"][i] is not None}
            for e in evaluations
            if e["system"] == system
        }

    rows = []
    for system in (*comparison.systems, comparison.floor):
        by_bin = [(losses_in_bin(system.name, i), losses_in_bin(baseline, i)) for i in range(len(edges) - 1)]
        bins = [{"loss": mean(losses), "difference": difference(losses, base)} for losses, base in by_bin]
        if bins[0]["loss"] is not None:
            rows.append({"system": system.name, "bins": bins})
    return {"context": evaluations[0]["context"], "position_edges": edges, "rows": rows}


def mean(losses: Losses) -> dict[str, Any] | None:
    """The mean over seeds of the means over books; None if there are none. Every seed has the same books.

    "books_error": standard error over books, each book's value being its mean over seeds. "seeds_error": over seeds.
    An error over fewer than two values is None.
    """
    if not losses:
        return None
    by_seed = [statistics.fmean(books.values()) for books in losses.values()]
    by_book = [statistics.fmean(values) for values in zip(*(books.values() for books in losses.values()), strict=True)]
    errors = {"books_error": standard_error(by_book), "seeds_error": standard_error(by_seed)}
    return {"mean": statistics.fmean(by_seed), **errors, "books": len(by_book), "seeds": len(by_seed)}


def difference(losses: Losses, baseline: Losses) -> dict[str, Any] | None:
    """The mean of `losses` minus `baseline`, paired by book and by seed; None if they have no seed in common."""
    return mean(
        {
            seed: {name: loss - baseline[seed][name] for name, loss in books.items()}
            for seed, books in losses.items()
            if seed in baseline
        }
    )
