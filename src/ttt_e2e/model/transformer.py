"""The Transformer: embedding, blocks, head. One class for every architecture of this project.

A block is a sequence mixer (attention, or what the configuration's pattern names), then (in the suffix only) the fast
MLP, then the static MLP, each a residual sub-layer: x += post_norm(layer(norm(x))). With `parallel_mlp` the two MLPs
are one sub-layer. See `block`. What a text leaves behind in a mixer is a value, passed in and handed back; see
`mixers.base`.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
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
from ttt_e2e.model.block import Block, RMSNorm
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Positions, reset_parameters
from ttt_e2e.model.precision import Rounded
from ttt_e2e.model.rope import frequencies
from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import Vjp, accumulation_dtype, cross_entropy, softcap
from ttt_e2e.ops.fast_mlp import FastWeights, LowRankWeights, Weights
from ttt_e2e.ops.linear import OuterProductFactors, linear, linear_vjp
from ttt_e2e.ops.linear_cross_entropy import cross_entropy_backward, cross_entropy_forward


class TokenLookup(nn.Module):
    """Looks up rows of a matrix that belongs to the model, as a module, so that hooks can be put on it."""

    def forward(self, tokens_BT: Tensor, weight_VD: Tensor, multiplier: Tensor | None = None) -> Tensor:
        """The rows [B, T, D] of the token ids, times a number in its dtype."""
        x_BTD = F.embedding(tokens_BT, weight_VD)
        return x_BTD if multiplier is None else x_BTD.to(multiplier.dtype) * multiplier


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
