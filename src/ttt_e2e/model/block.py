"""The blocks of a Transformer: a sequence mixer and MLPs, each a residual sub-layer with RMSNorm before and after.

The parameters of a fast MLP are the weights that every sequence starts from; `inner_loop` gives each sequence its own
copy and trains it. With a `fast_rank` that copy is not of the two matrices but of the factors of an addition to them.
With `inner_loop.learned_lr`, the rate at which a sequence trains each matrix, or factor, is a parameter as well.

Every layer of the suffix returns its output and its vjp: the function from a cotangent of the output to one of the
input (and, for a fast MLP, of its weights). The inner gradient is the chain of these functions; see `ops.elementwise`.

Shapes: B sequences, T tokens, D hidden size, F hidden width of an MLP.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers import MIXER_TYPES
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, Positions
from ttt_e2e.ops.elementwise import Vjp, glu, rms_norm
from ttt_e2e.ops.fast_mlp import FastVjp, FastWeights, LowRankWeights, Weights, fast_mlp, low_rank_mlp
from ttt_e2e.ops.linear import OuterProductFactors, linear, linear_vjp


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in x's dtype; see `rms_norm`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Vjp]:
        """Normalise x [..., width]."""
        return rms_norm(x, self.weight, self.eps)


class NoNorm(nn.Module):
    """Takes the place of a norm that is switched off."""

    def forward(self, x: Tensor) -> tuple[Tensor, Vjp]:
        """The identity."""
        return x, lambda g: g


class MLP(nn.Module):
    """A gated MLP without biases: w_out (f(gate) * value), gate and value from one matrix w_in, f the `activation`."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Parameter(torch.empty(2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Vjp]:
        """The static MLP: the same weights for every sequence."""
        w_in, w_out = self.w_in, self.w_out  # which may be parametrised, and otherwise when the vjp is called
        y_BTF, glu_vjp = glu(linear(x_BTD, w_in), self.activation)

        def vjp(g_BTD: Tensor) -> Tensor:
            return linear_vjp(glu_vjp(linear_vjp(g_BTD, w_out)), w_in)

        return linear(y_BTF, w_out), vjp


