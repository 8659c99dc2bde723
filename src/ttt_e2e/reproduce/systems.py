"""What is compared: the systems of figure 1, the rows of the ablations and the warm starts.

Each is a preset and what it changes.
"""

import dataclasses
from dataclasses import dataclass

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import at_context, preset, with_parameters
from ttt_e2e.config.schema import RunConfig, replace
from ttt_e2e.convert.from_standard import learning_config
from ttt_e2e.convert.start import Fast, Start
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import parameters
from ttt_e2e.reproduce.scales import Scale


@dataclass(frozen=True)
class System:
    """One row of a comparison.

    name, label, colour: on the command line, for people, in pictures.
    preset: what follows the size in the preset's name; "" is TTT-E2E.
    changes: settings as NAME=VALUE, after those of the scale.
    same_size: whether the MLPs' width makes up for parameters that `changes` add or take away.
    trained_as: the system whose trained weights this one takes, because its own training would be the same.
    starts_from: the system whose first stage comes before this one's, which is then short: `warm_tokens` of the scale.
    rate_of: the system whose sweep finds the outer learning rate for this one, too; None: its own does.
    fast, fast_share: how it then gets its fast MLPs, see `convert.standard`; None: not at all, or it has them.
    """

    name: str
    label: str
    colour: str
    preset: str
    changes: tuple[str, ...] = ()
    same_size: bool = False
    trained_as: str | None = None
    starts_from: str | None = None
    fast: Fast | None = None
    fast_share: float = 1.0
    rate_of: str | None = None


SYSTEMS = (
    System("full", "full attention", "#101828", "-full"),
    System("window", "sliding window", "#98a2b3", "-window"),
    System("hybrid", "hybrid, 5 windows : 1 full", "#667085", "-hybrid"),
    System("mamba2", "Mamba 2", "#2e7d32", "-mamba2"),
    System("gated-deltanet", "Gated DeltaNet", "#00897b", "-gated-deltanet"),
    System("ttt-kvb", "TTT-KVB", "#8e24aa", "-ttt-kvb"),
    System("titans", "Titans", "#c2185b", "-titans"),
    System("dynamic", "dynamic evaluation", "#d9822b", "-dynamic", trained_as="window"),
    System("ttt-e2e", "TTT-E2E", "#1565c0", ""),
    System("full-prefix", "TTT-E2E over full attention", "#64b5f6", "-full-prefix"),
)
# No norms after the sub-layers, as in most pretrained Transformers: with them, a new fast MLP cannot start small.
_PLAIN = ("post_norm=false",)


def _warm(name: str, label: str, colour: str, fast: Fast, share: float, *changes: str) -> System:
    """TTT-E2E that starts from full attention."""
    changes = (*_PLAIN, *changes)
    label = f"full, then TTT-E2E, {label}"
    return System(name, label, colour, "", changes, starts_from="full-first", fast=fast, fast_share=share)


WARM_STARTS = (
    System("window-on", "sliding window", "#98a2b3", "-window", _PLAIN, starts_from="window-first"),
    System("full-on", "full attention", "#101828", "-full", _PLAIN, starts_from="full-first"),
    System("switch", "full attention, then a window, untrained", "#d9822b", "-window", _PLAIN, trained_as="full-on"),
    System("switch-on", "full attention, then a window", "#8e24aa", "-window", _PLAIN, starts_from="full-first"),
    System("ttt-on", "TTT-E2E", "#1565c0", "", _PLAIN, starts_from="ttt-first"),
    _warm("warm-new", "MLPs new", "#00897b", "new", 1.0),
    _warm("warm-new-3", "MLPs new, inner rate 3", "#2e7d32", "new", 1.0, "inner_loop.lr=3"),
    _warm("warm-split", "split", "#64b5f6", "split", 0.5),
    _warm("warm-split-3", "split, inner rate 3", "#c2185b", "split", 0.5, "inner_loop.lr=3"),
)
_FIRST = (
    System("window-first", "sliding window, first stage", "#98a2b3", "-window", _PLAIN),
    System("full-first", "full attention, first stage", "#101828", "-full", _PLAIN),
    System("ttt-first", "TTT-E2E, first stage", "#1565c0", "", _PLAIN),
)
BASELINE = {"figure1": "full", "ablations": "ttt-e2e", "warmstart": "window-on"}
"""What the others' losses are compared with."""
_EXTRA = "full-prefix"  # not in the paper's figure: only where it is named


def rows(what: str, scale: Scale) -> tuple[System, ...]:
    """The systems that `what`, a key of `BASELINE`, can compare at this scale, the baseline among them."""
    if what == "ablations":
        return ablations(scale)
    return SYSTEMS if what == "figure1" else WARM_STARTS


def named(name: str) -> System:
    """The system that another one is `trained_as` or `starts_from`, or has its rate from."""
    return next(system for system in (*SYSTEMS, *WARM_STARTS, *_FIRST) if system.name == name)


def default_rows(what: str, scale: Scale) -> tuple[str, ...]:
    """The names of those that it compares unless told otherwise."""
    return tuple(system.name for system in rows(what, scale) if system.name != _EXTRA)


