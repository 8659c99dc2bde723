"""The method as plain loops, from the configuration: what the product computes, written a second time for tests.

One text at a time, no caches, no compiled code, no derivative written out. Mixers are "full" and "window".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.model.rope import frequencies
from ttt_e2e.model.transformer import Transformer


def plain_losses(model: Transformer, tokens_T1: Tensor, learn: bool = True, chunk: int | None = None) -> Tensor:
    """Every token's loss [T] in nats, each mini-batch with what was learned from those before.

    chunk: mini-batches after which autograd's graph is cut, but for the initial fast weights; None: never.
    """
    config, texts, targets = model.config, tokens_T1[:-1], tokens_T1[1:]
    b = (config.mini_batch_size if model.suffix else None) or len(texts)
    layers = [_Layer(model, i) for i in range(config.num_hidden_layers)]
    head = model.embedding if config.tie_word_embeddings else model.head
    x = config.embedding_multiplier * model.embedding[texts]
    for layer in layers[: config.prefix_layers]:
        x = layer.mlp(layer.mixer(x))
    if model.suffix:
        x = layers[config.prefix_layers].mixer(x)
    fast = [list(block.fast.start()) for block in model.suffix]
    rates = [config.inner_loop.lr] * sum(map(len, fast))
    if config.inner_loop.learned_lr:
        factors = [x.exp() for block in model.suffix for x in block.log_lr_scale]
        rates = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    losses = []
    for i in range(0, len(texts), b):
        if chunk is not None and i > 0 and i % (chunk * b) == 0:
            starts = [block.fast.start() for block in model.suffix]
            both = [zip(ws, start, strict=True) for ws, start in zip(fast, starts, strict=True)]
            fast = [[start + (w - start).detach() for w, start in some] for some in both]
            for layer in layers[config.prefix_layers + 1 :]:
                layer.keys, layer.values = ([x.detach() for x in some] for some in (layer.keys, layer.values))
        y = x[i : i + b]
        for j, layer in enumerate(layers[config.prefix_layers :]):
            y = layer.mlp(layer.mixer(y) if j else y, fast[j])
        logits = _norm(y, model.final_norm.weight, config.rms_norm_eps) @ head.T
        log_p = _capped(logits, config.final_logit_softcapping).log_softmax(-1)
        losses.append(-torch.stack([log_p[t, target] for t, target in enumerate(targets[i : i + b])]))
        if learn and fast:
            flat = [w for some in fast for w in some]
            gradients = torch.autograd.grad(losses[-1].mean(), flat, create_graph=True)
            norm, clip = (
                math.sqrt(sum(float(g.detach().square().sum()) for g in gradients)),
                config.inner_loop.max_grad_norm,
            )
            if norm >= clip:  # else not a function of the norm; a root of zero would have no derivative
                gradients = [g / sum(h.square().sum() for h in gradients).sqrt() * clip for g in gradients]
            new = iter(w - rate * g for w, rate, g in zip(flat, rates, gradients, strict=True))
            fast = [[next(new) for _ in some] for some in fast]
    return torch.cat(losses)


class _Layer:
    """A block, and the keys and values that its attention has seen."""

    def __init__(self, model: Transformer, i: int) -> None:
        self.model, self.config, self.block = model, model.config, model.blocks[i]
        self.rope, self.local = model.config.rope_layers[i], model.config.local_rope_layers[i]
        self.window = None if model.config.mixers[i] == "full" else model.config.sliding_window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def norm(self, name: str, x: Tensor) -> Tensor:
        norm = getattr(self.block, name)
        return _norm(x, norm.weight, self.config.rms_norm_eps) if hasattr(norm, "weight") else x

    def mixer(self, x: Tensor) -> Tensor:
        return x + self.norm("mixer_post_norm", torch.stack([*map(self.attend, self.norm("mixer_norm", x))]))

    def attend(self, x_D: Tensor) -> Tensor:
        """Attention of one token over those that it sees."""
        config, mixer, position = self.config, self.block.mixer, len(self.keys)
        h, g = config.num_attention_heads, config.num_key_value_heads
        rows = mixer.w_qkv @ x_D + (mixer.b_qkv if config.attention_bias else 0)
        q, k, v = rows.view(-1, config.head_dim).split((h, g, g))
        if config.qk_norm_joint:
            pairs = ((q, mixer.q_norm), (k, mixer.k_norm))
            q, k = (_norm(y.flatten(), w, config.rms_norm_eps).view_as(y) for y, w in pairs)
        elif config.qk_norm:
            q, k = (_norm(y, w, config.rms_norm_eps) for y, w in ((q, mixer.q_norm), (k, mixer.k_norm)))
        self.keys.append(self.turn(k, position))
        self.values.append(v)
        first = 0 if self.window is None else max(0, len(self.keys) - self.window)
        keys, values = (torch.stack(some[first:]) for some in (self.keys, self.values))
        q, out = self.turn(q, position), []
        for head in range(h):
            scores = keys[:, head * g // h] @ q[head] / math.sqrt(config.head_dim)
            scores = _capped(scores, config.attn_logit_softcapping)
            seen = values[:, head * g // h]
            if first > 0 and config.attention_sink:
                scores = torch.cat((scores, mixer.sink_logit[head, None]))
                seen = torch.cat((seen, mixer.sink_value[head * g // h, None]))
            out.append(scores.softmax(0) @ seen)
        return mixer.w_out @ torch.cat(out) + (mixer.b_out if config.attention_out_bias else 0)

    def turn(self, x: Tensor, position: int) -> Tensor:
        if not self.rope:
            return x
        angle = position * frequencies(self.config, "cpu", self.local)
        a, b = x.chunk(2, -1)
        turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        return turned if self.local else self.config.rope_scaling.attention_factor * turned

    def mlp(self, x: Tensor, fast: list[Tensor] | None = None) -> Tensor:
        block = self.block
        if fast is None:
            out = self.gated(self.norm("mlp_norm", x), block.mlp.w_in, block.mlp.w_out)
            return x + self.norm("mlp_post_norm", out)
        if self.config.fast_rank is not None:
            up_in, down_in, up_out, down_out = fast
            fast = [block.fast.w_in + up_in @ down_in, block.fast.w_out + up_out @ down_out]
        if self.config.parallel_mlp:
            n = self.norm("mlp_norm", x)
            return x + self.norm("mlp_post_norm", self.gated(n, *fast) + self.gated(n, block.mlp.w_in, block.mlp.w_out))
        x = x + self.norm("fast_post_norm", self.gated(self.norm("fast_norm", x), *fast))
        return self.mlp(x) if self.config.static_mlp else x

    def gated(self, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        gate, value = (x @ w_in.T).chunk(2, -1)
        gated = F.silu(gate) if self.config.hidden_act == "silu" else F.gelu(gate, approximate="tanh")
        return (gated * value) @ w_out.T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()
