"""Weak scaling of a training on H100s, counted and not measured: the picture of docs/cluster.md.

    python benchmarks/weak_scaling.py --plot docs/weak_scaling.png

The assumptions are those of `ttt_e2e.model.cluster`; `ttt-e2e cost 3b accumulate=2 --gpus ...` prints the same figures.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS
from ttt_e2e.model.cluster import Cluster, step_time

GPUS = [64 * 2**i for i in range(7)]
GROUPS = {"all GPUs in one group": None, "groups of 64": 64, "groups of 8": 8}


def seconds(gpus: int, group: int | None) -> float:
    """A step of 3b with two sequences a GPU, one at a time; group: GPUs that share one copy of the weights."""
    config = override(PRESETS["3b"], ["accumulate=2", f"batch={2 * gpus}"])
    return step_time(config, Cluster("h100", gpus, group or gpus)).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the efficiency")
    arguments = parser.parse_args()
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, group in GROUPS.items():
        steps = [seconds(gpus, group) for gpus in GPUS]
        efficiency = [100 * steps[0] / step for step in steps]
        print(name, " ".join(f"{gpus}: {step:.3g} s" for gpus, step in zip(GPUS, steps, strict=True)))
        axes.plot(GPUS, efficiency, "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xticks=GPUS, xticklabels=[f"{n:,}" for n in GPUS], ylim=(0, 105), xlabel="H100s")
    axes.set_ylabel("step at 64 / step, %")
    axes.set_title("3b, two sequences of 8K a GPU: estimated from stated rates, not measured", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    if arguments.plot:
        figure.savefig(arguments.plot)


if __name__ == "__main__":
    main()
