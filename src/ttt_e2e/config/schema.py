"""The settings of a model and of a training run: frozen dataclasses, checked when they are made.

Settings have the names of Hugging Face's `config.json` files wherever these have one. What only one kind of mixer
needs, the rotary scaling and the inner loop are values of their own inside `ModelConfig`, from `config.components`.
`config.ranges` says what a value may be, `config.presets` has the published models, and `config.parse` reads settings
from text and JSON. docs/reference/settings.md lists the docstrings of all fields (a test holds it to them).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from ttt_e2e.config.components import (
    DERIVED,
    GatedDeltaNetConfig,
    InnerLoopConfig,
    Mamba2Config,
    MemoryConfig,
    RopeScaling,
)
from ttt_e2e.config.ranges import Heads, Norm, Range, Rate, Size, Steps, Tokens, Width, check, require
from ttt_e2e.errors import UserError

ActivationCheckpointing = Literal["none", "mini-batch", "sqrt"]
HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
TrainMode = Literal["meta", "pretrain"]
Trainable = Literal["all", "suffix", "last", "lora"]

ATTENTIONS = ("full", "window")
MIXERS = (*ATTENTIONS, "mamba2", "gated-deltanet", "ttt-kvb", "titans", "window+gated-deltanet")

SoftCap = Annotated[float | None, Range(1e-3, 1e6, none=True)]

C = TypeVar("C")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. With `suffix_layers` > 0 it is a TTT-E2E model, with 0 a standard one.

    Fields that follow from others may be left at None: `__post_init__` fills them in, and `replace` updates them.
    Raises UserError if the values do not fit together.
    """

    vocab_size: Size
    """Tokens in the vocabulary (V)."""
    hidden_size: Width
    """Width of the residual stream (D)."""
    num_hidden_layers: Annotated[int, Range(1, 4096)]
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of query heads (H)."""
    intermediate_size: Size
    """Hidden width of the MLPs (F)."""
    hidden_act: HiddenAct = "silu"
    """Activation of the gate in all MLPs, static and fast ones; the memories of TTT-KVB and Titans have "silu".
    "gelu_pytorch_tanh" is GELU in its approximation by tanh."""
    num_key_value_heads: Heads = DERIVED
    """Number of key and value heads (G). None becomes `num_attention_heads`."""
    head_dim: Heads = DERIVED
    """Width of an attention head (K). None becomes `hidden_size / num_attention_heads`."""
    pattern: tuple[str, ...] = ("window",)
    """Sequence mixers of the blocks, repeated over the depth: "full", "window", "mamba2", "gated-deltanet", "ttt-kvb",
    "titans", "window+gated-deltanet"."""
    sliding_window: Tokens = 8192
    """Tokens that a query of a "window" mixer sees, itself included (k)."""
    rope_theta: Annotated[float, Range(1.0, 1e30)] = 500_000.0
    """Base of the rotary positions."""
    rope_pattern: tuple[bool, ...] = (True,)
    """Whether the attention of a block has rotary positions, repeated over the depth."""
    rope_local_pattern: tuple[bool, ...] = (False,)
    """Whether a block has the rotary positions of `rope_local_base_freq`, which are not scaled; repeated over the
    depth."""
    rope_local_base_freq: Annotated[float, Range(1.0, 1e30)] = 10_000.0
    """Base of the rotary positions of those blocks."""
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: Annotated[float, Range(1e-18, 1.0)] = 1e-6
    """Added to the mean square under the root of every RMSNorm."""
    qk_norm: bool = True
    """Whether queries and keys get an RMSNorm per head."""
    qk_norm_joint: bool = False
    """Whether these norms go over all heads of the queries and of the keys at once, as in OLMo 2."""
    pre_norm: bool = True
    """Whether every sub-layer has an RMSNorm before it."""
    post_norm: bool = True
    """Whether every sub-layer has an RMSNorm after it."""
    attention_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    attention_out_bias: bool = False
    """Whether the output projection of attention has a bias."""
    attention_sink: bool = False
    """Whether "window" mixers have a sink: what a query sees in place of the text's first token when that has left its
    window."""
    attn_logit_softcapping: SoftCap = None
    """Cap of attention scores: s becomes cap * tanh(s / cap). None: no cap."""
    final_logit_softcapping: SoftCap = None
    """Cap of the logits, likewise."""
    embedding_multiplier: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """What the embedding of a token is multiplied by; the output head is not."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    initializer_range: Annotated[float, Range(0.0, 100.0)] = 0.02
    """Standard deviation of the initial embedding and matrices."""
    suffix_layers: Annotated[int, Range(0, 4096)] = 0
    """How many of the last blocks have a fast MLP (a quarter in the paper); 0 makes a standard Transformer."""
    mini_batch_size: Annotated[int | None, Range(1, 2**30, none=True)] = 1024
    """Tokens per inner step (b), at most `sliding_window`. None is for models that learn nothing while reading."""
    inner_loop: InnerLoopConfig = InnerLoopConfig()
    static_mlp: bool = True
    """Whether the suffix blocks have a static MLP beside the fast one."""
    parallel_mlp: bool = False
    """Whether fast and static MLP form one sub-layer, x += post_norm(fast(norm(x)) + mlp(norm(x))), not two in turn."""
    fast_intermediate_size: Size = DERIVED
    """Hidden width of the fast MLPs. None becomes `intermediate_size`."""
    suffix_intermediate_size: Size = DERIVED
    """Hidden width of the static MLPs in the suffix. None becomes `intermediate_size`."""
    fast_rank: Annotated[int | None, Range(1, 2**24, none=True)] = None
    """Rank R of what a sequence learns: an addition, up @ down, to every fast matrix, which itself stays fixed. None: a
    sequence learns the whole matrices."""
    mamba2: Mamba2Config = Mamba2Config()
    gated_deltanet: GatedDeltaNetConfig = GatedDeltaNetConfig()
    memory: MemoryConfig = MemoryConfig()

    def __post_init__(self) -> None:
        hidden_size, heads, layers = self.hidden_size, self.num_attention_heads, self.num_hidden_layers
        check(self)
        if self.head_dim is None:
            require(hidden_size % heads == 0, f"hidden_size {hidden_size} does not divide into {heads} heads.")
        _fill_in(self)
        if self.memory.intermediate_size is None:
            memory = dataclasses.replace(self.memory, intermediate_size=4 * self.head_dim)
            object.__setattr__(self, "memory", memory)
        groups = self.num_key_value_heads
        require(heads % groups == 0, f"{heads} query heads cannot share {groups} key/value heads evenly.")
        require(self.head_dim % 2 == 0, f"Rotary positions need an even head_dim, not {self.head_dim}.")
        require(self.suffix_layers <= layers, f"A suffix of {self.suffix_layers} blocks does not fit {layers} blocks.")
        if self.rope_scaling.rope_type == "yarn":
            require(self.rope_theta > 1, "rope_type yarn needs a rope_theta above 1: it divides by its logarithm.")
        if self.rope_scaling.rope_type == "longrope":
            pairs, count = self.head_dim // 2, len(self.rope_scaling.pair_factors)
            require(count == pairs, f"rope_scaling.pair_factors are one for each of {pairs} pairs, not {count}.")
        require(self.static_mlp or not self.parallel_mlp, "parallel_mlp needs static_mlp=true.")
        self._check_mixers()
        self._check_mini_batch()

    def _check_mixers(self) -> None:
        require(bool(self.pattern), "pattern names no mixer; name at least one, such as pattern=window.")
        for name in ("rope_pattern", "rope_local_pattern"):
            require(bool(getattr(self, name)), f"{name} has no value; give at least one, such as {name}=true.")
        for name in self.pattern:
            near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            require(name in MIXERS, f"There is no mixer {name[:50]!r}.{hint} There are: {', '.join(MIXERS)}.")
        others = sorted(set(self.mixers) - set(ATTENTIONS))
        has_positions = all(
            rope or mixer in ATTENTIONS for rope, mixer in zip(self.rope_layers, self.mixers, strict=True)
        )
        require(has_positions, "rope_pattern can be false only where the mixer is 'full' or 'window'.")
        if others and (any(self.local_rope_layers) or self.attn_logit_softcapping is not None):
            raise UserError("rope_local_pattern and attn_logit_softcapping are for mixers 'full' and 'window' alone.")
        default_heads = self.head_dim * self.num_attention_heads == self.hidden_size
        if others and (self.attention_bias or self.attention_out_bias or not default_heads):
            raise UserError(f"With {', '.join(others)}, neither head_dim nor biases of attention can be set.")
        if self.qk_norm_joint and (others or not self.qk_norm):
            raise UserError("qk_norm_joint is for mixers 'full' and 'window' alone, and needs qk_norm=true.")
        if self.attention_sink and not {"window", "ttt-kvb", "window+gated-deltanet"} & set(self.mixers):
            raise UserError("attention_sink is for attention over a window, but no mixer of the pattern has one.")
        inside = self.mixers[self.prefix_layers + 1 :]
        if set(inside) not in (set(), {"full"}, {"window"}):
            raise UserError(
                "The suffix learns through its attentions: after its first block all its mixers must be 'window', or "
                f"all 'full'; they are {', '.join(inside)}."
            )
        if "mamba2" in self.mixers:
            heads, groups = self.mamba2.expand * self.num_attention_heads, self.mamba2.n_groups
            require(
                heads % groups == 0, f"{heads} heads of Mamba 2 do not divide into {groups} groups (mamba2.n_groups)."
            )

    def _check_mini_batch(self) -> None:
        b, window, mixers = self.mini_batch_size, self.sliding_window, self.mixers
        if b is None:
            learns = self.suffix_layers > 0 or {"ttt-kvb", "titans"} & set(mixers)
            require(not learns, "A suffix, ttt-kvb and titans learn mini-batch by mini-batch: set mini_batch_size.")
        elif b > window and ("ttt-kvb" in mixers or (self.suffix_layers and "window" in mixers)):
            raise UserError(
                f"The mini-batch b = {b} is longer than the window k = {window}, so tokens would leave the window "
                "before they are learned; choose b <= k."
            )
        elif "titans" in mixers:
            require(window % b == 0, f"For titans, the window {window} is not a multiple of mini_batch_size {b}.")

    @property
    def mixers(self) -> tuple[str, ...]:
        """The name of every block's mixer: `pattern`, repeated over the depth."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_hidden_layers))

    @property
    def rope_layers(self) -> tuple[bool, ...]:
        """Whether every block's attention has rotary positions: `rope_pattern`, repeated over the depth."""
        return tuple(self.rope_pattern[i % len(self.rope_pattern)] for i in range(self.num_hidden_layers))

    @property
    def local_rope_layers(self) -> tuple[bool, ...]:
        """Whether every block has the local rotary positions: `rope_local_pattern`, repeated over the depth."""
        return tuple(self.rope_local_pattern[i % len(self.rope_local_pattern)] for i in range(self.num_hidden_layers))

    @property
    def prefix_layers(self) -> int:
        """How many blocks come before the suffix."""
        return self.num_hidden_layers - self.suffix_layers

    @property
    def can_learn(self) -> bool:
        """Whether the model has fast weights that change while it reads."""
        return self.suffix_layers > 0 and self.inner_loop.lr > 0

    @property
    def tokens_per_read(self) -> int:
        """How many tokens are read at a time: a mini-batch, or 256 in a model without mini-batches."""
        return self.mini_batch_size or 256

    @property
    def loop_window(self) -> int | None:
        """Tokens that the attentions inside the mini-batch loop see; None for all."""
        return None if "full" in self.mixers[self.prefix_layers + 1 :] else self.sliding_window


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank additions to matrices that stay as they are otherwise, with the names of the library `peft`."""

    r: Annotated[int, Range(1, 2**24)] = 8
    """Rank of the additions: W becomes W + (`lora_alpha` / r) B A."""
    lora_alpha: Rate = 16.0
    """Scale of the additions, before it is divided by `r`."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which matrices get an addition: ends of their names, such as "w_qkv", "mlp.w_in" or "blocks.7.mixer.w_out".
    "all-linear": all static matrices of the blocks."""
    layers: Literal["all", "suffix"] = "all"
    """Blocks that are trained. "suffix": nothing that runs before the mini-batch loop, as with `trainable=suffix`."""

    def __post_init__(self) -> None:
        check(self, "lora.")
        require(bool(self.target_modules), "lora.target_modules names nothing; name a matrix, or all-linear.")


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training: AdamW with linear warm-up and cosine decay."""

    context: Tokens = 8192
    """Tokens per sequence (T)."""
    batch: Size = 64
    """Sequences per optimiser step."""
    accumulate: Size = 1
    """Forward and backward passes that a batch is split into."""
    steps: Annotated[int, Range(1, 2**40)] = 4800
    """Optimiser steps."""
    lr: Rate = 3e-3
    """Peak learning rate: linear warm-up from `lr_init`, then cosine decay to `lr_end`."""
    lr_init: Rate = 0.0
    """Learning rate of the first step of the warm-up."""
    lr_end: Rate = 1e-5
    """Learning rate after the last step."""
    warmup_steps: Steps = DERIVED
    """Optimiser steps of the warm-up. None becomes a tenth of `steps`."""
    train_mode: TrainMode = "meta"
    """"meta": the fast weights learn during training, and the outer gradient goes through their updates. "pretrain": a
    model with a suffix is trained like a standard one and learns at test time only (dynamic evaluation)."""
    trainable: Trainable = "all"
    """What is trained of a model that the run starts from. "suffix": only what runs inside the mini-batch loop, which
    is the suffix without its first mixer, and the last norm; not the embedding, nor the head. "last": the last
    `trained_layers` blocks and the last norm, of any model. "lora": low-rank additions to static matrices, the initial
    fast weights, and norms."""
    trained_layers: Annotated[int, Range(1, 4096)] = 1
    """Blocks that `trainable=last` trains."""
    lora: LoraConfig = LoraConfig()
    cache_prefix: bool = False
    """Whether the outputs of what runs before the loop, if all of it is frozen, are computed once and kept on disk for
    all passes over the data. Documents are then cut into sequences in the same way in every pass."""
    inner_lr_init: Rate = 0.1
    """Inner learning rate at the first step, warmed up linearly to the model's `inner_loop.lr`."""
    inner_warmup_steps: Steps = DERIVED
    """Optimiser steps of the inner learning rate's warm-up. None becomes a tenth of `steps`."""
    inner_lr_lr: Annotated[float | None, Range(0.0, 1e30, none=True)] = None
    """Peak learning rate of the factors of the inner learning rate (`inner_loop.learned_lr`), with the schedule of
    `lr`. A step of AdamW changes a factor by about this share of it. None: `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    adam_eps: Annotated[float, Range(1e-30, 1e30)] = 1e-8
    """Added to the denominator of AdamW's update."""
    weight_decay: Rate = 0.1
    """Weight decay of AdamW, on all weights but factors of learning rates and those that a mixer exempts."""
    max_grad_norm: Norm = 1.0
    """The outer gradient is clipped to this global norm."""
    activation_checkpointing: ActivationCheckpointing = "mini-batch"
    """What is stored of the inner loop for the outer gradient. "none": everything. "mini-batch": only the state between
    mini-batches. "sqrt": only about 2 sqrt(N) of those N states, at the price of a second recomputation."""
    recompute_prefix: bool = False
    """Whether what runs before the loop stores no more than every block's input, and is run again for the gradient."""
    truncated_bptt_steps: Annotated[int | None, Range(1, 2**30, none=True)] = None
    """Truncated backpropagation through time: the outer gradient goes through this many mini-batches of a sequence at a
    time, and only these are stored. 1: through no update at all (first-order). None: through all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products; weights, fast weights and losses are always float32."""
    data_parallel_replicate_degree: Annotated[int, Range(1, 2**20)] = 1
    """With several processes: groups that hold the same weights, gradients and moments."""
    data_parallel_shard_degree: Annotated[int, Range(-1, 2**20)] = -1
    """Processes in such a group, each of which holds its part of them. -1: as many as there are for each group."""
    timeout_seconds: Annotated[float, Range(1.0, 1e6)] = 1800.0
    """How long a process waits for the others before the run ends, and says which one is missing."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seed of the initial weights and of the order of the data."""
    log_every: Steps = 1
    """Steps between two lines of training metrics. 0: only at the end."""
    eval_every: Steps = 100
    """Steps between two evaluations on the validation data; another one ends the run. 0: never."""
    eval_tokens: Steps = 65_536
    """Tokens of validation data that an evaluation reads, at most."""
    checkpoint_every: Steps = 100
    """Steps between two checkpoints; another one ends the run. 0: only at the end."""
    keep_checkpoints: Annotated[int, Range(1, 2**40)] = 2
    """How many of the latest checkpoints are kept."""

    def __post_init__(self) -> None:
        check(self)
        _fill_in(self)
        betas, parts = self.betas, self.accumulate
        is_valid = len(betas) == 2 and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
        require(is_valid, f"betas must be two numbers from 0 to below 1, not {', '.join(map(str, betas))}.")
        require(self.batch % parts == 0, f"A batch of {self.batch} sequences does not split into {parts} equal parts.")
        require(
            self.data_parallel_shard_degree != 0,
            "data_parallel_shard_degree must be a number of processes, or -1 for as many as there are, not 0.",
        )
        require(
            self.prefix_frozen or not self.cache_prefix,
            "cache_prefix needs a frozen prefix: set trainable=suffix, or trainable=lora with lora.layers=suffix.",
        )

    @property
    def prefix_frozen(self) -> bool:
        """Whether nothing that runs before the mini-batch loop is trained."""
        return self.trainable == "suffix" or (self.trainable == "lora" and self.lora.layers == "suffix")