class FastMLP(nn.Module):
    """A gated MLP with weights that every sequence learns for itself, starting from this module's parameters.

    With a rank a sequence learns only the factors up and down; w_in and w_out stay the same while it reads.
    """

    def __init__(self, width: int, hidden: int, rank: int | None, activation: str):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Parameter(torch.empty(2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(width, hidden))
        self.rank = rank
        if rank is not None:
            self.up_in = nn.Parameter(torch.empty(2 * hidden, rank))
            self.down_in = nn.Parameter(torch.empty(rank, width))
            self.up_out = nn.Parameter(torch.empty(width, rank))
            self.down_out = nn.Parameter(torch.empty(rank, hidden))

    def forward(self, x_BTD: Tensor | None, fast: Weights | None = None) -> Any:
        """The MLP with the sequences' own weights `fast` in place of this module's; without an input, `start()`."""
        if x_BTD is None or fast is None:
            return self.start()  # here, where its parameters may be parametrised
        if isinstance(fast, LowRankWeights):
            return low_rank_mlp(x_BTD, fast, self.w_in, self.w_out, self.activation)
        return fast_mlp(x_BTD, fast, self.activation)

    def start(self) -> Weights:
        """The learned initial fast weights, without a batch dimension."""
        if self.rank is None:
            return FastWeights(self.w_in, self.w_out)
        return LowRankWeights(self.up_in, self.down_in, self.up_out, self.down_out)

    def reset_factors(self, generator: torch.Generator | None = None) -> None:
        """Set `up` to zero, so that nothing is added yet, and draw `down` with rows of a length of about one.

        The first step on `up` is then the whole matrix's step, projected onto the rows of `down`.
        """
        with torch.no_grad():
            for up, down in ((self.up_in, self.down_in), (self.up_out, self.down_out)):
                up.zero_()
                down.normal_(0.0, down.shape[1] ** -0.5, generator=generator)


class Block(nn.Module):
    """The mixer, the fast MLP in the suffix, the static MLP: residual sub-layers with norms before and after.

    `log_lr_scale` [M], which a block with a fast MLP has if its inner learning rates are learned, is the logarithm of
    what `inner_loop.lr` is multiplied by for each of its M matrices that learn, in the order of `FastMLP.start`.
    """

    mixer: Mixer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        mixer, fast = MIXER_TYPES[config.mixers[layer]], layer >= config.prefix_layers
        self.mixer_norm = _norm(config, config.pre_norm)
        rope = "local" if config.local_rope_layers[layer] else "global"
        rope = rope if config.rope_layers[layer] else "none"
        self.mixer = mixer(config) if rope == "global" else mixer(config, rope=rope)
        self.mixer_post_norm = _norm(config, config.post_norm)
        self.parallel = config.parallel_mlp and fast
        if fast:  # in parallel, the norms of the static MLP serve both
            self.fast_norm = _norm(config, config.pre_norm and not self.parallel)
            self.fast = FastMLP(config.hidden_size, config.fast_intermediate_size, config.fast_rank, config.hidden_act)
            self.fast_post_norm = _norm(config, config.post_norm and not self.parallel)
            if config.inner_loop.learned_lr:
                self.log_lr_scale = nn.Parameter(torch.zeros(len(self.fast.start())))
        self.static = config.static_mlp or not fast
        if self.static:
            self.mlp_norm = _norm(config, config.pre_norm)
            hidden = config.suffix_intermediate_size if fast else config.intermediate_size
            self.mlp = MLP(config.hidden_size, hidden, config.hidden_act)
            self.mlp_post_norm = _norm(config, config.post_norm)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Positions,
        state: Any | None = None,
        cache_view: CacheView = ALL_FILLED,
        fast: Weights | None = None,
        *,
        mixer: bool = True,
        mlps: bool = True,
        second_order: bool = False,
    ) -> tuple[Tensor, Any, FastVjp | None]:
        """Run the block, or one half of it: of the first suffix block, the mixer runs before the mini-batch loop.

        Args:
            x_BTD: the residual stream [B, T, D].
            positions, state, cache_view: see `Mixer.forward`.
            fast: the fast weights, which the MLPs of a suffix block need.
            mixer, mlps: which half runs.
            second_order: whether the vjp goes through the mixer, which then has to be an attention.

        Returns the residual stream, the mixer's state, and, if there are fast weights, the vjp: from a cotangent of the
        residual stream to one of x_BTD (None unless it is asked for with `below`) and to the fast weights.
        """
        mixer_vjp: Vjp | None = None
        if mixer:
            x_BTD, state, mixer_vjp = self._mixer_sublayer(x_BTD, positions, state, cache_view, second_order)
        if not mlps:
            return x_BTD, state, None
        if fast is None:
            return self._mlp_sublayer(x_BTD)[0], state, None
        x_BTD, mlps_vjp = self._fast_mlp_sublayer(x_BTD, fast)

        def vjp(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, tuple[OuterProductFactors, ...]]:
            below_BTD, factors = mlps_vjp(g_BTD, below)
            if below_BTD is not None and mixer_vjp is not None:
                below_BTD = mixer_vjp(below_BTD)
            return below_BTD, factors

        return x_BTD, state, vjp

    def _mixer_sublayer(
        self, x_BTD: Tensor, positions: Positions, state: Any | None, cache_view: CacheView, second_order: bool
    ) -> tuple[Tensor, Any, Vjp | None]:
        """x + post_norm(mixer(norm(x))), the mixer's state, and the vjp if it is asked for with `second_order`."""
        n_BTD, norm_vjp = self.mixer_norm(x_BTD)
        if not second_order:
            y_BTD, state = self.mixer(n_BTD, positions, state, cache_view)
            return x_BTD + self.mixer_post_norm(y_BTD)[0], state, None
        y_BTD, state, mixer_vjp = self.mixer(n_BTD, positions, state, cache_view, with_vjp=True)
        z_BTD, post_norm_vjp = self.mixer_post_norm(y_BTD)
        return x_BTD + z_BTD, state, lambda g: g + norm_vjp(mixer_vjp(post_norm_vjp(g)))

    def _mlp_sublayer(self, x_BTD: Tensor) -> tuple[Tensor, Vjp]:
        """The static MLP's sub-layer and its vjp; the identity in a block without one."""
        if not self.static:
            return x_BTD, lambda g: g
        n_BTD, norm_vjp = self.mlp_norm(x_BTD)
        y_BTD, mlp_vjp = self.mlp(n_BTD)
        z_BTD, post_norm_vjp = self.mlp_post_norm(y_BTD)
        return x_BTD + z_BTD, lambda g: g + norm_vjp(mlp_vjp(post_norm_vjp(g)))

    def _fast_mlp_sublayer(self, x_BTD: Tensor, fast: Weights) -> tuple[Tensor, FastVjp]:
        """Both MLPs of a suffix block, one after the other or in parallel, the fast one with the weights `fast`."""
        if self.parallel:
            return self._parallel_mlp_sublayer(x_BTD, fast)
        n_BTD, norm_vjp = self.fast_norm(x_BTD)
        y_BTD, fast_vjp = self.fast(n_BTD, fast)
        z_BTD, post_norm_vjp = self.fast_post_norm(y_BTD)
        out_BTD, static_vjp = self._mlp_sublayer(x_BTD + z_BTD)

        def vjp(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, tuple[OuterProductFactors, ...]]:
            g_BTD = static_vjp(g_BTD)
            dn_BTD, factors = fast_vjp(post_norm_vjp(g_BTD), below)
            return None if dn_BTD is None else g_BTD + norm_vjp(dn_BTD), factors

        return out_BTD, vjp

    def _parallel_mlp_sublayer(self, x_BTD: Tensor, fast: Weights) -> tuple[Tensor, FastVjp]:
        n_BTD, norm_vjp = self.mlp_norm(x_BTD)
        fast_BTD, fast_vjp = self.fast(n_BTD, fast)
        static_BTD, static_vjp = self.mlp(n_BTD)
        z_BTD, post_norm_vjp = self.mlp_post_norm(fast_BTD + static_BTD)

        def vjp(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, tuple[OuterProductFactors, ...]]:
            dy_BTD = post_norm_vjp(g_BTD)
            dn_BTD, factors = fast_vjp(dy_BTD, below)
            return None if dn_BTD is None else g_BTD + norm_vjp(dn_BTD + static_vjp(dy_BTD)), factors

        return x_BTD + z_BTD, vjp


def _norm(config: ModelConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.hidden_size, config.rms_norm_eps) if wanted else NoNorm()
