"""Settings of the parts of a model that have some of their own: values inside `ModelConfig`, see `schema`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ttt_e2e.config.ranges import Norm, Range, Rate, Size, check, require, shown

Kernels = Literal["auto", "torch", "fused"]

DERIVED: Any = None  # the default of fields that `ModelConfig` and `TrainConfig` compute from others


@dataclass(frozen=True)
class InnerLoopConfig:
    """How the fast weights learn while the model reads: one step of SGD per mini-batch."""

    lr: Rate = 1.0
    """Learning rate of the inner steps."""
    learned_lr: bool = False
    """Whether `inner_loop.lr` is multiplied, for every fast matrix of every block, by a factor that is trained with the
    model. All factors start at 1."""
    max_grad_norm: Norm = 1.0
    """The inner gradient of a sequence, over all fast weights together, is clipped to this norm."""

    def __post_init__(self) -> None:
        check(self, "inner_loop.")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are scaled for contexts longer than the one of pretraining; see `model.rope`."""

    rope_type: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    """"default" leaves all angles alone and "linear" divides them by `factor`. "llama3" and "yarn" divide those that
    turn fewer than `low_freq_factor` times in the original context, keep those that turn more than `high_freq_factor`
    times, and interpolate in between. "longrope" divides each by a factor of its own, one of `pair_factors`."""
    factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """What angles are divided by."""
    original_max_position_embeddings: Annotated[int | None, Range(1, 2**30, none=True)] = None
    """Length of the original context in tokens. Required for "llama3" and "yarn"."""
    low_freq_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """Lower end of the interpolation, in turns (`beta_slow` of YaRN)."""
    high_freq_factor: Annotated[float, Range(1e-6, 1e6)] = 4.0
    """Upper end of the interpolation, in turns (`beta_fast` of YaRN)."""
    attention_factor: Annotated[float, Range(1e-3, 1e3)] = 1.0
    """Queries and keys are multiplied by this (YaRN, LongRoPE)."""
    pair_factors: tuple[float, ...] = (1.0,)
    """For "longrope": what the angle of each of the `head_dim / 2` pairs is divided by, the fastest pair first. 0: it
    does not turn."""

    def __post_init__(self) -> None:
        check(self, "rope_scaling.")
        if self.rope_type == "default":
            require(self.factor == 1, "rope_scaling.factor needs a rope_scaling.rope_type: linear, llama3 or yarn.")
        elif self.rope_type in ("llama3", "yarn"):
            original, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
            require(original is not None, f"rope_type {self.rope_type} needs original_max_position_embeddings.")
            require(low < high, f"low_freq_factor must be below high_freq_factor, not {low}, {high}.")
        in_range = all(factor == 0 or 1e-6 <= factor <= 1e6 for factor in self.pair_factors)
        what = "rope_scaling.pair_factors must be 0 or from 1e-06 to 1e+06"
        require(in_range, f"{what}, not {shown(self.pair_factors)}.")
        is_used = self.rope_type == "longrope" or self.pair_factors == (1.0,)
        require(is_used, "rope_scaling.pair_factors are for rope_type longrope alone.")


@dataclass(frozen=True)
class Mamba2Config:
    """Settings of the Mamba 2 mixer, named as in Hugging Face's `Mamba2Config`."""

    expand: Size = 2
    """Inner width, as a multiple of `hidden_size`."""
    state_size: Size = 128
    """State per channel (N)."""
    n_groups: Size = 1
    """Groups of heads that share their B and C."""
    conv_kernel: Size = 4
    """Tokens that the short convolution sees."""
    kernels: Kernels = "auto"
    """"torch": plain PyTorch. "fused": the kernels of `mamba-ssm`, on CUDA only. "auto": these kernels where they are
    installed, for 16-bit numbers on a GPU outside compiled code; else PyTorch."""

    def __post_init__(self) -> None:
        check(self, "mamba2.")


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Settings of the Gated DeltaNet mixer, named as in flash-linear-attention."""

    expand_v: Size = 2
    """Width of the values, as a multiple of `hidden_size`."""
    conv_size: Size = 4
    """Tokens that the short convolutions see."""
    kernels: Kernels = "auto"
    """Like `mamba2.kernels`, with the kernels of `flash-linear-attention`."""

    def __post_init__(self) -> None:
        check(self, "gated_deltanet.")


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of TTT-KVB and Titans, the mixers that train a memory of their own: an MLP per head."""

    intermediate_size: Size = DERIVED
    """Hidden width of a head's MLP. None becomes 4 x `head_dim`."""
    lr: Rate = 1.0
    """Largest learning rate of the MLP; the model chooses between 0 and this for every token."""
    num_persistent_tokens: Annotated[int, Range(0, 2**20)] = 16
    """Learned keys and values that the attention of Titans always sees."""

    def __post_init__(self) -> None:
        check(self, "memory.")
