"""`ttt-e2e reproduce latency`: time per token of every system by context, as numbers, a table and a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.config.parse import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text
from ttt_e2e.hardware import choose_device, machine
from ttt_e2e.progress import ProgressBar
from ttt_e2e.reproduce.scales import find_scale
from ttt_e2e.reproduce.systems import SYSTEMS, choose, pretraining
from ttt_e2e.reproduce.tables import time_tables
from ttt_e2e.reproduce.timing import SEED, LatencyRow, measure

FORMAT, VERSION = "ttt-e2e latency", 3
LONG_CONTEXTS = {"paper": (2**21,)}
"""By scale, further contexts, for the systems whose state does not grow with the text."""


def run_latency(
    scale: str,
    out: Path,
    *,
    systems: list[str] | None = None,
    contexts: Sequence[int] | None = None,
    device: str = "auto",
    threads: int | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> list[LatencyRow]:
    """Time the systems of figure 1; writes latency.json, latency.md and latency.png after every context.

    Matrix products are in bfloat16 on a GPU and in float32 on a CPU. Dynamic evaluation gets the training time of the
    sliding window, whose weights it uses.

    Args:
        scale: Name of the scale.
        out: The folder to write.
        systems: Names of the systems. None: the default ones.
        contexts: Lengths of the text in tokens. None: the scale's, and its `LONG_CONTEXTS`.
        device: "auto", "cpu" or "cuda".
        threads: Of the CPU. None: as they are set.
        seconds: How long each figure is timed. None: the scale's.
        progress: Whether to show a progress bar.

    Raises:
        UserError: For an unknown scale, system or device, or a time that is not positive.
    """
    numbers = find_scale(scale)
    known = {system.name: system for system in choose("figure1", numbers, systems)}
    names = list(known) if systems is None else systems
    if seconds is not None and seconds <= 0:
        raise UserError(f"The time for each figure must be positive, not {seconds:g} seconds.")
    models = {name: pretraining(numbers, known[name], 0).model for name in names}
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "scale": scale,
        "seed": SEED,
        "batch": 1,
        "dtype": "bfloat16" if chosen.type == "cuda" else "float32",
        "seconds": numbers.latency_seconds if seconds is None else seconds,
        "machine": machine(chosen) | {"threads": torch.get_num_threads()},
        "configs": {name: to_dict(model) for name, model in models.items()},
    }
    long_contexts = LONG_CONTEXTS.get(scale, ()) if contexts is None else ()
    from ttt_e2e.reproduce.plots import plot_times  # matplotlib is slow to import

    labels = {system.name: {"label": system.label, "colour": system.colour} for system in SYSTEMS}
    host = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    head = f"# Time per token at scale {scale}\n\nOne sequence, {facts['dtype']}, random weights and tokens. {host}.\n"
    rows: list[LatencyRow] = []
    all_contexts = (*(numbers.latency_contexts if contexts is None else contexts), *long_contexts)
    for context in ProgressBar(all_contexts, desc="timing", unit="context", disable=not progress):
        is_long = context in long_contexts
        some = {name: model for name, model in models.items() if not (is_long and "full" in model.mixers)}
        how = {"seconds": facts["seconds"], "device": chosen, "dtype": facts["dtype"]}
        new = measure(some, context, train=not is_long, **how)
        train_us = {row["system"]: row["train_us"] for row in new}
        for row in new:
            system = known[row["system"]]
            row["train_us"] = train_us.get((system.weights_from or system).name)
        rows += new
        write_text(out / "latency.json", json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        write_text(out / "latency.md", "\n".join([head, *time_tables(rows, labels)]))
        plot_times(rows, labels, out / "latency.png")
    return rows
