"""The Transformer: embedding, blocks, head. One class for every architecture of this project.

A block is attention, then (in the suffix only) the fast MLP, then the static MLP, each a residual sub-layer with
RMSNorm before and after: x += post_norm(layer(norm(x))). The fast MLPs' weights that stand here are where every
sequence starts; `inner_loop` gives each sequence its own copy and trains it.

Every layer returns its output and its pull, the function that takes a gradient of the output back to one of the input
(and, for a fast MLP, of its weights). The inner gradient is the chain of the suffix's pulls; see `ops.elementwise`.

Everything that a text leaves behind in attention is a value (`Cache`), passed in and handed back.

Shapes: B sequences, T tokens, D width, F hidden width, H query heads, G key/value heads, K head width, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_e2e.config import ModelConfig
from ttt_e2e.ops.attention import attention, attention_once
from ttt_e2e.ops.elementwise import Pull, cross_entropy, rms_norm, rotate, swiglu, wide
from ttt_e2e.ops.linear import batched_linear, weight_gradient
from ttt_e2e.ops.linear_cross_entropy import cross_entropy_backward, cross_entropy_forward

# Up to this many logits (tokens x vocabulary) the head keeps them, 64 MiB in float32; beyond, it makes them in pieces.
KEPT_LOGITS = 2**24


class Cache(NamedTuple):
    """Keys (rotated) and values of the last tokens that a block's attention may still see, oldest first."""

    k_BGSK: Tensor
    v_BGSK: Tensor


class Place(NamedTuple):
    """Where tokens stand: the cosines and sines of their rotary angles, [T, 1, K/2] each.

    empty: how many of the first slots of every cache of fixed size hold no token yet, a 0-dim int32 tensor; None where
    caches hold tokens only. bias_TS: which keys each token may see, made once for all blocks where that helps.
    """

    cos: Tensor
    sin: Tensor
    empty: Tensor | None = None
    bias_TS: Tensor | None = None

    def slice(self, start: int, stop: int) -> "Place":
        """The part for tokens `start` to `stop`."""
        return self._replace(cos=self.cos[start:stop], sin=self.sin[start:stop])


class FastWeights(NamedTuple):
    """One block's fast MLP: every sequence of the batch has its own, in float32."""

    w_in_BED: Tensor  # E = 2 F: gate and value side by side
    w_out_BDF: Tensor


FastPull = Callable[[Tensor, bool], tuple[Tensor | None, FastWeights]]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with the weight brought to x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def pull_linear(g: Tensor, weight: Tensor) -> Tensor:
    """The pull of `linear`."""
    return g @ weight.to(g.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 if x is)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Pull]:
        """Normalise x [..., width]; the result has x's dtype."""
        return rms_norm(x, self.weight, self.eps)


class NoNorm(nn.Module):
    """Stands where a norm is switched off."""

    def forward(self, x: Tensor) -> tuple[Tensor, Pull]:
        """x as it is."""
        return x, lambda g: g