@dataclass(frozen=True)
class RunConfig:
    """A model and how it is trained."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model.inner_loop.learned_lr and self.train.truncated_bptt_steps == 1:
            raise UserError(
                "With train.truncated_bptt_steps=1 the outer gradient goes through no update, so that inner learning "
                "rates (model.inner_loop.learned_lr) would never change; set train.truncated_bptt_steps to 2 or more."
            )


def _derived(config: Any) -> dict[str, int]:
    """The fields of `config` that follow from others unless they are set, with their derived values."""
    if isinstance(config, TrainConfig):
        return {"warmup_steps": config.steps // 10, "inner_warmup_steps": config.steps // 10}
    if isinstance(config, ModelConfig):
        return {
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "fast_intermediate_size": config.intermediate_size,
            "suffix_intermediate_size": config.intermediate_size,
        }
    return {}


def _fill_in(config: Any) -> None:
    for name, value in _derived(config).items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """A copy of `config` with some settings changed by name; "inner_loop.lr" names a setting of a nested value.

    Fields that have the value that is derived from others (`head_dim`, `warmup_steps`, ...) are derived anew, unless
    they are changed themselves. Raises UserError if the values do not fit together.
    """
    values = dict(vars(config)) | {n: None for n, value in _derived(config).items() if getattr(config, n) == value}
    if isinstance(config, ModelConfig) and config.memory.intermediate_size == 4 * config.head_dim:
        values["memory"] = dataclasses.replace(config.memory, intermediate_size=None)  # type: ignore[arg-type]
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    values |= {name: replace(values[name], some) for name, some in nested.items()}
    return type(config)(**values)
