"""The Transformer: embedding, blocks, head. One class for every architecture of this project.

A block is attention, then (in the suffix only) the fast MLP, then the static MLP, each a residual sub-layer with
RMSNorm before and after: x += post_norm(layer(norm(x))). The fast MLPs' weights that stand here are where every
sequence starts; `inner_loop` gives each sequence its own copy and trains it.

Everything that a text leaves behind in attention is a value (`Cache`), passed in and handed back.

Shapes: B sequences, T tokens, D width, F hidden width, H query heads, G key/value heads, K head width, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_e2e.config import ModelConfig
from ttt_e2e.ops.attention import attention, attention_once
from ttt_e2e.ops.elementwise import rotate, swiglu, unit_rms


class Cache(NamedTuple):
    """Keys (rotated) and values of the last tokens that a block's attention may still see, oldest first."""

    k_BGSK: Tensor
    v_BGSK: Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles at some positions, [T, 1, K/2] each."""

    cos: Tensor
    sin: Tensor

    def slice(self, start: int, stop: int) -> "Rotary":
        """The part for tokens `start` to `stop`."""
        return Rotary(self.cos[start:stop], self.sin[start:stop])


class FastWeights(NamedTuple):
    """One block's fast MLP: every sequence of the batch has its own, in float32."""

    w_in_BED: Tensor  # E = 2 F: gate and value side by side
    w_out_BDF: Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with the weight brought to x's dtype."""
    return F.linear(x, weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 if x is)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]; the result has x's dtype."""
        return (unit_rms(x.to(wide(x.dtype)), self.eps) * self.weight).to(x.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotations and losses when the matrix products are in `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norm(config: ModelConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.width, config.norm_eps) if wanted else nn.Identity()


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

    def forward(self, x_BTD: Tensor, rotary: Rotary, cache: Cache | None, twice: bool) -> tuple[Tensor, Cache]:
        """Attend from x to the cached tokens and to x itself; returns the output and the cache for what follows.

        cache None starts a text. `twice` asks for arithmetic that can be differentiated twice.
        """
        heads, kv_heads, window = self.heads, self.kv_heads, self.config.window
        x_BTJK = linear(x_BTD, self.w_qkv).unflatten(-1, (heads + 2 * kv_heads, -1))
        qk_BTJK, v_BTGK = x_BTJK.split((heads + kv_heads, kv_heads), 2)
        qk_BTJK = qk_BTJK.to(wide(x_BTD.dtype))
        if self.config.qk_norm:
            weight_JK = torch.cat((self.q_norm.expand(heads, -1), self.k_norm.expand(kv_heads, -1)))
            qk_BTJK = unit_rms(qk_BTJK, self.config.norm_eps) * weight_JK
        qk_BJTK = rotate(qk_BTJK, *rotary).to(x_BTD.dtype).transpose(1, 2)
        q_BHTK, k_BGTK = qk_BJTK.split((heads, kv_heads), 1)
        v_BGTK = v_BTGK.transpose(1, 2)
        pieces = ([] if cache is None else [cache]) + [Cache(k_BGTK, v_BGTK)]
        if twice:
            y_BHTK = attention(q_BHTK, [p.k_BGSK for p in pieces], [p.v_BGSK for p in pieces], window)
        else:
            seen = join(pieces)
            pieces = [seen]
            y_BHTK = attention_once(q_BHTK, *seen, window)
        return linear(y_BHTK.transpose(1, 2).flatten(2), self.w_out), join(pieces, window)


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The static MLP: the same weights for every sequence."""
        return linear(swiglu(linear(x_BTD, self.w_in)), self.w_out)


def fast_mlp(x_BTD: Tensor, fast: FastWeights) -> Tensor:
    """SwiGLU with every sequence's own weights."""
    hidden_BTE = x_BTD @ fast.w_in_BED.to(x_BTD.dtype).transpose(1, 2)
    return swiglu(hidden_BTE) @ fast.w_out_BDF.to(x_BTD.dtype).transpose(1, 2)


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

    def attend(self, x_BTD: Tensor, rotary: Rotary, cache: Cache | None, twice: bool) -> tuple[Tensor, Cache]:
        """The attention sub-layer."""
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), rotary, cache, twice)
        return x_BTD + self.attention_post_norm(y_BTD), cache

    def feed_fast(self, x_BTD: Tensor, fast: FastWeights) -> Tensor:
        """The fast MLP's sub-layer, with the given weights."""
        return x_BTD + self.fast_post_norm(fast_mlp(self.fast_norm(x_BTD), fast))

    def feed(self, x_BTD: Tensor) -> Tensor:
        """The static MLP's sub-layer."""
        return x_BTD + self.mlp_post_norm(self.mlp(self.mlp_norm(x_BTD)))


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

    def rotary(self, start: int, length: int, dtype: torch.dtype) -> Rotary:
        """Rotary angles of positions `start` to `start + length`; exact at any position a stream can reach."""
        half = self.config.head_width // 2
        device = self.embedding.device
        # float64: in float32 the angle itself would be off by whole radians after ten million tokens.
        frequency = self.config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        position = torch.arange(start, start + length, device=device, dtype=torch.float64)
        angle = position[:, None, None] * frequency
        return Rotary(angle.cos().to(wide(dtype)), angle.sin().to(wide(dtype)))

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, D]; the embedding where they are tied."""
        return self.embedding if self.config.tied_head else self.head

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head: logits [B, T, V] of the residual stream's end, in x's dtype."""
        return linear(self.final_norm(x_BTD), self.head_weight)

    def losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Negative log-likelihood of every target, [B, T] in float32 (float64 if the model is), masked or not."""
        logits_BTV = self.logits(x_BTD).to(wide(x_BTD.dtype))
        nll = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return nll.view(targets_BT.shape)

    def read_static(
        self, tokens_BT: Tensor, start: int, caches: tuple[Cache, ...] | None, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """Everything below the lowest fast weight: embedding, prefix, and the first suffix block's attention.

        In a standard model that is all blocks. tokens [B, T] at positions `start` and on; caches None starts a text.
        Returns the residual stream [B, T, D] and the caches, one for each attention that ran.
        """
        x_BTD = self.embed(tokens_BT, dtype)
        rotary = self.rotary(start, tokens_BT.shape[1], dtype)
        old: Iterator[Cache | None] = itertools.repeat(None) if caches is None else iter(caches)
        new = []
        for block in self.prefix:
            x_BTD, cache = block.attend(x_BTD, rotary, next(old), twice=False)
            x_BTD = block.feed(x_BTD)
            new.append(cache)
        if self.suffix:
            x_BTD, cache = self.suffix[0].attend(x_BTD, rotary, next(old), twice=False)
            new.append(cache)
        return x_BTD, tuple(new)

    def read_fast(
        self,
        x_BTD: Tensor,
        rotary: Rotary,
        fast: tuple[FastWeights, ...],
        caches: tuple[Cache, ...] | None,
        twice: bool,
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """The rest of the suffix with the given fast weights, one pair a block, and one cache a block but the first.

        Goes on from `read_static`. Returns the residual stream [B, T, D] and the caches.
        """
        old: Iterator[Cache | None] = itertools.repeat(None) if caches is None else iter(caches)
        new = []
        for i, (block, weights) in enumerate(zip(self.suffix, fast, strict=True)):
            if i > 0:
                x_BTD, cache = block.attend(x_BTD, rotary, next(old), twice)
                new.append(cache)
            x_BTD = block.feed(block.feed_fast(x_BTD, weights))
        return x_BTD, tuple(new)

    def initial_fast_weights(self, batch: int) -> tuple[FastWeights, ...]:
        """The learned start of the fast weights, the same for every sequence of the batch."""
        return tuple(
            FastWeights(block.fast.w_in.expand(batch, -1, -1), block.fast.w_out.expand(batch, -1, -1))
            for block in self.suffix
        )
