"""What a model and a training run are made of: frozen, typed values, checked where they are made.

`presets` has the published ones.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ttt_e2e.errors import UserError

Recompute = Literal["none", "mini-batch", "sqrt"]
Kernels = Literal["auto", "torch", "fused"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]

ATTENTIONS = ("full", "window")
MIXERS = (*ATTENTIONS, "mamba2", "gated-deltanet", "ttt-kvb", "titans")

_LATER = {"later": True}  # marks fields that came when models had been written already: see `to_dict`


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. With `suffix_layers` > 0 it is a TTT-E2E model, with 0 a standard one.

    vocab_size: tokens in the vocabulary (V).
    width: of the residual stream (D).
    layers, heads, kv_heads: blocks, query heads (H) and key/value heads (None: as many as query heads).
    mlp_width: hidden width (F) of every MLP, static and fast alike; but see fast_mlp_width.
    pattern: the blocks' sequence mixers by name (see `MIXERS`), repeated until there is one for every block.
    suffix_layers: how many of the last blocks have a fast MLP (the paper: a quarter of all).
    static_mlp: whether those blocks keep a static MLP beside the fast one.
    window: tokens a query sees, itself included (k), in every attention but a full one.
    mini_batch: tokens per inner step (b); the loss is averaged over mini-batches. None (only without a suffix): one
        mini-batch, the whole sequence.
    inner_lr, inner_clip: inner SGD's step and the bound on the joint norm of a sequence's inner gradient.
    rope_theta: base of the rotary positions. norm_eps: of every RMSNorm.
    qk_norm, pre_norm, post_norm: RMSNorm on queries and keys per head, before, and after every sub-layer.
    tied_head: whether the embedding is also the output head.
    init_std: standard deviation of the normal that fills embedding and matrices at the start.
    expand: inner width of Mamba 2, and of Gated DeltaNet's values, in widths of the residual stream.
    state_width, state_groups: Mamba 2's state per channel (N), and groups of heads that share their B and C.
    conv_width: tokens that the short convolutions of Mamba 2 and Gated DeltaNet see.
    memory_mlp_width: hidden width of the inner MLP of TTT-KVB and Titans, per head; None: four head widths.
    memory_lr: the largest step of that MLP's own training; the model chooses between it and 0 for every token.
    persistent_tokens: learned keys and values that Titans' attention always sees.
    kernels: of Mamba 2 and Gated DeltaNet: "torch" is PyTorch everywhere; "fused" demands a CUDA library's; "auto"
        takes those on a GPU for 16-bit numbers if they are installed, outside of compiled code.

    The rest is what pretrained Transformers have and the paper's do not (see `convert.from_hf`):
    head_size: width of an attention head (K); None: width / heads.
    qkv_bias, out_bias: whether attention adds a bias to queries, keys and values, and to its output.
    fast_mlp_width, suffix_mlp_width: hidden width of the fast MLPs, and of the static ones beside them.
    fast_rank: what a sequence learns of a fast matrix. None: the matrix. A number (R): only the two factors of an
        addition of rank R to it, up @ down, while the matrix itself is the same for all sequences.
    parallel_mlp: whether fast and static MLP of a block are one layer: x += post_norm(fast(norm(x)) + mlp(norm(x))).
    rope_scaling: how rotary angles are slowed down for a longer context; see `rope`. "linear" divides all of them by
        rope_factor. "llama3" and "yarn" do so for the pairs that turn fewer than rope_slow times in `rope_context`
        tokens, leave those as they are that turn more than rope_fast times, and go from one to the other between.
    rope_attention: what queries and keys are multiplied by beside their rotation, YaRN's attention factor.

    Raises UserError if the values do not fit together.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    suffix_layers: int = 0
    pattern: tuple[str, ...] = ("window",)
    static_mlp: bool = True
    window: int = 8192
    mini_batch: int | None = 1024
    inner_lr: float = 1.0
    inner_clip: float = 1.0
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    pre_norm: bool = True
    post_norm: bool = True
    tied_head: bool = True
    init_std: float = 0.02
    expand: int = 2
    state_width: int = 128
    state_groups: int = 1
    conv_width: int = 4
    memory_mlp_width: int | None = None
    memory_lr: float = 1.0
    persistent_tokens: int = 16
    kernels: Kernels = "auto"
    head_size: int | None = field(default=None, metadata=_LATER)
    qkv_bias: bool = field(default=False, metadata=_LATER)
    out_bias: bool = field(default=False, metadata=_LATER)
    fast_mlp_width: int | None = field(default=None, metadata=_LATER)
    suffix_mlp_width: int | None = field(default=None, metadata=_LATER)
    fast_rank: int | None = field(default=None, metadata=_LATER)
    parallel_mlp: bool = field(default=False, metadata=_LATER)
    rope_scaling: RopeScaling = field(default="none", metadata=_LATER)
    rope_factor: float = field(default=1.0, metadata=_LATER)
    rope_context: int | None = field(default=None, metadata=_LATER)
    rope_slow: float = field(default=1.0, metadata=_LATER)
    rope_fast: float = field(default=4.0, metadata=_LATER)
    rope_attention: float = field(default=1.0, metadata=_LATER)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "layers",
            "heads",
            "mlp_width",
            "kv_heads",
            "window",
            "mini_batch",
            "expand",
            "state_width",
            "state_groups",
            "conv_width",
            "memory_mlp_width",
            "head_size",
            "fast_mlp_width",
            "suffix_mlp_width",
            "fast_rank",
            "rope_context",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, not {value}.")
        _require(
            self.head_size is not None or self.width % self.heads == 0,
            f"width {self.width} does not divide into {self.heads} heads.",
        )
        _require(self.head_width % 2 == 0, f"Rotary positions need an even head width, not {self.head_width}.")
        _require(
            self.heads % self.kv_head_count == 0,
            f"{self.heads} query heads cannot share {self.kv_head_count} key/value heads evenly.",
        )
        _require(
            0 <= self.suffix_layers <= self.layers,
            f"A suffix of {self.suffix_layers} blocks does not fit a model of {self.layers} blocks.",
        )
        _require(
            self.mini_batch is not None or self.suffix_layers == 0,
            "A model with a suffix learns mini-batch by mini-batch: set mini_batch.",
        )
        self._check_mixers()
        _require(
            self.mini_batch is None or self.mini_batch <= self.window or not self._learns_within_window,
            f"The mini-batch b = {self.mini_batch} is longer than the window k = {self.window}; "
            "tokens between updates would be forgotten. Choose b <= k.",
        )
        _require(self.inner_lr >= 0, f"inner_lr must not be negative, it is {self.inner_lr}.")
        _require(self.init_std >= 0, f"init_std must not be negative, it is {self.init_std}.")
        _require(self.inner_clip > 0, f"inner_clip must be positive, it is {self.inner_clip}.")
        _require(
            self.static_mlp or not self.parallel_mlp,
            "parallel_mlp sets a static MLP beside every fast one; it needs static_mlp=true.",
        )
        self._check_rotation()

    def _check_rotation(self) -> None:
        for name in ("rope_factor", "rope_attention"):
            _require(getattr(self, name) > 0, f"{name} must be positive, it is {getattr(self, name)}.")
        if self.rope_scaling == "none":
            _require(self.rope_factor == 1, "rope_factor needs a rope_scaling: linear, llama3 or yarn.")
        elif self.rope_scaling != "linear":
            _require(
                self.rope_context is not None,
                f"rope_scaling {self.rope_scaling} starts from a shorter context's angles; set rope_context to it.",
            )
            _require(
                0 < self.rope_slow < self.rope_fast,
                f"rope_slow = {self.rope_slow} must be positive and below rope_fast = {self.rope_fast}.",
            )

    def _check_mixers(self) -> None:
        _require(bool(self.pattern), "pattern names no mixer; write one at least, such as pattern=window.")
        for name in self.pattern:
            near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            _require(name in MIXERS, f"There is no mixer {name!r}.{hint} There are: {', '.join(MIXERS)}.")
        others = sorted(set(self.mixers) - set(ATTENTIONS))
        if others:
            plain = self.head_size is None and not (self.qkv_bias or self.out_bias)
            _require(plain, f"head_size, qkv_bias and out_bias are for attentions alone, not for {', '.join(others)}.")
        inside = set(self.mixers[self.prefix_layers + 1 :])
        _require(
            inside <= {"full"} or inside <= {"window"},
            "The suffix learns through its attentions: after its first block all its mixers must be 'window', or all "
            f"'full'; they are {', '.join(self.mixers[self.prefix_layers + 1 :])}.",
        )
        memories = {"ttt-kvb", "titans"} & set(self.mixers)
        if memories:
            name = sorted(memories)[0]
            _require(self.mini_batch is not None, f"{name} learns mini-batch by mini-batch: set mini_batch.")
            _require(self.memory_lr >= 0, f"memory_lr must not be negative, it is {self.memory_lr}.")
        if "titans" in memories:
            _require(
                self.window % (self.mini_batch or 1) == 0,
                f"Titans' segments are windows of whole mini-batches, but window {self.window} is not a multiple of "
                f"mini_batch {self.mini_batch}.",
            )
            _require(self.persistent_tokens >= 0, f"persistent_tokens must not be negative: {self.persistent_tokens}.")
        if "mamba2" in self.mixers:
            _require(
                self.expand * self.heads % self.state_groups == 0,
                f"Mamba 2's {self.expand * self.heads} heads (expand x heads) do not divide into {self.state_groups} "
                "groups; change state_groups.",
            )

    @property
    def _learns_within_window(self) -> bool:
        return "ttt-kvb" in self.mixers or (self.suffix_layers > 0 and "window" in self.mixers)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The name of every block's mixer: the pattern, repeated over the depth."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    @property
    def read_batch(self) -> int:
        """Tokens of a mini-batch; a standard model without one takes 256."""
        return self.mini_batch or 256

    @property
    def loop_window(self) -> int | None:
        """Tokens that the attentions inside the loop see; None for all."""
        return None if "full" in self.mixers[self.prefix_layers + 1 :] else self.window

    @property
    def memory_hidden(self) -> int:
        """Hidden width of one head's inner MLP in TTT-KVB and Titans."""
        return 4 * self.head_width if self.memory_mlp_width is None else self.memory_mlp_width

    @property
    def head_width(self) -> int:
        """Width of one attention head (K)."""
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def fast_width(self) -> int:
        """Hidden width of the fast MLPs."""
        return self.mlp_width if self.fast_mlp_width is None else self.fast_mlp_width

    @property
    def suffix_width(self) -> int:
        """Hidden width of the static MLPs in the suffix."""
        return self.mlp_width if self.suffix_mlp_width is None else self.suffix_mlp_width

    @property
    def kv_head_count(self) -> int:
        """Number of key/value heads; equal to `heads` unless they are grouped."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def prefix_layers(self) -> int:
        """How many blocks come before the suffix."""
        return self.layers - self.suffix_layers


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training: AdamW with warm-up and cosine, every figure in optimiser steps and tokens.

    context: tokens per sequence (T). batch: sequences per optimiser step. accumulate: pieces a batch is split into.
    steps: optimiser steps of this stage. warmup_steps, inner_warmup_steps: None for a tenth of the steps.
    lr, lr_init, lr_end: peak, first and last learning rate: linear warm-up, then cosine over the remaining steps.
    meta: whether the fast weights learn during training, and the outer gradient goes through that. Without it a model
        with a suffix is trained like any other and learns at test time only: dynamic evaluation.
    inner_lr_init: the inner learning rate at the first step, warmed up linearly to the model's `inner_lr`.
    beta1, beta2, adam_eps, weight_decay, clip: AdamW; decay on every tensor; clip on the global norm.
    recompute: what the outer gradient stores of the inner loop: "none" everything; "mini-batch" only the state between
        mini-batches; "sqrt" only about 2 sqrt(N) of those states, at the price of a second recomputation.
    dtype: of the matrix products; master weights, fast weights and losses stay in float32.
    seed: of the initial weights and of the order of the data.
    log_every, eval_every, checkpoint_every: in steps; 0 for never (a checkpoint is always written at the end).
    eval_tokens: how many held-out tokens an evaluation reads. keep_checkpoints: how many of the latest are kept.
    """

    context: int = 8192
    batch: int = 64
    accumulate: int = 1
    steps: int = 4800
    lr: float = 3e-3
    lr_init: float = 0.0
    lr_end: float = 1e-5
    warmup_steps: int | None = None
    meta: bool = True
    inner_lr_init: float = 0.1
    inner_warmup_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    recompute: Recompute = "mini-batch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 1
    eval_every: int = 100
    eval_tokens: int = 65_536
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("context", "batch", "accumulate", "steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in (
            *("log_every", "eval_every", "checkpoint_every", "eval_tokens", "seed"),
            *("lr", "lr_init", "lr_end", "inner_lr_init", "weight_decay", "adam_eps"),
        ):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be from 0 to below 1, it is {getattr(self, name)}.")
        _require(self.clip > 0, f"clip must be above 0, it is {self.clip}; a very large one clips nothing.")
        _require(
            self.batch % self.accumulate == 0,
            f"A batch of {self.batch} sequences does not split into {self.accumulate} equal pieces.",
        )
        for name in ("warmup_steps", "inner_warmup_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must not be negative, it is {value}.")

    @property
    def warmup(self) -> int:
        """Outer warm-up in steps; a tenth of all unless set."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def inner_warmup(self) -> int:
        """Inner learning rate's warm-up in steps; a tenth of all unless set."""
        return self.steps // 10 if self.inner_warmup_steps is None else self.inner_warmup_steps


