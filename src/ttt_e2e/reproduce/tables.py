"""Tables in markdown."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ttt_e2e.model.cost import in_tokens

TIMES = {"prefill_us": "reading a text", "decode_us": "writing one token after it", "train_us": "training on it"}
"""What the times in a `timing.LatencyRow` are for."""


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:], ""]


def comparison_tables(report: dict[str, Any]) -> str:
    """The report that `report.build_report` makes."""
    systems, contexts = report["systems"], sorted({row["context"] for row in report["comparison"]})
    cells = {(row["system"], row["context"]): row for row in report["comparison"]}
    by_context = [in_tokens(context) for context in contexts]
    state = "Finished" if report["finished"] else "Not finished yet"
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    head = f"""# {report["name"]}, scale {report["plan"]["scale"]["name"]}

{state}; {report["hours"]:.2f} hours of work. Measured on: {facts}.

After ± comes the standard error over books, for differences paired by book; after "seeds" the one over seeds.
"""
    lines = [head]

    def add(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            lines.extend([f"## {title}", "", *markdown_table(columns, rows)])

    def add_losses(title: str, key: str, sign: str = "") -> None:
        rows = []
        for name, system in systems.items():
            values = [(cells.get((name, context)) or {}).get(key) for context in contexts]
            if any(values):
                parameters = f"{system['parameters'] / 1e6:,.2f} M" if system["parameters"] else ""
                rows.append([system["label"], parameters, *(_mean(value, sign) for value in values)])
        add(title, ["system", "parameters", *by_context], rows)

    add_losses(f"Loss minus that of {systems[report['baseline']]['label']}, by context", "difference", "+")
    add_losses("Loss by context, in nats per token", "loss")
    add_losses("Loss with frozen fast weights, and of the n-gram floor without its cache", "frozen_loss")
    if report["name"] == "warmstart":
        rows = []
        for name, system in systems.items():
            shares = [_share_of_gain(cells, name, context) for context in contexts]
            if system["parameters"] and set(shares) != {"-"}:
                rows.append([system["label"], *shares])
        title = "Share of the gain over the sliding window that TTT-E2E has when it is trained from the start"
        add(title, ["system", *by_context], rows)
    for positions in report["by_kind"]:
        rows = [
            [systems[row["system"]]["label"], *cells]
            for row, cells in zip(positions["rows"], position_cells(positions), strict=True)
        ]
        title = f"{positions['kind']}: loss by position in texts of {in_tokens(positions['context'])}, and how much"
        spans = [f"{in_tokens(start)} to {in_tokens(stop)}" for start, stop in pairwise(position_spans(positions))]
        add(f"{title} of the distance from the sliding window to full attention is closed", ["system", *spans], rows)
    rows = []
    for system in systems.values():
        if system["sweep"]:
            tried = [(row["lr"], row["loss"]) for row in system["sweep"]]
            rows.append([system["label"], *_tried(tried, system["lr"])])
    title = "Outer learning rates tried for a short while, with their training losses"
    add(title, ["system", "tried", "taken"], rows)
    rows = []
    for e in report["evaluations"]:
        if "inner_lr" in e:
            what = [systems[e["system"]]["label"], str(e["seed"]), in_tokens(e["context"])]
            rows.append([*what, *_tried(e["inner_lr_losses"], e["inner_lr"])])
    title = "Inner learning rates of models trained without meta-learning"
    add(title, ["system", "seed", "context", "losses on training text", "taken"], rows)
    lines += time_tables(report["latency"], systems)
    add("What went wrong", ["job", "why"], [[job, why.replace("|", "/")] for job, why in report["failed"].items()])
    return "\n".join(lines)


def time_tables(rows: Sequence[Mapping[str, Any]], systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a table for each kind of work in `rows`, see `timing.LatencyRow`; "label" of `systems` is shown."""
    contexts = sorted({row["context"] for row in rows})
    lines = []
    for key, title in TIMES.items():
        if any(row[key] is not None for row in rows):
            table = {row["system"]: [systems[row["system"]]["label"], *["-"] * len(contexts)] for row in rows}
            for row in rows:
                if row[key] is not None:
                    mark = "~" if key == "prefill_us" and not row["whole"] else ""
                    table[row["system"]][1 + contexts.index(row["context"])] = f"{mark}{row[key]:,.1f}"
            lines += [f"## Time for {title} (medians in microseconds per token)", ""]
            lines += markdown_table(["system", *map(in_tokens, contexts)], [*table.values()])
    if lines:
        lines += ["~: interpolated from segments of the text. -: does not fit into memory, or was not measured.", ""]
    return lines


def position_spans(positions: dict[str, Any]) -> list[int]:
    """Ends of the columns of a table by position: 0, 512, 1024, 2048, ..., the context; all of them ends of bins."""
    edges = positions["position_edges"]
    return [0, *(edge for edge in edges if edge >= 512 and edge & (edge - 1) == 0 and edge < edges[-1]), edges[-1]]


def position_cells(positions: dict[str, Any]) -> list[list[str]]:
    """The cells of a table by position, a list for each of its rows: loss, and share of the distance closed."""
    edges, spans = positions["position_edges"], position_spans(positions)
    losses: dict[str, list[float]] = {}
    for row in positions["rows"]:
        means = [one["loss"]["mean"] for one in row["bins"]]
        losses[row["system"]] = []
        for span in pairwise(spans):
            inside = [i for i, edge in enumerate(edges[:-1]) if span[0] <= edge < span[1]]
            total = sum(means[i] * (edges[i + 1] - edges[i]) for i in inside)
            losses[row["system"]].append(total / (span[1] - span[0]))
    window, full = losses.get("window"), losses.get("full")
    cells = []
    for system, values in losses.items():
        cells.append([f"{value:.4f}" for value in values])
        for i, value in enumerate(values):
            if window and full and system not in ("window", "full") and window[i] - full[i] > 0.005:
                cells[-1][i] += f" ({(window[i] - value) / (window[i] - full[i]):.0%})"
    return cells


def _mean(value: dict[str, Any] | None, sign: str) -> str:
    if value is None:
        return "-"
    books = "" if value["books_error"] is None else f" ± {value['books_error']:.4f}"
    seeds = "" if value["seeds_error"] is None else f" (seeds {value['seeds_error']:.4f})"
    return f"{value['mean']:{sign}.4f}{books}{seeds}"


def _tried(losses: Sequence[tuple[float, float | None]], best: float | None) -> tuple[str, str]:
    """The learning rates that were tried, with their losses, and the one that was taken."""
    tried = ", ".join(f"{lr:g}: {'diverged' if loss is None else format(loss, '.4f')}" for lr, loss in losses)
    at_edge = len(losses) > 1 and best in (losses[0][0], losses[-1][0])
    return tried, "-" if best is None else f"{best:g}{' (at the edge)' if at_edge else ''}"


def _share_of_gain(cells: Mapping[tuple[str, int], dict[str, Any]], name: str, context: int) -> str:
    """A warm start's share of the gain that TTT-E2E from the start has; "-" if that has none."""
    own, whole = ((cells.get((system, context)) or {}).get("difference") for system in (name, "ttt-on"))
    return "-" if not own or not whole or whole["mean"] >= 0 else f"{own['mean'] / whole['mean']:.0%}"
