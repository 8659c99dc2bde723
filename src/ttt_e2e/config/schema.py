"""The settings of a model and of a training run: frozen, typed values, checked where they are made.

Names are those of Hugging Face's `config.json` files wherever these have one. What only one kind of mixer needs, the
rotary scaling and the inner loop are values of their own inside `ModelConfig`. `config.presets` has the published
models, `config.parse` reads settings from text and JSON.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ttt_e2e.errors import UserError

ActivationCheckpointing = Literal["none", "mini-batch", "sqrt"]
Kernels = Literal["auto", "torch", "fused"]
RopeType = Literal["default", "linear", "llama3", "yarn"]
TrainMode = Literal["meta", "pretrain"]

ATTENTIONS = ("full", "window")
MIXERS = (*ATTENTIONS, "mamba2", "gated-deltanet", "ttt-kvb", "titans")

C = TypeVar("C")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= 1, f"{name} must be at least 1, not {value}.")


@dataclass(frozen=True)
class InnerLoopConfig:
    """How the fast weights learn while a text is read: SGD, one step a mini-batch."""

    lr: float = 1.0
    """Learning rate of the inner SGD."""

    max_grad_norm: float = 1.0
    """The joint norm of a sequence's inner gradient is clipped to this."""

    def __post_init__(self) -> None:
        _require(self.lr >= 0, f"inner_loop.lr must not be negative, it is {self.lr}.")
        _require(self.max_grad_norm > 0, f"inner_loop.max_grad_norm must be positive, it is {self.max_grad_norm}.")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are slowed down for a context longer than the one a model was pretrained with.

    "linear" divides every angle by `factor`. "llama3" and "yarn" do so for the pairs that turn fewer than
    `low_freq_factor` times in the original context, leave those alone that turn more than `high_freq_factor` times,
    and interpolate between. See `model.rope`.
    """

    rope_type: RopeType = "default"
    factor: float = 1.0

    original_max_position_embeddings: int | None = None
    """Tokens of the original context. Required by "llama3" and "yarn"."""

    low_freq_factor: float = 1.0
    """In turns. YaRN's `beta_slow`."""

    high_freq_factor: float = 4.0
    """In turns. YaRN's `beta_fast`."""

    attention_factor: float = 1.0
    """Queries and keys are multiplied by this beside their rotation (YaRN)."""

    def __post_init__(self) -> None:
        _require_positive(self, "original_max_position_embeddings")
        for name in ("factor", "attention_factor"):
            _require(getattr(self, name) > 0, f"rope_scaling.{name} must be positive, it is {getattr(self, name)}.")
        if self.rope_type == "default":
            _require(self.factor == 1, "rope_scaling.factor needs a rope_scaling.rope_type: linear, llama3 or yarn.")
        elif self.rope_type != "linear":
            _require(
                self.original_max_position_embeddings is not None,
                f"rope_type {self.rope_type} starts from a shorter context's angles; "
                "set rope_scaling.original_max_position_embeddings to it.",
            )
            _require(
                0 < self.low_freq_factor < self.high_freq_factor,
                f"rope_scaling.low_freq_factor = {self.low_freq_factor} must be positive and below "
                f"rope_scaling.high_freq_factor = {self.high_freq_factor}.",
            )