@dataclass(frozen=True)
class RunConfig:
    """A model and how it is trained; printed at the start of a run and saved with it."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)


# -- in and out of text ------------------------------------------------------------------------------------------------

C = TypeVar("C")


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """`config` with assignments such as "model.window=256" or "train.lr=1e-3" applied, each checked against its type.

    The section may be left out where the name is unique. Raises UserError for an unknown name or an unfit value."""
    changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    sections = {"model": ModelConfig, "train": TrainConfig}
    known = {f"{s}.{f.name}": s for s, cls in sections.items() for f in dataclasses.fields(cls)}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        _require(bool(equals), f"{assignment!r} is not an override; write NAME=VALUE, such as train.steps=100.")
        full = name if name in known else next((n for n in known if n.split(".")[1] == name), name)
        if full not in known:
            near = difflib.get_close_matches(full, [*known, *(n.split(".")[1] for n in known)], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(known)}."
            raise UserError(f"There is no setting {name!r}.{hint}")
        section, key = full.split(".")
        changes[section][key] = _parse(text, typing.get_type_hints(sections[section])[key], full)
    return RunConfig(
        dataclasses.replace(config.model, **changes["model"]),
        dataclasses.replace(config.train, **changes["train"]),
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, equal to what comes back from JSON.

    Fields that were added later are left out at their defaults, so that what does not use them is written as it was
    before there were any: sessions and runs know their model by these values.
    """
    values = {
        f.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default or "later" not in f.metadata
    }
    return json.loads(json.dumps(values))


