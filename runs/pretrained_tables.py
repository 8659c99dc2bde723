"""The tables and pictures of results/README.md on SmolLM2-135M, from the losses in results/pretrained/.

    python runs/pretrained_tables.py

It prints a table for the books and one for the code, and draws results/pretrained/books.png and code.png. Errors are
standard errors over texts, of paired differences where two rows are compared.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ttt_e2e.reproduce.plots import plot_by_position

FOLDER = Path(__file__).resolve().parents[1] / "results" / "pretrained"
SPANS = (("to 512", 0, 512), ("512-1K", 512, 1024), ("1K-2K", 1024, 2048), ("2K-4K", 2048, 4096), ("4K-8K", 4096, 8192))
# Rows of the tables, each with the row that it is also shown minus of.
ROWS = (
    ("window, untrained", None),
    ("full attention, untrained", None),
    ("window, trained", None),
    ("window, trained, dynamic evaluation", "window, trained"),
    ("full attention, trained", "window, trained"),
    ("TTT-E2E, first run", "window, trained"),
    ("TTT-E2E, second run", "window, trained"),
    ("TTT-E2E, second run", "full attention, trained"),
    ("window, trained on", None),
    ("TTT-E2E, third run", "window, trained on"),
    ("TTT-E2E, third run", "full attention, trained"),
    ("n-gram floor", None),
)
COLOURS = {
    "window, trained": "#98a2b3",
    "full attention, untrained": "#101828",
    "full attention, trained": "#c2185b",
    "window, trained on": "#d9822b",
    "TTT-E2E, first run": "#7fb3ea",
    "TTT-E2E, second run": "#1565c0",
    "TTT-E2E, third run": "#0b3c78",
}


def losses() -> tuple[list[int], dict[str, dict[str, np.ndarray]]]:
    """The edges of the bins, and by row and kind of text the losses [texts, bins]."""
    first, *others = (json.loads((FOLDER / f"{run}.json").read_text()) for run in ("first", "second", "third", "full"))
    systems = [
        *first["systems"].values(),
        *(other[key] for other in others for key in ("ttt", "window", "full") if key in other),
    ]
    renamed = {"TTT-E2E, trained": "TTT-E2E, first run", "window, trained on all 150 sequences": "window, trained on"}
    return first["position_edges"], {
        renamed.get(system["label"], system["label"]): {
            kind: np.array([text["by_position"] for text in system["texts"] if text["name"].startswith(kind)])
            for kind in ("book", "code")
        }
        for system in systems
    }


def in_spans(losses_DN: np.ndarray, edges: list[int]) -> np.ndarray:
    """The mean losses of the texts in SPANS, then over everything, [D, spans + 1], of those in bins."""
    lengths = np.diff(edges)
    spans = [*((start, stop) for _, start, stop in SPANS), (0, edges[-1])]
    inside = [[start <= a and b <= stop for a, b in pairwise(edges)] for start, stop in spans]
    return np.stack([losses_DN[:, bins] @ lengths[bins] / lengths[bins].sum() for bins in inside], 1)


def table(kind: str, title: str, edges: list[int], rows: dict[str, dict[str, np.ndarray]]) -> str:
    """The rows in Markdown."""
    names = [name for name, *_ in SPANS]
    lines = [f"| {title} | {' | '.join(names)} | all |", "|---" * (len(SPANS) + 2) + "|"]
    for name, baseline in ROWS:
        own = in_spans(rows[name][kind], edges)
        means = f"| {name} | {' | '.join(f'{mean:.3f}' for mean in own.mean(0))} |"
        if means not in lines:
            lines.append(means)
        if baseline is not None:
            gaps = own - in_spans(rows[baseline][kind], edges)
            errors = gaps.std(0, ddof=1) / len(gaps) ** 0.5
            cells = (f"{gap:+.3f} ± {error:.3f}" for gap, error in zip(gaps.mean(0), errors, strict=True))
            lines.append(f"| minus {baseline} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(kind: str, title: str, edges: list[int], rows: dict[str, dict[str, np.ndarray]]) -> None:
    """The losses by position, and those minus the first system's."""

    def bins(values_DN: np.ndarray) -> list[dict[str, Any]]:
        errors = values_DN.std(0, ddof=1) / len(values_DN) ** 0.5
        return [{"mean": mean, "books_error": error} for mean, error in zip(values_DN.mean(0), errors, strict=True)]

    baseline, shown = next(iter(COLOURS)), []
    for name in COLOURS:
        own = rows[name][kind]
        pairs = zip(bins(own), bins(own - rows[baseline][kind]), strict=True)
        shown.append({"system": name, "bins": [{"loss": loss, "difference": gap} for loss, gap in pairs]})
    report = {"baseline": baseline, "systems": {name: {"label": name, "colour": COLOURS[name]} for name in COLOURS}}
    positions = {"position_edges": edges, "context": edges[-1], "rows": shown}
    plot_by_position(report, positions, FOLDER / f"{title}.png", f"SmolLM2-135M, {title}")


def main() -> None:
    """Print the tables and draw the pictures."""
    edges, rows = losses()
    for kind, title in (("book", "books"), ("code", "code")):
        print(table(kind, title, edges, rows), end="\n\n")
        draw(kind, title, edges, rows)


if __name__ == "__main__":
    main()
