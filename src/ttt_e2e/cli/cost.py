"""`ttt-e2e cost`: count what a model costs, without running it."""

import argparse
from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ttt_e2e.cli.common import LEARNING, add_options, learning_options, print_json
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS, preset
from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig
from ttt_e2e.convert.learning import LearningOptions, config_from_source, full_attention_config
from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user, read_json
from ttt_e2e.units import part, rate, tokens, whole

if TYPE_CHECKING:
    from ttt_e2e.model.cluster import Cluster, Estimate

HELP = "count what a model costs, without running it"
DESCRIPTION = """Count a model's parameters and, for texts of several lengths, the size of its state after the text
and the operations per token: for reading (learning included), for generating one more token, for
training, and for training with activation_checkpointing=mini-batch. In brackets: as a multiple of
full attention of the same size. Operations are those of matrix products, a multiplication and an
addition counting as two; attention is counted by the pairs of tokens it needs.

With --gpus, also what a training step costs on many GPUs with sharded weights: the memory of a GPU,
communication and time, from stated rates of the hardware. Nothing of it is measured;
ttt_e2e/model/cluster.py lists the assumptions. Of several numbers of GPUs, each GPU keeps as many
sequences as with the first.

MODEL is a preset, a model folder, or a pretrained Transformer that `convert from-hf` can convert:
its folder, its config.json, a GGUF file, or its name on Hugging Face, from which only config.json
is fetched. The converted model is counted."""
EPILOG = """examples:
  ttt-e2e cost 3b
  ttt-e2e cost 3b --context 8K 128K 2M
  ttt-e2e cost run/model trainable=suffix batch=1 --activations
  ttt-e2e cost 3b accumulate=2 --gpus 64 512 4096 --hardware h100
  ttt-e2e cost tiny sliding_window=1024 mini_batch_size=128 --json
  ttt-e2e cost Qwen/Qwen3-8B --fast-rank 16 --train 1000M"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cost`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a preset, see `ttt-e2e presets`, or a folder, file or name")
    add("settings", nargs="*", metavar="NAME=VALUE", help="change a setting of the model")
    add(
        "--context",
        nargs="+",
        type=tokens,
        metavar="TOKENS",
        help="lengths of the text, such as 8192, 128K or 2M (default: the context of the preset or else the window, "
        "and 4 and 16 times that)",
    )
    add("--activations", action="store_true", help="also count the activations of a training step; takes seconds")
    add("--train", type=tokens, metavar="TOKENS", help="also print how long training on TOKENS tokens takes")
    add(
        "--flops",
        type=rate,
        default=400 * 10**12,
        metavar="RATE",
        help="operations a second that the machine sustains, such as 400T (the default: two fifths of what NVIDIA "
        "states for an H100 in bfloat16)",
    )
    add_options(parser, "json")
    group = parser.add_argument_group("training on many GPUs").add_argument
    group("--gpus", nargs="+", type=whole(1, 2**20), metavar="N", help="also estimate a step of the training on N GPUs")
    group("--hardware", metavar="GPU", help="a100 (80 GB), h100, h200 or b200 (default: h100)")
    group(
        "--utilization",
        type=part,
        metavar="SHARE",
        help="share of the hardware's stated rate that is sustained (default: 0.4, an assumption)",
    )
    add_options(parser.add_argument_group("how a pretrained Transformer would be converted"), *LEARNING)


def run(arguments: argparse.Namespace) -> int:
    """Count and print; returns 0. Raises UserError for a model that does not exist or cannot be converted."""
    from ttt_e2e.model.cost import (
        cost,
        hours,
        in_bytes,
        in_tokens,
        parameters,
        table,
        trained_parameters,
        training_bytes,
    )

    (name, config), *reference = _find_models(arguments)
    contexts = arguments.context or [config.train.context * factor for factor in (1, 4, 16)]
    dtype = config.train.dtype
    dtype_bytes = 2 if dtype == "bfloat16" else 4
    costs = {
        label: [
            cost(run.model, context, dtype_bytes, run.train.train_mode, run.train.prefix_frozen) for context in contexts
        ]
        for label, run in ((name, config), *reference)
    }
    count, train_bytes = parameters(config.model), training_bytes(config.model, config.train)
    trained, added = trained_parameters(config.model, config.train)
    activations = {}
    if arguments.activations:
        from ttt_e2e.inner_loop.activations import activation_bytes

        activations = {context: sum(activation_bytes(config, context)) for context in contexts}
    clusters = _clusters(arguments, config.train)
    estimates = _estimates(config, clusters)
    times = []
    if arguments.train:
        for of in (at.operations for at in costs[name]):
            kinds = {"training": of.training, "training_recomputed": of.training_recomputed}
            times.append({kind: hours(value, arguments.train, arguments.flops) for kind, value in kinds.items()})
    if arguments.json:
        report: dict[str, Any] = {
            "dtype": dtype,
            "bytes": {"float32": 4 * count, "bfloat16": 2 * count, "training": train_bytes},
            "trained": {"parameters": trained, "lora": added},
            "costs": {label: [asdict(at) for at in row] for label, row in costs.items()},
        }
        if activations:
            report["bytes"]["activations"] = [activations[context] for context in contexts]
        if arguments.train:
            report["training"] = {"tokens": arguments.train, "flops": arguments.flops, "hours": times}
        if clusters:
            report["cluster"] = {
                "hardware": clusters[0].hardware,
                "utilization": clusters[0].utilization,
                "estimates": [asdict(at) for at in estimates],
            }
        print_json(report)
        _require_fit(config, clusters, estimates)
        return 0
    weights = f"{in_bytes(4 * count)} in float32, {in_bytes(2 * count)} in bfloat16"
    print(f"{name}: {count:,} parameters, {weights}; {in_bytes(train_bytes)} to train, plus activations")
    if activations:
        rows = max(1, config.train.batch // config.train.accumulate)
        sizes = ", ".join(f"{in_bytes(size)} at {in_tokens(context)}" for context, size in activations.items())
        print(f"Activations of a step, of {rows} sequences at a time, at least about: {sizes}")
    if config.train.trainable != "all":
        below = "; no activations of what runs before the loop" if config.train.prefix_frozen else ""
        adapters = f", and {added:,} of low-rank additions" if added else ""
        print(f"Trained: {trained:,} parameters{adapters}{below}")
    brackets = f"; in brackets: as a multiple of {reference[0][0]}" if reference else ""
    print(f"State of one text (caches in {dtype}), and operations per token{brackets}\n")
    print(table(*costs.values()))
    if arguments.train:
        speed = f"{arguments.flops / 1e12:g} T operations a second"
        print(f"\nHours to train on {arguments.train:,} tokens, at {speed}\n")
        print(f"{'context':<8}{'training':>18}{'recomputing':>18}")
        for context, kinds in zip(contexts, times, strict=True):
            cells = (f"{h:,.1f}" if h >= 10 else f"{h:.2g}" for h in kinds.values())
            print(f"{in_tokens(context):<8}" + "".join(f"{cell:>18}" for cell in cells))
    if clusters:
        _print_cluster(config, clusters[0], estimates)
        _require_fit(config, clusters, estimates)
    return 0


def _clusters(arguments: argparse.Namespace, train: TrainConfig) -> "list[Cluster]":
    """What --gpus and the options beside it name; empty without. The groups are those of `train`."""
    from ttt_e2e.model.cluster import UTILIZATION, Cluster
    from ttt_e2e.training.parallelize import mesh_shape

    if not arguments.gpus:
        for name in ("hardware", "utilization"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} says on what --gpus are to train; add --gpus N.")
        return []
    hardware, utilization = arguments.hardware or "h100", arguments.utilization or UTILIZATION
    # On more GPUs than the first number there are more groups, or with data_parallel_shard_degree=-1 larger ones.
    groups, shards = mesh_shape(train, arguments.gpus[0])
    fixed = train.data_parallel_shard_degree != -1
    return [Cluster(hardware, n, shards if fixed else max(1, n // groups), utilization) for n in arguments.gpus]


def _estimates(config: RunConfig, clusters: "list[Cluster]") -> "list[Estimate]":
    """A step on every cluster, with as many sequences a GPU as on the first."""
    from ttt_e2e.inner_loop.activations import activation_bytes
    from ttt_e2e.model.cluster import estimate, rows_at_a_time

    if not clusters:
        return []
    rows = rows_at_a_time(config.train, clusters[0].gpus)
    activations = activation_bytes(override(config, [f"batch={rows}", "accumulate=1"]), config.train.context)
    estimates = []
    for cluster in clusters:
        batch = rows * config.train.accumulate * cluster.gpus
        estimates.append(estimate(override(config, [f"batch={batch}"]), cluster, *activations))
    return estimates


def _find_models(arguments: argparse.Namespace) -> list[tuple[str, RunConfig]]:
    """Name and settings of the model to count, and of the same model with full attention, if it is another one."""
    from ttt_e2e.model.checkpoint import FORMAT, load_config

    model, settings, options = arguments.model, arguments.settings, learning_options(arguments)
    path = expand_user(model)
    is_preset = model in PRESETS or not (path.exists() or "/" in model)
    file, weights = path / "config.json", path / "model.safetensors"
    is_ours = not is_preset and file.is_file() and weights.is_file() and read_json(file).get("format") == FORMAT
    if (is_preset or is_ours) and options != LearningOptions():
        raise UserError(
            "--window, --suffix and the like are for a pretrained Transformer; of a preset or a model folder change "
            "settings, such as sliding_window=1024."
        )
    if is_preset:
        config, full = override(preset(model), settings), f"{model.split('-')[0]}-full"
        return [(model, config)] if model == full else [(model, config), (full, PRESETS[full])]

    def run_config(model: ModelConfig, settings: list[str]) -> RunConfig:
        """Training of `model` in bfloat16, with its window as context."""
        return override(RunConfig(model, replace(PRESETS["3b"].train, context=model.sliding_window)), settings)

    if is_ours:
        return [(path.resolve().name, run_config(load_config(path), settings))]
    from ttt_e2e.convert.gguf_files import is_gguf, read_gguf
    from ttt_e2e.convert.hf_config import read_source
    from ttt_e2e.convert.hf_files import find_config

    if is_gguf(path):
        source, name = read_source(read_gguf(path).config, path), path.stem
    else:
        file = find_config(model)
        source = read_source(read_json(file), file)
        name = file.resolve().parent.name if path.exists() else model.rsplit("/")[-1]
    config = run_config(config_from_source(source, options), settings)
    return [(name, config), ("the original", run_config(full_attention_config(source), []))]


def _print_cluster(config: RunConfig, cluster: "Cluster", estimates: "list[Estimate]") -> None:
    from ttt_e2e.model.cluster import memory_table, scaling_table
    from ttt_e2e.model.cost import in_bytes, in_tokens

    first, train = estimates[0], config.train
    rows = train.batch // train.accumulate // first.gpus
    what = f"{first.gpus} x {cluster.hardware}, {first.shards} shards, {rows} of {in_tokens(train.context)} at a time"
    print(f"\nMemory of a GPU, of {in_bytes(cluster.gpu.memory)}, at least about; {what}\n")
    print(memory_table(first.memory))
    speed = f"{100 * cluster.utilization:g} % of {cluster.rate(train) / 1e12:g} T operations a second"
    print(f"\nTime of a step, estimated at {speed}\n")
    print(scaling_table(estimates))
    days = train.steps * first.time.total / 86_400
    print(f"\n{train.steps:,} steps on {first.gpus} GPUs: {days:.3g} days")


def _require_fit(config: RunConfig, clusters: "list[Cluster]", estimates: "list[Estimate]") -> None:
    """Raise UserError, with what would make it fit, if a GPU's memory is too small."""
    from ttt_e2e.model.cost import in_bytes

    for cluster, at in zip(clusters, estimates, strict=True):
        if at.memory.total > cluster.gpu.memory:
            needed, there = in_bytes(at.memory.total), in_bytes(cluster.gpu.memory)
            raise UserError(
                f"On {at.gpus} GPUs the training does not fit: a GPU needs at least {needed}, and the "
                f"{cluster.hardware} has {there}; {_advice(config, cluster, at.batch // at.gpus)}."
            )