def from_dict(cls: type[C], values: dict[str, Any], where: str = "the configuration") -> C:
    """The reverse of `to_dict`. Raises UserError, naming `where`, for unknown or missing fields and unfit values."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = set(values) - names
    _require(not unknown, f"{where} has unknown fields: {', '.join(sorted(unknown))}.")
    checked = {
        key: from_dict(hints[key], value, where)
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        else _check(value, hints[key], f"{key} in {where}")
        for key, value in values.items()
    }
    try:
        return cls(**checked)
    except TypeError as error:
        raise UserError(f"{where} is incomplete: {error}.") from error


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _check(value: Any, hint: Any, where: str) -> Any:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, (list, tuple)):
                return tuple(_check(item, typing.get_args(kind)[0], where) for item in value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    raise UserError(f"{where} must be {_describe(hint)}, not {value!r}.")


def _parse(text: str, hint: Any, where: str) -> Any:
    choices = [c for kind in _alternatives(hint) if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    if typing.get_origin(hint) is tuple:
        return tuple(_parse(item.strip(), typing.get_args(hint)[0], where) for item in text.split(","))
    try:
        value = text if text in choices else None if text.lower() in ("none", "null") else json.loads(text.lower())
    except json.JSONDecodeError:
        value = text
    if isinstance(value, float) and value.is_integer() and float not in _alternatives(hint):
        value = int(value)
    return _check(value, hint, where)


def _describe(hint: Any) -> str:
    words = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Literal:
            words += [repr(choice) for choice in typing.get_args(kind)]
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
            words.append("a list" if typing.get_origin(kind) is tuple else names.get(kind, str(kind)))
    return " or ".join(words)
