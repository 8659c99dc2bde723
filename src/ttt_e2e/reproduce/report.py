"""What the finished jobs say, as JSON, as tables and as pictures; a part of them gives a part of the report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_e2e import __version__
from ttt_e2e.files import write_text
from ttt_e2e.hardware import machine
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.reproduce.plan import (
    Plan,
    best_sweep,
    estimates,
    first_stages,
    jobs,
    latency,
    sweep_rates,
    timed,
    trained,
)
from ttt_e2e.reproduce.statistics import Losses, Mean, difference, mean
from ttt_e2e.reproduce.systems import BASELINE, System
from ttt_e2e.reproduce.workers import result_of


def write(plan: Plan, out: Path, troubles: Mapping[str, str]) -> dict[str, Any]:
    """Write OUT/WHAT.json, OUT/WHAT.md, OUT/WHAT.png and OUT/WHAT-along.png from the results that stand in OUT.

    troubles: by job folder, why a job could not be done. Returns what the JSON file says.
    """
    from ttt_e2e.reproduce.plots import along, comparison  # matplotlib takes its time

    report = collect(plan, out, troubles)
    write_text(out / f"{plan.what}.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(out / f"{plan.what}.md", tables(report))
    if report["comparison"]:
        comparison(report, out / f"{plan.what}.png")
        along(report, out / f"{plan.what}-along.png")
    return report


def collect(plan: Plan, out: Path, troubles: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is known, as plain values.

    systems: label, colour, parameters, the sweep of each, those that others start from among them. evaluations: every
    finished one, book by book and by position. comparison: for each system and context the mean loss and its difference
    to the baseline. along: the same by position, at the longest context that the baseline has reached. latency: rows in
    microseconds per token. failed: what went wrong, by job.
    """
    all_jobs = jobs(plan)
    results = {job.folder: r for job in all_jobs if (r := result_of(out / job.folder)) is not None}
    evaluations = [
        {"system": job.system.name, "seed": job.seed, **results[job.folder]}
        for job in all_jobs
        if job.kind == "evaluate" and job.system is not None and "books" in results.get(job.folder, {})
    ]
    measured = result_of(out / latency(plan).folder) or {}
    failed = dict(troubles) | {f: r["failed"] for f, r in results.items() if "failed" in r}
    if "failed" in measured:
        failed[latency(plan).folder] = measured["failed"]
    spent = [result_of(out / job.folder) or {} for job in estimates(plan)]
    return {
        "what": plan.what,
        "baseline": BASELINE[plan.what],
        "version": __version__,
        "plan": _plan(out),
        "machine": machine(plan.device),
        "finished": len(results) == len(all_jobs) and not failed and (bool(measured) or not timed(plan)),
        "hours": sum(result["seconds"] for result in [*results.values(), measured, *spent] if result) / 3600,
        "systems": {
            system.name: _system(plan, system, results, evaluations) for system in (*first_stages(plan), *plan.systems)
        },
        "evaluations": evaluations,
        "comparison": _comparison(plan, evaluations),
        "along": _along(plan, evaluations),
        "latency": measured.get("rows", []),
        "failed": failed,
    }


def _plan(out: Path) -> dict[str, Any]:
    """The plan; where its tokens lie is this machine's affair."""
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    for key in ("data", "books"):
        plan[key] = {"digest": plan[key]["digest"]}
    return plan


def _system(
    plan: Plan, system: System, results: Mapping[str, Any], evaluations: list[dict[str, Any]]
) -> dict[str, Any]:
    own = trained(system)
    swept = []
    for folder, lr in sweep_rates(plan.scale, own, results).items() if own.rate_of is None else ():
        result = results.get(folder)
        if result is not None:
            swept.append({"lr": lr, "loss": result.get("loss"), "failed": result.get("failed")})
    best = best_sweep(plan.scale, own, results)
    done = [row["loss"] for row in swept]
    parameters = [e["parameters"] for e in evaluations if e["system"] == system.name]
    return {
        "label": system.label,
        "colour": system.colour,
        "parameters": parameters[0] if parameters else None,
        "trained_as": system.trained_as,
        "sweep": swept,
        "rate_of": own.rate_of,
        "lr": best,
        "lr_at_edge": len(done) > 1 and best in (swept[0]["lr"], swept[-1]["lr"]),
    }


def _losses(evaluations: list[dict[str, Any]], system: str, context: int, key: str = "books") -> Losses:
    return {
        e["seed"]: {book["name"]: book["loss"] for book in e[key]}
        for e in evaluations
        if e["system"] == system and e["context"] == context and key in e
    }