def _norm(config: ModelConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.width, config.norm_eps) if wanted else NoNorm()


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads, RMSNorm on queries and keys per head, and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.heads, self.kv_heads = config.heads, config.kv_head_count
        rows = (self.heads + 2 * self.kv_heads) * config.head_width
        self.w_qkv = nn.Parameter(torch.empty(rows, config.width))
        self.w_out = nn.Parameter(torch.empty(config.width, config.heads * config.head_width))
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(config.head_width))
            self.k_norm = nn.Parameter(torch.ones(config.head_width))

    def forward(
        self, x_BTD: Tensor, place: Place, cache: Cache | None, inner: bool
    ) -> tuple[Tensor, Cache, Pull | None]:
        """Attend from x to the cached tokens and to x itself; returns the output, the cache for what follows, the pull.

        cache None starts a text. Without `inner` there is no pull, and memory is linear in T.
        """
        heads, kv_heads, window = self.heads, self.kv_heads, self.config.window
        x_BTJK = linear(x_BTD, self.w_qkv).unflatten(-1, (heads + 2 * kv_heads, -1))
        qk_BTJK, v_BTGK = x_BTJK.split((heads + kv_heads, kv_heads), 2)
        qk_BTJK = qk_BTJK.to(wide(x_BTD.dtype))
        if self.config.qk_norm:
            weight_JK = torch.cat((self.q_norm.expand(heads, -1), self.k_norm.expand(kv_heads, -1)))
            qk_BTJK, pull_norm = rms_norm(qk_BTJK, weight_JK, self.config.norm_eps)
        qk_BTJK, pull_rotation = rotate(qk_BTJK, place.cos, place.sin)
        q_BHTK, k_BGTK = qk_BTJK.to(x_BTD.dtype).transpose(1, 2).split((heads, kv_heads), 1)
        own = Cache(k_BGTK, v_BTGK.transpose(1, 2))
        seen = own if cache is None else join([cache, own])
        if inner:
            y_BHTK, pull_attention = attention(q_BHTK, *seen, window, place.empty, place.bias_TS)
        else:
            y_BHTK = attention_once(q_BHTK, *seen, window, place.empty, place.bias_TS)
        if cache is None or place.empty is None:
            kept = join([seen], window)
        else:  # a cache of fixed size keeps it, and its place in memory does not tell where it was cut from
            kept = Cache(*(t.contiguous() for t in join([seen], cache.k_BGSK.shape[2])))

        def pull(g_BTD: Tensor) -> Tensor:
            dy_BTHK = pull_linear(g_BTD, self.w_out).unflatten(-1, (heads, -1))
            dq_BHTK, dk_BGTK, dv_BGTK = pull_attention(dy_BTHK.transpose(1, 2))
            dqk_BTJK = torch.cat((dq_BHTK, dk_BGTK), 1).transpose(1, 2)
            dqk_BTJK = pull_rotation(dqk_BTJK.to(qk_BTJK.dtype))
            if self.config.qk_norm:
                dqk_BTJK = pull_norm(dqk_BTJK)
            dx_BTJK = torch.cat((dqk_BTJK.to(g_BTD.dtype), dv_BGTK.transpose(1, 2)), 2)
            return pull_linear(dx_BTJK.flatten(2), self.w_qkv)

        return linear(y_BHTK.transpose(1, 2).flatten(2), self.w_out), kept, pull if inner else None


def join(pieces: list[Cache], window: int | None = None) -> Cache:
    """The last `window` tokens (all if None) of caches that follow one another."""
    total = sum(piece.k_BGSK.shape[2] for piece in pieces)
    drop = 0 if window is None else max(0, total - window)
    kept = []
    for piece in pieces:
        length = piece.k_BGSK.shape[2]
        if drop < length:
            kept.append(Cache(*(t[:, :, drop:] if drop else t for t in piece)))
        drop = max(0, drop - length)
    return kept[0] if len(kept) == 1 else Cache(*(torch.cat(parts, 2) for parts in zip(*kept, strict=True)))


