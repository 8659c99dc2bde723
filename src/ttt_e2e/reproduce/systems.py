"""The systems of each comparison: figure 1, the ablations, the warm starts, and those that start from one model.

A system is a preset with changes, or a converted model with changes. Every system reads the same tokens in the same
order, in each stage.
"""

import dataclasses
import functools
from dataclasses import dataclass

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import extend_model, preset
from ttt_e2e.config.schema import RunConfig, replace
from ttt_e2e.convert.from_standard import learning_config
from ttt_e2e.convert.learning import FastInit, LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import load_config
from ttt_e2e.model.cost import parameters
from ttt_e2e.reproduce.scales import Scale


@dataclass(frozen=True)
class System:
    """One row of a comparison."""

    name: str  # on the command line and on disk
    label: str  # in tables and pictures
    colour: str
    preset: str  # suffix of the preset's name, after the size; an empty one is TTT-E2E
    changes: tuple[str, ...] = ()  # settings, NAME=VALUE, applied after the scale's
    same_size: bool = False  # whether the MLPs' width makes up for parameters that `changes` add or remove
    weights_from: "System | None" = None  # what is trained for it, where its own training would be the same
    starts_from: "System | None" = None  # whose first stage it starts from, with a short second one
    lr_from: "System | None" = None  # whose sweep finds its outer learning rate; None: its own does

    fast: FastInit | None = None
    """How its fast MLPs are made from the model that it starts from, see `convert.learning`. None: that has them, or
    they are not needed."""

    fast_share: float = 1.0

    learns: bool = True
    """Whether it reads with learning, if it has fast MLPs."""

    extrapolates: bool = True
    """Whether it can read contexts that are longer than those of its training."""


_WINDOW = System("window", "sliding window", "#98a2b3", "-window")
_TTT_E2E = System("ttt-e2e", "TTT-E2E", "#1565c0", "")
SYSTEMS = (
    System("full", "full attention", "#101828", "-full"),
    _WINDOW,
    System("hybrid", "hybrid, 5 windows : 1 full", "#667085", "-hybrid"),
    System("mamba2", "Mamba 2", "#2e7d32", "-mamba2"),
    System("gated-deltanet", "Gated DeltaNet", "#00897b", "-gated-deltanet"),
    System("ttt-kvb", "TTT-KVB", "#8e24aa", "-ttt-kvb"),
    System("titans", "Titans", "#c2185b", "-titans"),
    System("dynamic", "dynamic evaluation", "#d9822b", "-dynamic", weights_from=_WINDOW),
    _TTT_E2E,
    System("full-prefix", "TTT-E2E over full attention", "#64b5f6", "-full-prefix"),
)

# Most pretrained Transformers have no norms after the sub-layers. With them, a new fast MLP could not start small.
_PLAIN = ("post_norm=false",)
_WINDOW_FIRST = System("window-first", "sliding window, first stage", "#98a2b3", "-window", _PLAIN)
_FULL_FIRST = System("full-first", "full attention, first stage", "#101828", "-full", _PLAIN)
_TTT_FIRST = System("ttt-first", "TTT-E2E, first stage", "#1565c0", "", _PLAIN)


def _warm_start(name: str, label: str, colour: str, fast: FastInit, share: float, *changes: str) -> System:
    label, changes = f"full, then TTT-E2E, {label}", (*_PLAIN, *changes)
    return System(name, label, colour, "", changes, starts_from=_FULL_FIRST, fast=fast, fast_share=share)


_FULL_ON = System("full-on", "full attention", "#101828", "-full", _PLAIN, starts_from=_FULL_FIRST)
WARM_STARTS = (
    System("window-on", "sliding window", "#98a2b3", "-window", _PLAIN, starts_from=_WINDOW_FIRST),
    _FULL_ON,
    System("switch", "full attention, then a window, untrained", "#d9822b", "-window", _PLAIN, weights_from=_FULL_ON),
    System("switch-on", "full attention, then a window", "#8e24aa", "-window", _PLAIN, starts_from=_FULL_FIRST),
    System("ttt-on", "TTT-E2E", "#1565c0", "", _PLAIN, starts_from=_TTT_FIRST),
    _warm_start("warm-new", "MLPs new", "#00897b", "new", 1.0),
    _warm_start("warm-new-3", "MLPs new, inner rate 3", "#2e7d32", "new", 1.0, "inner_loop.lr=3"),
    _warm_start("warm-split", "split", "#64b5f6", "split", 0.5),
    _warm_start("warm-split-3", "split, inner rate 3", "#c2185b", "split", 0.5, "inner_loop.lr=3"),
)

