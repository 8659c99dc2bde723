"""The Transformer: embedding, blocks, head. One class for every architecture of this project.

A block is a sequence mixer (attention, or what the configuration's pattern names), then (in the suffix only) the fast
MLP, then the static MLP, each a residual sub-layer with RMSNorm before and after: x += post_norm(layer(norm(x))). With
`parallel_mlp` the two MLPs are one sub-layer. The parameters of a fast MLP are the weights that every sequence starts
from; `inner_loop` gives each sequence its own copy and trains it. With a `fast_rank` that copy is not of the two
matrices but of the factors of an addition to them. With `inner_loop.learned_lr`, the rate at which a sequence trains
each matrix, or factor, is a parameter as well.

Every layer of the suffix returns its output and its vjp: the function from a cotangent of the output to one of the
input (and, for a fast MLP, of its weights). The inner gradient is the chain of these functions; see `ops.elementwise`.

What a text leaves behind in a mixer is a value, passed in and handed back; see `mixers.base`.

Shapes: B sequences, T tokens, D hidden size, F hidden width of an MLP, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers import MIXER_TYPES
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, Positions, reset_parameters
from ttt_e2e.model.precision import Rounded
from ttt_e2e.model.rope import frequencies
from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import Vjp, accumulation_dtype, cross_entropy, glu, rms_norm, softcap
from ttt_e2e.ops.fast_mlp import FastVjp, FastWeights, LowRankWeights, Weights, fast_mlp, low_rank_mlp
from ttt_e2e.ops.linear import OuterProductFactors, linear, linear_vjp
from ttt_e2e.ops.linear_cross_entropy import cross_entropy_backward, cross_entropy_forward


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


class TokenLookup(nn.Module):
    """Looks up rows of a matrix that belongs to the model, as a module, so that hooks can be put on it."""

    def forward(self, tokens_BT: Tensor, weight_VD: Tensor, multiplier: Tensor | None = None) -> Tensor:
        """The rows [B, T, D] of the token ids, times a number in its dtype."""
        x_BTD = F.embedding(tokens_BT, weight_VD)
        return x_BTD if multiplier is None else x_BTD.to(multiplier.dtype) * multiplier


def _norm(config: ModelConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.hidden_size, config.rms_norm_eps) if wanted else NoNorm()


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


class Transformer(nn.Module):
    """The language model that `config` describes; `inner_loop` and `inference` run a model with a suffix.

    Weights are float32, drawn from N(0, initializer_range^2) with `generator` (default: PyTorch's own); norms are one.
    `rounded` says what they were before, if they were loaded for products in a smaller dtype alone.
    """

    rounded: Rounded | None = None

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lookup = TokenLookup()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew and set every norm to one; mixers and low-rank factors have rules of their own.

        Inner learning rates are those of the configuration again.
        """
        mixers = [block.mixer for block in (*self.prefix, *self.suffix)]
        low_rank = [] if self.config.fast_rank is None else [block.fast for block in self.suffix]
        excluded = {id(p) for mixer in mixers for p in mixer.parameters()}
        excluded |= {id(factor) for fast in low_rank for factor in fast.start()}
        log_lr_scales = [block.log_lr_scale for block in self.suffix] if self.config.inner_loop.learned_lr else []
        excluded |= {id(p) for p in log_lr_scales}
        std = self.config.initializer_range
        reset_parameters((p for p in self.parameters() if id(p) not in excluded), std, generator)
        for mixer in mixers:
            mixer.reset_parameters(std, generator)
        for fast in low_rank:
            fast.reset_factors(generator)
        for parameter in log_lr_scales:
            nn.init.zeros_(parameter)

    @property
    def prefix(self) -> list[Block]:
        """The blocks whose weights are never updated while a text is read."""
        return list(self.blocks[: self.config.prefix_layers])  # type: ignore[arg-type]

    @property
    def suffix(self) -> list[Block]:
        """The last blocks, those with a fast MLP; empty in a standard model."""
        return list(self.blocks[self.config.prefix_layers :])  # type: ignore[arg-type]

    def check_products(self, dtype: torch.dtype) -> None:
        """Raise UserError if the model was loaded for products in another dtype, and would give other numbers."""
        if self.rounded is not None and self.rounded.dtype != dtype:
            held, wanted = (str(one).removeprefix("torch.") for one in (self.rounded.dtype, dtype))
            raise UserError(f"The model was loaded for {held}, which rounds its weights; load it again for {wanted}.")

    def positions(
        self, start: int, length: int, dtype: torch.dtype, position_offsets_B: Tensor | None = None
    ) -> Positions:
        """Rotary angles of the positions `start` to `start + length`, for inputs of `dtype`.

        position_offsets_B: how much further each row stands, int64; None if all begin at `start`. Cosines and sines
        come multiplied by the attention factor of the rotary scaling.
        """
        device, scale = self.embedding.device, self.config.rope_scaling.attention_factor
        # float64: in float32 the angle itself would be off by whole radians after ten million tokens.
        position = torch.arange(start, start + length, device=device, dtype=torch.float64)
        if position_offsets_B is not None:
            position = position[:, None] + position_offsets_B
        wide = accumulation_dtype(dtype)

        def angles(scale: float, local: bool) -> tuple[Tensor, Tensor]:
            angle = position[..., None, None] * frequencies(self.config, device, local)
            return (scale * angle.cos()).to(wide), (scale * angle.sin()).to(wide)

        has_local = any(self.config.local_rope_layers)
        return Positions(*angles(scale, local=False), angles(1.0, local=True) if has_local else None)

    def embed(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The residual stream [B, T, D] of the token ids, in `dtype`.

        The `embedding_multiplier` is rounded to `dtype`, as in transformers.
        """
        multiplier = self.config.embedding_multiplier
        scale = None if multiplier == 1 else self.embedding.new_full((), multiplier, dtype=dtype)
        return self.lookup(tokens_BT, self.embedding, scale).to(dtype)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, D]; the embedding where they are tied."""
        return self.embedding if self.config.tie_word_embeddings else self.head

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] in the dtype of the residual stream `x_BTD`."""
        logits_BTV, cap = linear(self.final_norm(x_BTD)[0], self.head_weight), self.config.final_logit_softcapping
        return logits_BTV if cap is None else softcap(logits_BTV, cap)[0]

    def losses(self, x_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Vjp]:
        """Negative log-likelihood of every target, [B, T] in float32 (float64 if x is), and its vjp to x."""
        n_BTD, norm_vjp = self.final_norm(x_BTD)
        weight_VD, cap = self.head_weight, self.config.final_logit_softcapping
        if targets_BT.numel() * len(weight_VD) > tuning.KEPT_LOGITS:
            n_ND, targets_N = n_BTD.flatten(0, 1), targets_BT.flatten()
            nll_N, lse_N = cross_entropy_forward(n_ND, weight_VD, targets_N, "auto", cap)

            def vjp(g_BT: Tensor) -> Tensor:
                g_N = g_BT.flatten()
                dn_ND, _ = cross_entropy_backward(n_ND, weight_VD, targets_N, lse_N, g_N, False, "auto", cap)
                return norm_vjp(dn_ND.view_as(n_BTD))

            return nll_N.view_as(targets_BT), vjp
        logits_BTV, cap_vjp = linear(n_BTD, weight_VD), None
        if cap is not None:
            logits_BTV, cap_vjp = softcap(logits_BTV, cap)
        nll_BT, loss_vjp = cross_entropy(logits_BTV, targets_BT)

        def kept_vjp(g_BT: Tensor) -> Tensor:
            dlogits_BTV = loss_vjp(g_BT)
            if cap_vjp is not None:
                dlogits_BTV = cap_vjp(dlogits_BTV)
            return norm_vjp(linear_vjp(dlogits_BTV, weight_VD))

        return nll_BT, kept_vjp

    def forward_prefix(
        self,
        tokens_BT: Tensor,
        positions: Positions,
        states: tuple[Any, ...] | None,
        dtype: torch.dtype,
        cache_view: CacheView = ALL_FILLED,
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Everything below the lowest fast weight: embedding, prefix, and the first suffix block's mixer.

        Args:
            tokens_BT: token ids [B, T].
            positions, cache_view: see `Mixer.forward`.
            states: the mixers' states after the tokens before; None at the start of a text.
            dtype: of the matrix products.
            recompute: whether a graph keeps no more than every block's input, and the backward pass runs it again.

        Returns the residual stream [B, T, D], and the state of every mixer that ran; no states with `recompute`.
        """
        self.check_products(dtype)
        x_BTD = self.embed(tokens_BT, dtype)
        old: Iterator[Any] = itertools.repeat(None) if states is None else iter(states)
        new = []
        for i, block in enumerate((*self.prefix, *self.suffix[:1])):
            given = (positions, next(old), cache_view)
            run = partial(block, mlps=i < len(self.prefix))
            if recompute:
                x_BTD = checkpoint(_without_state, run, x_BTD, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, state, _ = run(x_BTD, *given)
                new.append(state)
        return x_BTD, tuple(new)

    def forward_suffix(
        self,
        x_BTD: Tensor,
        positions: Positions,
        fast: tuple[Weights, ...],
        caches: tuple[KVCache, ...] | None,
        cache_view: CacheView = ALL_FILLED,
        *,
        second_order: bool,
    ) -> tuple[Tensor, tuple[KVCache, ...], Callable[[Tensor], list[OuterProductFactors]]]:
        """The rest of the suffix, after `forward_prefix`.

        Args:
            x_BTD: the residual stream after the first suffix block's mixer [B, T, D].
            positions, cache_view: see `Mixer.forward`.
            fast: the fast weights, one value a block.
            caches: one for every block but the first; None at the start of a text.
            second_order: whether the vjp will be called.

        Returns the residual stream [B, T, D]; the caches; and the vjp from the residual stream to the fast weights, as
        factors, block by block in the order of their fields.
        """
        old: Iterator[KVCache | None] = itertools.repeat(None) if caches is None else iter(caches)
        new, vjps = [], []
        for i, (block, weights) in enumerate(zip(self.suffix, fast, strict=True)):
            given = (positions, next(old) if i > 0 else None, cache_view, weights)
            x_BTD, cache, block_vjp = block(x_BTD, *given, mixer=i > 0, second_order=second_order)
            new.append(cache)
            vjps.append(block_vjp)

        def vjp(g_BTD: Tensor) -> list[OuterProductFactors]:
            factors: list[OuterProductFactors] = []
            for i in reversed(range(len(vjps))):  # nothing is wanted below the lowest fast MLP
                g_BTD, of_block = vjps[i](g_BTD, below=i > 0)
                factors[:0] = of_block
            return factors

        return x_BTD, tuple(new[1:]), vjp

    @property
    def fast_kind(self) -> type[Weights]:
        """The type of every block's fast weights: whole matrices, or with a `fast_rank` the factors of an addition."""
        return FastWeights if self.config.fast_rank is None else LowRankWeights

    def inner_learning_rates(self, lr: float | Tensor) -> float | Tensor:
        """`lr` times the learned factor of every fast matrix, [M] in the order of all blocks' fast weights.

        Without `inner_loop.learned_lr` it is `lr` itself, one rate for all.
        """
        if not self.config.inner_loop.learned_lr:
            return lr
        return lr * torch.cat([block.log_lr_scale for block in self.suffix]).exp()

    def initial_fast_weights(self, batch: int) -> tuple[Weights, ...]:
        """The learned initial fast weights, the same for every sequence of the batch."""
        starts = (block.fast(None) for block in self.suffix)
        return tuple(self.fast_kind(*(w.expand(batch, -1, -1) for w in start)) for start in starts)


def _without_state(run: Callable[..., tuple[Tensor, Any, Any]], *arguments: Any) -> Tensor:
    """The residual stream alone; what else a block returns would keep what it was computed from."""
    return run(*arguments)[0]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by name; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}