def _advice(config: RunConfig, cluster: "Cluster", sequences: int) -> str:
    """The settings with the least recomputation, and then the fewest micro-batches, that fit; `sequences` a GPU."""
    from ttt_e2e.inner_loop.activations import activation_bytes
    from ttt_e2e.model.cluster import memory
    from ttt_e2e.model.cost import in_bytes, in_tokens

    modes, now = ["none", "mini-batch", "sqrt"], config.train
    again = [True] if now.recompute_prefix or now.prefix_frozen else [False, True]
    for mode, recompute in product(modes[modes.index(now.activation_checkpointing) :], again):
        recomputed = [f"activation_checkpointing={mode}"] * (mode != now.activation_checkpointing)
        recomputed += ["recompute_prefix=true"] * (recompute and not now.recompute_prefix)
        one = override(config, ["batch=1", "accumulate=1", *recomputed])
        graph, states = activation_bytes(one, now.context)
        for parts in (n for n in range(1, sequences + 1) if sequences % n == 0):
            rows, batch = sequences // parts, sequences * cluster.gpus
            changed = override(config, [f"batch={batch}", f"accumulate={parts}"])
            needed = memory(changed, cluster, rows * graph, rows * states).total
            if needed <= cluster.gpu.memory:
                changes = [f"accumulate={parts}"] * (parts != now.accumulate)
                return f"with {' and '.join(changes + recomputed)} it would need at least {in_bytes(needed)}"
    alone = f"one sequence of {in_tokens(now.context)} needs {in_bytes(needed)} with activation_checkpointing=sqrt"
    alone += " and recompute_prefix=true" if recompute and not now.prefix_frozen else ""
    return f"{alone}: choose a shorter context, GPUs with more memory or a smaller model"