_FLOOR = System("ngram", "n-gram floor", "#8d6e63", "-window")
_FLOOR_ON = System("ngram-on", "n-gram floor", "#8d6e63", "-window", _PLAIN, starts_from=_WINDOW_FIRST)

FLOOR = {"figure1": _FLOOR, "ablations": _FLOOR, "warmstart": _FLOOR_ON, "pretrained": _FLOOR}
"""By comparison, the n-grams of the tokens that all systems are trained on, see `ngram`. The preset is not trained."""

BASELINE = {"figure1": "full", "ablations": "ttt-e2e", "warmstart": "window-on", "pretrained": "window"}
"""By comparison, the system from whose loss the others' losses are subtracted."""


def choose(comparison: str, scale: Scale, names: list[str] | None) -> tuple[System, ...]:
    """The systems called `names` (None: all but full-prefix, as in the paper) and the baseline, in their usual order.

    Raises UserError for an unknown name.
    """
    if comparison in ("ablations", "pretrained"):
        systems = ablations(scale) if comparison == "ablations" else from_one_model(scale)
    else:
        systems = {"figure1": SYSTEMS, "warmstart": WARM_STARTS}[comparison]
    known = {system.name: system for system in systems}
    wanted = {BASELINE[comparison], *(set(known) - {"full-prefix"} if names is None else names)}
    for name in sorted(wanted - set(known)):
        raise UserError(f"There is no system {name!r} in {comparison}; there are: {', '.join(known)}.")
    return tuple(system for name, system in known.items() if name in wanted)