@dataclass(frozen=True)
class Mamba2Config:
    """Settings of the Mamba 2 mixer; the names are those of Hugging Face's `Mamba2Config`."""

    expand: int = 2
    """Inner width, in units of `hidden_size`."""

    state_size: int = 128
    """State per channel (N)."""

    n_groups: int = 1
    """Groups of heads that share their B and C."""

    conv_kernel: int = 4
    """Tokens that the short convolution sees."""

    kernels: Kernels = "auto"
    """"torch": PyTorch everywhere. "fused": the kernels of `mamba-ssm`, on CUDA only. "auto": those, where they are
    installed, for 16-bit numbers on a GPU outside compiled code."""

    def __post_init__(self) -> None:
        _require_positive(self, "expand", "state_size", "n_groups", "conv_kernel")


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Settings of the Gated DeltaNet mixer; the names are those of flash-linear-attention."""

    expand_v: int = 2
    """Width of the values, in units of `hidden_size`."""

    conv_size: int = 4
    """Tokens that the short convolutions see."""

    kernels: Kernels = "auto"
    """As in `Mamba2Config`, with the kernels of `flash-linear-attention`."""

    def __post_init__(self) -> None:
        _require_positive(self, "expand_v", "conv_size")


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of the mixers that train an inner MLP of their own: TTT-KVB and Titans."""

    intermediate_size: int = None  # type: ignore[assignment]
    """Hidden width of one head's inner MLP. None becomes four times `head_dim`."""

    lr: float = 1.0
    """Largest learning rate of the inner MLP; the model chooses between 0 and this for every token."""

    num_persistent_tokens: int = 16
    """Learned keys and values that Titans' attention always sees."""

    def __post_init__(self) -> None:
        _require_positive(self, "intermediate_size")
        _require(self.lr >= 0, f"memory.lr must not be negative, it is {self.lr}.")
        _require(
            self.num_persistent_tokens >= 0,
            f"memory.num_persistent_tokens must not be negative: {self.num_persistent_tokens}.",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. With `suffix_layers` > 0 it is a TTT-E2E model, with 0 a standard one.

    Numbers that follow from others may be left at None: `__post_init__` fills them in, so that a finished
    configuration has none. `replace` makes them follow again. Raises UserError if the values do not fit together.
    """

    vocab_size: int
    """Tokens in the vocabulary (V)."""

    hidden_size: int
    """Width of the residual stream (D)."""

    num_hidden_layers: int

    num_attention_heads: int
    """Query heads (H)."""

    intermediate_size: int
    """Hidden width of the MLPs (F)."""

    num_key_value_heads: int = None  # type: ignore[assignment]
    """Key and value heads (G). None becomes `num_attention_heads`."""

    head_dim: int = None  # type: ignore[assignment]
    """Width of an attention head (K). None becomes `hidden_size / num_attention_heads`."""

    pattern: tuple[str, ...] = ("window",)
    """The blocks' sequence mixers by name (see `MIXERS`), repeated until every block has one."""

    sliding_window: int = 8192
    """Tokens a query sees, itself included (k), in every attention but a "full" one."""

    rope_theta: float = 500_000.0
    """Base of the rotary positions."""

    rope_scaling: RopeScaling = RopeScaling()

    rms_norm_eps: float = 1e-6

    qk_norm: bool = True
    """Whether queries and keys get an RMSNorm per head."""

    pre_norm: bool = True
    """Whether every sub-layer has an RMSNorm before it."""

    post_norm: bool = True
    """Whether every sub-layer has an RMSNorm after it."""

    attention_bias: bool = False
    """Whether attention adds a bias to queries, keys and values."""

    attention_out_bias: bool = False
    """Whether attention adds a bias to its output."""

    tie_word_embeddings: bool = True
    """Whether the embedding is also the output head."""

    initializer_range: float = 0.02
    """Standard deviation of the normal that fills embedding and matrices at the start."""

    suffix_layers: int = 0
    """How many of the last blocks have a fast MLP (in the paper a quarter of all)."""

    mini_batch_size: int | None = 1024
    """Tokens per inner step (b), in the suffix and in TTT-KVB and Titans. None, without any of them: the whole text."""

    inner_loop: InnerLoopConfig = InnerLoopConfig()

    static_mlp: bool = True
    """Whether the suffix blocks keep a static MLP beside the fast one."""

    parallel_mlp: bool = False
    """Whether fast and static MLP of a block are one sub-layer: x += post_norm(fast(norm(x)) + mlp(norm(x)))."""

    fast_intermediate_size: int = None  # type: ignore[assignment]
    """Hidden width of the fast MLPs. None becomes `intermediate_size`."""

    suffix_intermediate_size: int = None  # type: ignore[assignment]
    """Hidden width of the static MLPs in the suffix. None becomes `intermediate_size`."""

    fast_rank: int | None = None
    """None: a sequence learns the whole fast matrices. A number (R): only the two factors of an addition of rank R to
    each, up @ down, and the matrices themselves are the same for all sequences."""

    mamba2: Mamba2Config = Mamba2Config()
    gated_deltanet: GatedDeltaNetConfig = GatedDeltaNetConfig()
    memory: MemoryConfig = MemoryConfig()

    def __post_init__(self) -> None:
        _require_positive(self, *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
        _require_positive(self, *("num_key_value_heads", "head_dim", "intermediate_size"))
        _require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads.",
        )
        for name, value in _derived(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.memory.intermediate_size is None:
            memory = dataclasses.replace(self.memory, intermediate_size=4 * self.head_dim)
            object.__setattr__(self, "memory", memory)
        _require_positive(self, *("fast_intermediate_size", "suffix_intermediate_size", "fast_rank"))
        _require_positive(self, *("sliding_window", "mini_batch_size"))
        _require(self.head_dim % 2 == 0, f"Rotary positions need an even head_dim, not {self.head_dim}.")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly.",
        )
        _require(
            0 <= self.suffix_layers <= self.num_hidden_layers,
            f"A suffix of {self.suffix_layers} blocks does not fit a model of {self.num_hidden_layers} blocks.",
        )
        _require(
            self.mini_batch_size is not None or self.suffix_layers == 0,
            "A model with a suffix learns mini-batch by mini-batch: set mini_batch_size.",
        )
        self._check_mixers()
        learns_within_window = "ttt-kvb" in self.mixers or (self.suffix_layers > 0 and "window" in self.mixers)
        _require(
            self.mini_batch_size is None or self.mini_batch_size <= self.sliding_window or not learns_within_window,
            f"The mini-batch b = {self.mini_batch_size} is longer than the window k = {self.sliding_window}; "
            "tokens between updates would be forgotten. Choose b <= k.",
        )
        _require(
            self.initializer_range >= 0, f"initializer_range must not be negative, it is {self.initializer_range}."
        )
        _require(
            self.static_mlp or not self.parallel_mlp,
            "parallel_mlp sets a static MLP beside every fast one; it needs static_mlp=true.",
        )

    def _check_mixers(self) -> None:
        _require(bool(self.pattern), "pattern names no mixer; write one at least, such as pattern=window.")
        for name in self.pattern:
            near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            _require(name in MIXERS, f"There is no mixer {name!r}.{hint} There are: {', '.join(MIXERS)}.")
        others = sorted(set(self.mixers) - set(ATTENTIONS))
        if others:
            usual = self.head_dim * self.num_attention_heads == self.hidden_size
            _require(
                usual and not (self.attention_bias or self.attention_out_bias),
                "head_dim, attention_bias and attention_out_bias can be set for attentions only, not for "
                f"{', '.join(others)}.",
            )
        inside = set(self.mixers[self.prefix_layers + 1 :])
        _require(
            inside <= {"full"} or inside <= {"window"},
            "The suffix learns through its attentions: after its first block all its mixers must be 'window', or all "
            f"'full'; they are {', '.join(self.mixers[self.prefix_layers + 1 :])}.",
        )
        memories = {"ttt-kvb", "titans"} & set(self.mixers)
        if memories:
            name = sorted(memories)[0]
            _require(self.mini_batch_size is not None, f"{name} learns mini-batch by mini-batch: set mini_batch_size.")
        if "titans" in memories:
            _require(
                self.sliding_window % (self.mini_batch_size or 1) == 0,
                f"Titans' segments are windows of whole mini-batches, but sliding_window {self.sliding_window} is not "
                f"a multiple of mini_batch_size {self.mini_batch_size}.",
            )
        if "mamba2" in self.mixers:
            heads = self.mamba2.expand * self.num_attention_heads
            _require(
                heads % self.mamba2.n_groups == 0,
                f"Mamba 2's {heads} heads (expand x num_attention_heads) do not divide into {self.mamba2.n_groups} "
                "groups; change mamba2.n_groups.",
            )

    @property
    def mixers(self) -> tuple[str, ...]:
        """The name of every block's mixer: the pattern, repeated over the depth."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_hidden_layers))

    @property
    def prefix_layers(self) -> int:
        """How many blocks come before the suffix."""
        return self.num_hidden_layers - self.suffix_layers

    @property
    def can_learn(self) -> bool:
        """Whether a model of this shape has fast weights that change while it reads."""
        return self.suffix_layers > 0 and self.inner_loop.lr > 0

    @property
    def read_batch(self) -> int:
        """Tokens that are read at a time: a mini-batch, or 256 in a standard model."""
        return self.mini_batch_size or 256

    @property
    def loop_window(self) -> int | None:
        """Tokens that the attentions inside the mini-batch loop see; None for all."""
        return None if "full" in self.mixers[self.prefix_layers + 1 :] else self.sliding_window


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training: AdamW with warm-up and cosine decay, counted in optimiser steps and tokens."""

    context: int = 8192
    """Tokens per sequence (T)."""

    batch: int = 64
    """Sequences per optimiser step."""

    accumulate: int = 1
    """Forward and backward passes that a batch is split into."""

    steps: int = 4800
    """Optimiser steps of this stage."""

    lr: float = 3e-3
    """Peak learning rate: linear warm-up from `lr_init`, then cosine to `lr_end`."""

    lr_init: float = 0.0
    lr_end: float = 1e-5

    warmup_steps: int = None  # type: ignore[assignment]
    """None becomes a tenth of `steps`."""

    train_mode: TrainMode = "meta"
    """"meta": the fast weights learn during training, and the outer gradient goes through their updates. "pretrain": a
    model with a suffix is trained like any other and learns at test time only (dynamic evaluation)."""

    inner_lr_init: float = 0.1
    """Inner learning rate at the first step, warmed up linearly to the model's `inner_loop.lr`."""

    inner_warmup_steps: int = None  # type: ignore[assignment]
    """None becomes a tenth of `steps`."""

    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8

    weight_decay: float = 0.1
    """Applied to every tensor, except those that a mixer excludes."""

    max_grad_norm: float = 1.0
    """The global norm of the outer gradient is clipped to this."""

    activation_checkpointing: ActivationCheckpointing = "mini-batch"
    """What the outer gradient stores of the inner loop. "none": everything. "mini-batch": only the state between
    mini-batches. "sqrt": only about 2 sqrt(N) of those N states, at the price of a second recomputation."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; master weights, fast weights and losses stay in float32."""

    seed: int = 0
    """Of the initial weights and of the order of the data."""

    log_every: int = 1
    """In steps, like the next two; 0 for never. A checkpoint is always written at the end."""

    eval_every: int = 100

    eval_tokens: int = 65_536
    """How many held-out tokens an evaluation reads."""

    checkpoint_every: int = 100

    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""

    def __post_init__(self) -> None:
        _require_positive(self, "context", "batch", "accumulate", "steps", "keep_checkpoints")
        for name, value in _derived(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in (
            *("log_every", "eval_every", "checkpoint_every", "eval_tokens", "seed"),
            *("lr", "lr_init", "lr_end", "inner_lr_init", "weight_decay", "adam_eps"),
            *("warmup_steps", "inner_warmup_steps"),
        ):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}.")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas must be two numbers from 0 to below 1, not {self.betas}.",
        )
        _require(
            self.max_grad_norm > 0,
            f"max_grad_norm must be above 0, it is {self.max_grad_norm}; a very large one clips nothing.",
        )
        _require(
            self.batch % self.accumulate == 0,
            f"A batch of {self.batch} sequences does not split into {self.accumulate} equal parts.",
        )


@dataclass(frozen=True)
class RunConfig:
    """A model and how it is trained; printed at the start of a run and saved with it."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)


def _derived(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The fields that follow from others unless they are set, with the values that follow."""
    if isinstance(config, TrainConfig):
        return {"warmup_steps": config.steps // 10, "inner_warmup_steps": config.steps // 10}
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "fast_intermediate_size": config.intermediate_size,
        "suffix_intermediate_size": config.intermediate_size,
    }


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with other values, by name; "inner_loop.lr" names a value inside a value.

    A field that has the value that follows from others (`head_dim`, `warmup_steps`, ...) goes on following them.
    Raises UserError if the values do not fit together.
    """
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    if isinstance(config, (ModelConfig, TrainConfig)):
        values |= {name: None for name, value in _derived(config).items() if values[name] == value}
    if isinstance(config, ModelConfig) and config.memory.intermediate_size == 4 * config.head_dim:
        values["memory"] = replace(config.memory, {"intermediate_size": None})
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    values |= {name: replace(values[name], some) for name, some in inner.items()}
    return type(config)(**values)