def _comparison(plan: Plan, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for system in plan.systems:
        for context in plan.contexts:
            ours = _losses(evaluations, system.name, context)
            theirs = _losses(evaluations, BASELINE[plan.what], context)
            if ours:
                frozen = mean(_losses(evaluations, system.name, context, "frozen"))
                rows.append(
                    {
                        "system": system.name,
                        "context": context,
                        "loss": _plain(mean(ours)),
                        "difference": _plain(difference(ours, theirs)),
                        "frozen_loss": _plain(frozen),
                    }
                )
    return rows


def _along(plan: Plan, evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Loss by position at the longest context that the baseline has reached, of every system that has, too."""
    baseline = BASELINE[plan.what]
    contexts = [e["context"] for e in evaluations if e["system"] == baseline]
    if not contexts:
        return None
    some = [e for e in evaluations if e["context"] == max(contexts)]
    edges = some[0]["position_edges"]
    rows = []
    for system in plan.systems:
        by_bin = []
        for i in range(len(edges) - 1):
            ours, theirs = (
                {
                    e["seed"]: {b["name"]: b["by_position"][i] for b in e["books"] if b["by_position"][i] is not None}
                    for e in some
                    if e["system"] == name
                }
                for name in (system.name, baseline)
            )
            by_bin.append({"loss": _plain(mean(ours)), "difference": _plain(difference(ours, theirs))})
        if by_bin[0]["loss"] is not None:
            rows.append({"system": system.name, "bins": by_bin})
    return {"context": max(contexts), "position_edges": edges, "rows": rows}


def _plain(value: Mean | None) -> dict[str, Any] | None:
    return None if value is None else value._asdict()


# -- tables ------------------------------------------------------------------------------------------------------------


def _time(row: dict[str, Any], figure: str) -> str:
    mark = "~" if figure == "prefill_us" and not row.get("whole", True) else ""
    return "-" if row[figure] is None else f"{mark}{row[figure]:,.1f}"


def tables(report: dict[str, Any]) -> str:
    """The report as markdown."""
    systems, contexts = report["systems"], sorted({row["context"] for row in report["comparison"]})
    cells = {(row["system"], row["context"]): row for row in report["comparison"]}
    baseline = systems[report["baseline"]]["label"]
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    state = "All of it is done." if report["finished"] else "Not all of it is done yet."
    scale = report["plan"]["scale"]["name"]
    lines = [
        f"# {report['what']}, scale {scale}",
        "",
        f"{state} {report['hours']:.2f} hours of work. Measured on: {facts}.",
        "",
    ]

    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        if rows:
            lines.extend([f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"])
            lines.extend(f"| {' | '.join(row)} |" for row in rows)
            lines.append("")

    def by_context(title: str, key: str, form: str) -> None:
        rows = []
        for name, system in systems.items():
            values = [(cells.get((name, context)) or {}).get(key) for context in contexts]
            if any(values):
                parameters = f"{system['parameters'] / 1e6:,.2f} M" if system["parameters"] else ""
                rows.append([system["label"], parameters, *(_cell(value, form) for value in values)])
        table(title, ["system", "parameters", *map(in_tokens, contexts)], rows)

    by_context(f"Loss minus that of {baseline}, by context", "difference", "+.4f")
    by_context("Loss by context, nats per token", "loss", ".4f")
    by_context("Loss of the same weights with nothing learned while reading", "frozen_loss", ".4f")
    if report["what"] == "warmstart":
        rows = []
        for name, system in systems.items():
            shares = [_share(cells, name, context) for context in contexts]
            if any(share is not None for share in shares):
                rows.append([system["label"], *("-" if share is None else f"{share:.0%}" for share in shares)])
        title = "Share of the gain over the sliding window that TTT-E2E from the start has"
        table(title, ["system", *map(in_tokens, contexts)], rows)
    lines += [
        "After ± stands the standard error over books, in a difference paired by book; after seeds the one over seeds.",
        "",
    ]
    swept = [
        [
            system["label"],
            ", ".join(
                f"{row['lr']:g}: {'diverged' if row['loss'] is None else format(row['loss'], '.4f')}"
                for row in system["sweep"]
            ),
            "-" if system["lr"] is None else f"{system['lr']:g}{_edge(system['lr_at_edge'])}",
        ]
        for system in systems.values()
        if system["sweep"]
    ]
    table("Learning rates tried for a short while, with their training losses", ["system", "tried", "taken"], swept)
    chosen = [
        [
            systems[e["system"]]["label"],
            str(e["seed"]),
            in_tokens(e["context"]),
            ", ".join(f"{lr:g}: {'diverged' if v is None else format(v, '.4f')}" for lr, v in e["inner_lr_losses"]),
            f"{e['inner_lr']:g}{_edge(e['inner_lr'] in (e['inner_lr_losses'][0][0], e['inner_lr_losses'][-1][0]))}",
        ]
        for e in report["evaluations"]
        if "inner_lr" in e
    ]
    columns = ["system", "seed", "context", "losses on training text", "taken"]
    table("Inner learning rates of what was trained without meta-learning", columns, chosen)
    times = [
        [
            systems[row["system"]]["label"],
            in_tokens(row["context"]),
            *(_time(row, figure) for figure in ("prefill_us", "decode_us")),
        ]
        for row in report["latency"]
        if row["system"] in systems
    ]
    table(
        "Microseconds per token (~: interpolated from stretches of the text)",
        ["system", "context", "prefill", "decode"],
        times,
    )
    table("What went wrong", ["job", "why"], [[job, why.replace("|", "/")] for job, why in report["failed"].items()])
    return "\n".join(lines)


def _share(cells: Mapping[tuple[str, int], dict[str, Any]], name: str, context: int) -> float | None:
    """What a warm start has of the gain of TTT-E2E from the start; None where there is no such gain."""
    own, whole = ((cells.get((n, context)) or {}).get("difference") for n in (name, "ttt-on"))
    return None if not own or not whole or whole["mean"] >= 0 else own["mean"] / whole["mean"]


def _edge(there: bool) -> str:
    """Says that a value further on was not tried."""
    return " (at the edge)" if there else ""


def _cell(value: dict[str, Any] | None, form: str) -> str:
    if value is None:
        return "-"
    text = format(value["mean"], form)
    if value["books_error"] is not None:
        text += f" ± {value['books_error']:.4f}"
    if value["seeds_error"] is not None:
        text += f" (seeds {value['seeds_error']:.4f})"
    return text