def ablations(scale: Scale) -> tuple[System, ...]:
    """TTT-E2E, then the same with one choice changed in each, at as many parameters and the same learning rate."""
    model = override(preset(scale.size), list(scale.settings)).model
    k, b, depth = scale.sliding_window, scale.mini_batch_size, model.num_hidden_layers
    changed = [
        System(f"window-{window}", f"window k = {window}", "#667085", "", (f"sliding_window={window}",))
        for window in (k // 2, k * 2)
    ]
    changed += [
        System(f"mini-batch-{size}", f"mini-batch b = {size}", "#2e7d32", "", (f"mini_batch_size={size}",))
        for size in (b // 4, b // 2, b * 2, b * 4)
        if 1 <= size <= k
    ]
    for count in sorted({max(1, depth // 8), depth // 4, depth // 2, depth} - {model.suffix_layers}):
        label = f"{count} of {depth} blocks updated"
        changed.append(System(f"suffix-{count}", label, "#8e24aa", "", (f"suffix_layers={count}",), same_size=True))
    label = "no static MLP beside the fast one"
    changed.append(System("no-static-mlp", label, "#c2185b", "", ("static_mlp=false",), same_size=True))
    changed.append(System("no-meta", "without meta-learning", "#d9822b", "", ("train_mode=pretrain",)))
    return _TTT_E2E, *(dataclasses.replace(system, lr_from=_TTT_E2E) for system in changed)


def from_one_model(scale: Scale) -> tuple[System, ...]:
    """The systems that start from a converted model and train its last blocks, as many as it has in its suffix.

    Full attention, the window and dynamic evaluation keep the model's fast MLPs, which never change there while they
    read, so that all of them share the outputs below. The other three have another suffix, and train its first mixer as
    well.
    """
    assert scale.start_from is not None, "a scale of `pretrained_scale`"
    model = load_config(scale.start_from)
    standard, last = ("train_mode=pretrain",), model.suffix_layers
    whole = ("suffix_layers=0", "parallel_mlp=false", "trainable=last", f"trained_layers={last}", "cache_prefix=false")

    def beside_the_window(name: str) -> str:
        return f"pattern={','.join(['window'] * model.prefix_layers + [name] * last)}"

    window = System("window", "sliding window", "#98a2b3", "", standard, learns=False)
    full = (*standard, "pattern=full", "attention_sink=false")
    hybrid = (*whole, "pattern=window,window,window,window,window,full")
    return (
        System("full", "full attention", "#101828", "", full, learns=False, extrapolates=False),
        window,
        System("hybrid", "hybrid, 5 windows : 1 full", "#667085", "", hybrid, extrapolates=False),
        System(
            "gated-deltanet", "window and Gated DeltaNet", "#00897b", "",
            (*whole, beside_the_window("window+gated-deltanet")),
        ),
        System("ttt-kvb", "window and TTT-KVB", "#8e24aa", "", (*whole, beside_the_window("ttt-kvb"))),
        System("dynamic", "dynamic evaluation", "#d9822b", "", standard, weights_from=window),
        System("ttt-e2e", "TTT-E2E", "#1565c0", "", ("inner_loop.learned_lr=true",)),
    )  # fmt: skip


# -- how a system is trained -------------------------------------------------------------------------------------------


@functools.cache
def pretraining(
    scale: Scale, system: System, seed: int, lr: float | None = None, tokens: int | None = None
) -> RunConfig:
    """The configuration of a system's first stage, or of the second one of a system that starts from another's.

    It is asked for again and again while a report is written, and made once.

    Args:
        scale: The numbers of the comparison.
        system: What is trained.
        seed: Of the weights and of the order of the data. A second stage reads other tokens than the first.
        lr: Outer learning rate. None: the preset's; the scale's `extend_lr` in a second stage, and if all systems start
            from a model.
        tokens: Length of the stage. None: the scale's.
    """
    if scale.start_from is not None:
        config = RunConfig(load_config(scale.start_from))
    else:
        config = preset(scale.size + system.preset)
        # A standard model has no mini-batches at any scale.
        b = None if config.model.mini_batch_size is None else scale.mini_batch_size
        config = replace(config, {"model.sliding_window": scale.sliding_window, "model.mini_batch_size": b})
    config = override(config, list(scale.settings))
    count = parameters(config.model)
    config = override(config, list(system.changes))
    if system.same_size:  # as nearly as MLPs of a multiple of 8 allow
        one, two = (parameters(replace(config, {"model.intermediate_size": width}).model) for width in (1, 2))
        config = replace(config, {"model.intermediate_size": max(8, round((count - one) / (two - one) / 8) * 8)})
    stage_tokens = scale.pretrain_tokens
    stage_lr = config.train.lr if scale.start_from is None else scale.extend_lr
    if system.starts_from is not None:
        stage_tokens, stage_lr = scale.warm_start_tokens, scale.extend_lr
        seed += 1
    if system.fast is not None:
        assert system.starts_from is not None
        share = config.model.suffix_layers / config.model.num_hidden_layers
        options = LearningOptions(
            scale.sliding_window, share, scale.mini_batch_size, fast=system.fast, fast_share=system.fast_share
        )
        model = learning_config(pretraining(scale, system.starts_from, 0).model, options)
        config = replace(config, {"model": replace(model, {"inner_loop": config.model.inner_loop})})
    tokens, lr = stage_tokens if tokens is None else tokens, stage_lr if lr is None else lr
    return _stage(scale, config, scale.pretrain_context, tokens, scale.tokens_per_step, lr, seed)


def extending(scale: Scale, system: System, seed: int, context: int) -> RunConfig:
    """The configuration of a system's further training for a longer `context`, by the paper's recipe."""
    config = pretraining(scale, system, seed)
    config = replace(config, {"model": extend_model(config.model, context)})
    config = _stage(scale, config, context, scale.extend_tokens, scale.extend_tokens_per_step, scale.extend_lr, seed)
    return replace(config, {"train.inner_warmup_steps": 0})


def _stage(
    scale: Scale, config: RunConfig, context: int, tokens: int, tokens_per_step: int, lr: float, seed: int
) -> RunConfig:
    """`config` for `tokens` tokens in sequences of `context`: the same batches for every system."""
    batch = max(1, tokens_per_step // context)
    at_once = max(1, scale.micro_batch_tokens // context) * scale.processes
    accumulate = next(n for n in range(1, batch + 1) if batch % n == 0 and (n == batch or batch // n <= at_once))
    steps = max(1, tokens // (batch * context))
    changes = dict(context=context, batch=batch, accumulate=accumulate, steps=steps, lr=lr, seed=seed)
    changes |= dict(eval_every=0, log_every=1)
    return replace(config, {f"train.{name}": value for name, value in changes.items()})