def ablations(scale: Scale) -> tuple[System, ...]:
    """TTT-E2E and what becomes of it when one choice is made otherwise, with as many parameters and the same rate."""
    model = override(preset(scale.size), list(scale.settings)).model
    rows = [System("ttt-e2e", "TTT-E2E", "#1565c0", "")]
    for window in (scale.window // 2, scale.window * 2):
        rows.append(System(f"window-{window}", f"window k = {window}", "#667085", "", (f"sliding_window={window}",)))
    for b in (scale.mini_batch // 4, scale.mini_batch // 2, scale.mini_batch * 2, scale.mini_batch * 4):
        if 1 <= b <= scale.window:
            rows.append(System(f"mini-batch-{b}", f"mini-batch b = {b}", "#2e7d32", "", (f"mini_batch_size={b}",)))
    for count in sorted(
        {
            max(1, model.num_hidden_layers // 8),
            model.num_hidden_layers // 4,
            model.num_hidden_layers // 2,
            model.num_hidden_layers,
        }
    ):
        if count != model.suffix_layers:
            label = f"{count} of {model.num_hidden_layers} blocks updated"
            rows.append(System(f"suffix-{count}", label, "#8e24aa", "", (f"suffix_layers={count}",), same_size=True))
    rows.append(
        System("no-static-mlp", "no static MLP beside the fast one", "#c2185b", "", ("static_mlp=false",), True)
    )
    rows.append(System("no-meta", "without meta-learning", "#d9822b", "", ("train_mode=pretrain",)))
    # One choice is made otherwise, and the learning rate is not that choice.
    return rows[0], *(dataclasses.replace(row, rate_of="ttt-e2e") for row in rows[1:])


def choose(what: str, scale: Scale, names: list[str] | None) -> tuple[System, ...]:
    """The systems called `names` (None: the default ones), the baseline always among them, in their usual order.

    Raises UserError for a name that is none.
    """
    known = {system.name: system for system in rows(what, scale)}
    wanted = {BASELINE[what], *(default_rows(what, scale) if names is None else names)}
    for name in sorted(wanted - set(known)):
        raise UserError(f"There is no system {name!r} in {what}; there are: {', '.join(known)}.")
    return tuple(system for name, system in known.items() if name in wanted)


# -- configurations ----------------------------------------------------------------------------------------------------


def pretraining(
    scale: Scale, system: System, seed: int, lr: float | None = None, tokens: int | None = None
) -> RunConfig:
    """How `system` is trained first. lr: the outer learning rate. None: the preset's rate, the scale's tokens.

    A system that starts from another one goes on like an extension, but in the first stage's context.
    """
    config = preset(scale.size + system.preset)
    # A standard model has no mini-batches, at any scale.
    mini_batch = None if config.model.mini_batch_size is None else scale.mini_batch
    config = replace(config, {"model.sliding_window": scale.window, "model.mini_batch_size": mini_batch})
    config = override(config, list(scale.settings))
    count = parameters(config.model)
    config = override(config, list(system.changes))
    if system.same_size:
        config = dataclasses.replace(config, model=with_parameters(config.model, count, 8))
    stage_tokens, stage_lr = scale.pretrain_tokens, config.train.lr
    if system.starts_from is not None:
        stage_tokens, stage_lr = scale.warm_tokens, scale.extend_lr
        seed += 1  # other tokens than in the first stage
    if system.fast is not None:
        assert system.starts_from is not None
        standard = pretraining(scale, named(system.starts_from), 0).model
        suffix = config.model.suffix_layers / config.model.num_hidden_layers
        start = Start(scale.window, suffix, scale.mini_batch, system.fast, system.fast_share)
        model = dataclasses.replace(learning_config(standard, start), inner_loop=config.model.inner_loop)
        config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=stage_lr if lr is None else lr))
    return _stage(scale, config, scale.pretrain_context, tokens or stage_tokens, scale.tokens_per_step, seed)


def extending(scale: Scale, system: System, seed: int, context: int) -> RunConfig:
    """How the pre-trained model is trained on for a longer `context`, by the paper's recipe."""
    config = pretraining(scale, system, seed)
    train = dataclasses.replace(config.train, lr=scale.extend_lr, inner_warmup_steps=0)
    config = RunConfig(at_context(config.model, context), train)
    return _stage(scale, config, context, scale.extend_tokens, scale.extend_tokens_per_step, seed)


def _stage(scale: Scale, config: RunConfig, context: int, tokens: int, step: int, seed: int) -> RunConfig:
    """`config` for a stage of `tokens` tokens, `step` a step, in sequences of `context`: alike for every system."""
    batch = max(1, step // context)
    piece = max(1, scale.piece_tokens // context)
    accumulate = next(
        n for n in range(1, batch + 1) if batch % n == 0 and (n == batch or batch // n <= piece * scale.processes)
    )
    train = dataclasses.replace(
        config.train,
        context=context,
        batch=batch,
        accumulate=accumulate,
        steps=max(1, tokens // (batch * context)),
        seed=seed,
        eval_every=0,
        log_every=1,
    )
    return RunConfig(config.model, train)