class MLP(nn.Module):
    """SwiGLU without biases: w_out (silu(gate) * value), gate and value from one matrix w_in."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * config.mlp_width, config.width))
        self.w_out = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Pull]:
        """The static MLP: the same weights for every sequence."""
        y_BTF, pull_swiglu = swiglu(linear(x_BTD, self.w_in))

        def pull(g_BTD: Tensor) -> Tensor:
            return pull_linear(pull_swiglu(pull_linear(g_BTD, self.w_out)), self.w_in)

        return linear(y_BTF, self.w_out), pull


def fast_mlp(x_BTD: Tensor, fast: FastWeights) -> tuple[Tensor, FastPull]:
    """SwiGLU with every sequence's own weights.

    Its pull also gives the gradient of the weights, and that of x only if it is told to.
    """
    w_in_BED, w_out_BDF = (w.to(x_BTD.dtype) for w in fast)
    y_BTF, pull_swiglu = swiglu(batched_linear(x_BTD, w_in_BED))

    def pull(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, FastWeights]:
        dh_BTE = pull_swiglu(g_BTD @ w_out_BDF)
        gradient = FastWeights(weight_gradient(dh_BTE, x_BTD), weight_gradient(g_BTD, y_BTF))
        return dh_BTE @ w_in_BED if below else None, FastWeights(*(g.to(fast.w_in_BED.dtype) for g in gradient))

    return batched_linear(y_BTF, w_out_BDF), pull


class Block(nn.Module):
    """Attention, the fast MLP if `fast`, the static MLP: residual sub-layers, each a method."""

    def __init__(self, config: ModelConfig, fast: bool):
        super().__init__()
        self.attention_norm = _norm(config, config.pre_norm)
        self.attention = Attention(config)
        self.attention_post_norm = _norm(config, config.post_norm)
        if fast:
            self.fast_norm = _norm(config, config.pre_norm)
            self.fast = MLP(config)
            self.fast_post_norm = _norm(config, config.post_norm)
        self.mlp_norm = _norm(config, config.pre_norm)
        self.mlp = MLP(config)
        self.mlp_post_norm = _norm(config, config.post_norm)

    def attend(
        self, x_BTD: Tensor, place: Place, cache: Cache | None, inner: bool
    ) -> tuple[Tensor, Cache, Pull | None]:
        """The attention sub-layer."""
        n_BTD, pull_norm = self.attention_norm(x_BTD)
        y_BTD, cache, pull_layer = self.attention(n_BTD, place, cache, inner)
        z_BTD, pull_post = self.attention_post_norm(y_BTD)
        return x_BTD + z_BTD, cache, lambda g: g + pull_norm(pull_layer(pull_post(g)))

    def feed_fast(self, x_BTD: Tensor, fast: FastWeights) -> tuple[Tensor, FastPull]:
        """The fast MLP's sub-layer, with the given weights."""
        n_BTD, pull_norm = self.fast_norm(x_BTD)
        y_BTD, pull_layer = fast_mlp(n_BTD, fast)
        z_BTD, pull_post = self.fast_post_norm(y_BTD)

        def pull(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, FastWeights]:
            dn_BTD, gradient = pull_layer(pull_post(g_BTD), below)
            return None if dn_BTD is None else g_BTD + pull_norm(dn_BTD), gradient

        return x_BTD + z_BTD, pull

    def feed(self, x_BTD: Tensor) -> tuple[Tensor, Pull]:
        """The static MLP's sub-layer."""
        n_BTD, pull_norm = self.mlp_norm(x_BTD)
        y_BTD, pull_layer = self.mlp(n_BTD)
        z_BTD, pull_post = self.mlp_post_norm(y_BTD)
        return x_BTD + z_BTD, lambda g: g + pull_norm(pull_layer(pull_post(g)))


