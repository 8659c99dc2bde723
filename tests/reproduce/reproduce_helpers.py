"""A comparison at a scale of a few steps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ttt_e2e.reproduce import workers
from ttt_e2e.reproduce.run import reproduce
from ttt_e2e.reproduce.scales import SCALES, Scale
from ttt_e2e.reproduce.timing import LatencyRow

MINUTE = dataclasses.replace(
    SCALES["tiny"],
    name="minute",
    sliding_window=8,
    mini_batch_size=4,
    settings=(
        "hidden_size=16",
        "num_attention_heads=2",
        "num_hidden_layers=4",
        "intermediate_size=24",
        "vocab_size=272",
        "checkpoint_every=2",
    ),
    pretrain_context=8,
    pretrain_tokens=64 * 8,
    contexts=(8, 32),
    extend_tokens=64 * 3,
    warm_start_tokens=64 * 2,
    tokens_per_step=64,
    extend_tokens_per_step=64,
    micro_batch_tokens=32,
    sweep_factors=(0.25, 1.0, 4.0),
    sweep_tokens=64 * 3,
    inner_lr_tokens=64,
    eval_tokens=64,
    eval_batch_tokens=64,
    latency_contexts=(8, 32),
    vocab_size=272,
)
FEW_RATES = dataclasses.replace(MINUTE, sweep_factors=(1.0,))  # for what does not depend on the sweep
SYSTEMS = ["full", "window", "dynamic", "ttt-e2e"]


def make_comparison(
    out: Path, data: Path, scale: Scale = MINUTE, name: str = "figure1", **options: Any
) -> workers.Outcome:
    """Make a comparison in this process, with invented latencies."""

    def measure(models: dict[str, Any], context: int, **_: Any) -> list[LatencyRow]:
        return [
            {
                "system": name,
                "context": context,
                "prefill_us": 1.0 * context,
                "decode_us": 2.0,
                "train_us": None,
                "whole": context == 8,
            }
            for name in models
        ]

    options = {"systems": SYSTEMS, "num_workers": 0, "device": "cpu", "progress": False} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt_e2e.reproduce.timing.measure", measure)
        return reproduce(name, scale, out, data=data, **options)


def read_report(out: Path, name: str = "figure1") -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return report


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """The results of all trainings and evaluations, by job."""
    results = {str(f.parent.relative_to(out)): json.loads(f.read_text()) for f in out.glob("runs/**/result.json")}
    results = {job: one for job, one in results.items() if "/." not in job}  # what a killed process left
    return {job: {name: value for name, value in one.items() if name != "sha256"} for job, one in results.items()}