class Transformer(nn.Module):
    """The language model that `config` describes; see `inner_loop` for how a model with a suffix is run.

    Weights are float32, drawn from N(0, init_std^2) with `generator` (default: PyTorch's own); norms start at one.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        first_fast = config.prefix_layers
        self.blocks = nn.ModuleList(Block(config, fast=i >= first_fast) for i in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew and set every norm to one."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.config.init_std, generator=generator)

    @property
    def prefix(self) -> list[Block]:
        """The blocks in which nothing is ever updated."""
        return list(self.blocks[: self.config.prefix_layers])  # type: ignore[arg-type]

    @property
    def suffix(self) -> list[Block]:
        """The last blocks, those with a fast MLP; empty in a standard model."""
        return list(self.blocks[self.config.prefix_layers :])  # type: ignore[arg-type]

    def embed(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Token embeddings [B, T, D] in the compute dtype."""
        return F.embedding(tokens_BT, self.embedding).to(dtype)

    def place(self, start: int, length: int, dtype: torch.dtype) -> Place:
        """Positions `start` to `start + length`; their angles are exact at any position a stream can reach."""
        half = self.config.head_width // 2
        device = self.embedding.device
        # float64: in float32 the angle itself would be off by whole radians after ten million tokens.
        frequency = self.config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        position = torch.arange(start, start + length, device=device, dtype=torch.float64)
        angle = position[:, None, None] * frequency
        return Place(angle.cos().to(wide(dtype)), angle.sin().to(wide(dtype)))

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, D]; the embedding where they are tied."""
        return self.embedding if self.config.tied_head else self.head

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head: logits [B, T, V] of the residual stream's end, in x's dtype."""
        return linear(self.final_norm(x_BTD)[0], self.head_weight)

    def losses(self, x_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Pull]:
        """Negative log-likelihood of every target, [B, T] in float32 (float64 if the model is), masked or not.

        The pull takes a weight for every target's loss to the gradient of x.
        """
        n_BTD, pull_norm = self.final_norm(x_BTD)
        weight_VD = self.head_weight
        if targets_BT.numel() * len(weight_VD) > KEPT_LOGITS:
            n_ND, targets_N = n_BTD.flatten(0, 1), targets_BT.flatten()
            nll_N, lse_N = cross_entropy_forward(n_ND, weight_VD, targets_N, "auto")

            def pull(g_BT: Tensor) -> Tensor:
                g_N = g_BT.flatten()
                dn_ND, _ = cross_entropy_backward(n_ND, weight_VD, targets_N, lse_N, g_N, False, "auto")
                return pull_norm(dn_ND.view_as(n_BTD))

            return nll_N.view_as(targets_BT), pull
        nll_BT, pull_loss = cross_entropy(linear(n_BTD, weight_VD), targets_BT)
        return nll_BT, lambda g: pull_norm(pull_linear(pull_loss(g), weight_VD))

    def read_static(
        self, tokens_BT: Tensor, place: Place, caches: tuple[Cache, ...] | None, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """Everything below the lowest fast weight: embedding, prefix, and the first suffix block's attention.

        In a standard model that is all blocks. tokens [B, T]; caches None starts a text. Returns the residual stream
        [B, T, D] and the caches, one for each attention that ran.
        """
        x_BTD = self.embed(tokens_BT, dtype)
        old: Iterator[Cache | None] = itertools.repeat(None) if caches is None else iter(caches)
        new = []
        for block in self.prefix:
            x_BTD, cache, _ = block.attend(x_BTD, place, next(old), inner=False)
            x_BTD, _ = block.feed(x_BTD)
            new.append(cache)
        if self.suffix:
            x_BTD, cache, _ = self.suffix[0].attend(x_BTD, place, next(old), inner=False)
            new.append(cache)
        return x_BTD, tuple(new)

    def read_fast(
        self,
        x_BTD: Tensor,
        place: Place,
        fast: tuple[FastWeights, ...],
        caches: tuple[Cache, ...] | None,
        inner: bool,
    ) -> tuple[Tensor, tuple[Cache, ...], Callable[[Tensor], tuple[FastWeights, ...]]]:
        """The rest of the suffix with the given fast weights, one pair a block, and one cache a block but the first.

        Goes on from `read_static`. Returns the residual stream [B, T, D], the caches, and (if `inner`) the pull from
        the residual stream to the fast weights.
        """
        old: Iterator[Cache | None] = itertools.repeat(None) if caches is None else iter(caches)
        new, pulls = [], []
        for i, (block, weights) in enumerate(zip(self.suffix, fast, strict=True)):
            attend = None
            if i > 0:
                x_BTD, cache, attend = block.attend(x_BTD, place, next(old), inner)
                new.append(cache)
            x_BTD, feed_fast = block.feed_fast(x_BTD, weights)
            x_BTD, feed = block.feed(x_BTD)
            pulls.append((attend, feed_fast, feed))

        def pull(g_BTD: Tensor) -> tuple[FastWeights, ...]:
            gradients = []
            for attend, feed_fast, feed in reversed(pulls):
                below_BTD, gradient = feed_fast(feed(g_BTD), attend is not None)
                gradients.append(gradient)
                if attend is not None:  # else this is the lowest fast MLP, and nothing below it is wanted
                    assert below_BTD is not None
                    g_BTD = attend(below_BTD)
            return tuple(reversed(gradients))

        return x_BTD, tuple(new), pull

    def initial_fast_weights(self, batch: int) -> tuple[FastWeights, ...]:
        """The learned start of the fast weights, the same for every sequence of the batch."""
        return tuple(
            FastWeights(block.fast.w_in.expand(batch, -1, -1), block.fast.w_out.expand(batch, -1, -1))
            for block in self.suffix
        )
