"""Titans, memory as context (arXiv 2501.00663, section 4.1, equations 21 to 25).

The text is cut into segments of `window` tokens. In its segment a token attends to persistent keys and values, to what
the memory gave for each token so far, and to the tokens so far. The memory learns from what attention puts out, with
momentum and forgetting (see `memory`), and its reading of that gates it.

The paper reads the memory as it is before and after the whole segment. Here both readings, of the context
h_t = f(q_t) and of the gate, use the weights that stand at the start of the token's mini-batch: so the layer is causal.

Shapes: B sequences, H heads, N = B H, T tokens, P pending tokens, Q persistent keys, S = 2 keys for every token of the
running segment, D hidden size, K head dimension, F hidden width of the inner MLP, E = 2 F.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.counting import num_pairs, product_operations, score_operations
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, MixerCost, Positions
from ttt_e2e.model.mixers.memory import (
    Memory,
    ScanCoefficients,
    gradients,
    memory_operations,
    merge_heads,
    project,
    scan_coefficients,
    split_lengths,
)
from ttt_e2e.ops.attention import sdpa
from ttt_e2e.ops.elementwise import accumulation_dtype, rms_norm, rotate
from ttt_e2e.ops.fast_mlp import FastWeights, fast_mlp
from ttt_e2e.ops.linear import linear

# Where momentum and forgetting start, before the sigmoid: eta = 0.88, a mean over some eight tokens; and alpha = 6e-6,
# which forgets nothing to speak of. Forgetting draws the weights to 0, where f and all gradients vanish; measured on
# random pairs with b = 64 and 1024, an alpha of 1e-4 outran what a new memory learns.
MOMENTUM_BIAS = 2.0
FORGET_BIAS = -12.0


class TitansState(NamedTuple):
    """The running segment's keys and values; weights and momentum; the tokens of the incomplete mini-batch.

    Every token of the segment has two rotated keys: that of the memory's output for it, then its own.
    """

    k_BHSK: Tensor
    v_BHSK: Tensor
    w_in_BHEK: Tensor
    w_out_BHKF: Tensor
    momentum_in_BHEK: Tensor
    momentum_out_BHKF: Tensor
    pending_k_BHPK: Tensor
    pending_v_BHPK: Tensor
    pending_theta_BHP: Tensor
    pending_eta_BHP: Tensor
    pending_keep_BHP: Tensor


class Titans(Mixer):
    """Attention within segments, with a memory of everything before as context.

    Keys and values have as many heads as queries, because the memory's output has one vector for every head. The
    memory's output for a token has that token's rotary position; persistent keys have none.

    The steps come from the layer's input: with z = w_steps x + steps_bias, three numbers per head, eta = sigmoid(z_1),
    keep = sigmoid(-z_2) and theta = memory.lr sigmoid(z_0) (1 - eta) / mini_batch_size, divided as in `memory`.
    The factor 1 - eta makes momentum a mean of gradients, so that the step's bound does not depend on it.
    """

    State = TitansState
    no_weight_decay = ("steps_bias",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.mini_batch_size is not None, "ModelConfig lets no Titans through without a mini-batch"
        self.config, self.mini_batch = config, config.mini_batch_size
        width, heads, head_width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.w_q = nn.Parameter(torch.empty(width, width))
        self.w_kv = nn.Parameter(torch.empty(2 * width, width))
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(head_width))
            self.k_norm = nn.Parameter(torch.ones(head_width))
        persistent = (heads, config.memory.num_persistent_tokens, head_width)
        self.persistent_k, self.persistent_v = (nn.Parameter(torch.empty(persistent)) for _ in range(2))
        self.memory = Memory(config)
        self.w_context = nn.Parameter(torch.empty(width, width))  # from tokens to the memory's queries
        self.context_norm = nn.Parameter(torch.ones(head_width))
        self.w_memory = nn.Parameter(torch.empty(3 * width, width))  # from attention to its queries, keys and values
        self.gate_norm = nn.Parameter(torch.ones(head_width))
        self.w_steps = nn.Parameter(torch.empty(3 * heads, width))
        self.steps_bias = nn.Parameter(torch.empty(3 * heads))
        self.w_out = nn.Parameter(torch.empty(width, width))

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the memory at its own scale and its steps around this file's constants, the rest as every mixer does."""
        super().reset_parameters(std, generator)
        self.memory.reset_parameters(generator)
        with torch.no_grad():
            for bias_H, value in zip(self.steps_bias.chunk(3), (0.0, MOMENTUM_BIAS, FORGET_BIAS), strict=True):
                bias_H.fill_(value)

    def forward(
        self, x_BTD: Tensor, positions: Positions, state: TitansState | None = None, cache_view: CacheView = ALL_FILLED
    ) -> tuple[Tensor, TitansState]:
        """Read the memory, attend, gate, and train the memory, mini-batch by mini-batch; see `Mixer.forward`.

        For the backward pass every mini-batch keeps its segment's keys up to its end, so memory is proportional to
        T x sliding_window / mini_batch_size.
        """
        config, b, persistent = self.config, self.mini_batch, self.config.memory.num_persistent_tokens
        batch, length = x_BTD.shape[:2]
        state = self._start(x_BTD) if state is None else state
        w_in, w_out, s_in, s_out, pending_k_NPK, pending_v_NPK, *old_NP = (x_BH.flatten(0, 1) for x_BH in state[2:])
        fast, momentum = FastWeights(w_in, w_out), FastWeights(s_in, s_out)
        pending = pending_k_NPK.shape[1]
        done = (pending + length) // b * b

        # What follows from x alone, for all tokens at once.
        q_BHTK = self._heads(linear(x_BTD, self.w_q), "q_norm", positions)
        k_BHTK, v_BHTK = self._keys(x_BTD, positions)
        (context_NTK,) = project(x_BTD, self.w_context, config)
        steps_NT = [torch.cat(pair, 1) for pair in zip(old_NP, self._steps(x_BTD), strict=True)]
        coefficients = []  # of the mini-batches that become complete
        if done > 0:
            stacked = scan_coefficients(*(x_NT[:, :done].unflatten(1, (-1, b)) for x_NT in steps_NT))
            coefficients = [ScanCoefficients(*own) for own in zip(*(x.unbind(1) for x in stacked), strict=True)]

        # The keys and values that are seen: the persistent ones, then the segment's.
        first_k_BHQK, first_v_BHQK = self._persistent(x_BTD)
        k_seen, v_seen = torch.cat((first_k_BHQK, state.k_BHSK), 2), torch.cat((first_v_BHQK, state.v_BHSK), 2)
        outputs, sizes = [], split_lengths(pending, length, b)
        along = ((q_BHTK, 2), (k_BHTK, 2), (v_BHTK, 2), (context_NTK, 1), (positions.cos, 0), (positions.sin, 0))
        cut = zip(*(x.split(sizes, dim) for x, dim in along), strict=True)
        for i, (q, k, v, context, cos, sin) in enumerate(cut):
            h_BTD = merge_heads(fast_mlp(context, fast)[0], self.context_norm, config)
            h_k, h_v = self._keys(h_BTD, Positions(cos, sin))
            k_seen = torch.cat((k_seen, torch.stack((h_k, k), 3).flatten(2, 3)), 2)
            v_seen = torch.cat((v_seen, torch.stack((h_v, v), 3).flatten(2, 3)), 2)
            y_BHTK = sdpa(q, k_seen, v_seen, None, None, _visible(q, k_seen, persistent))
            y_BTD = y_BHTK.transpose(1, 2).flatten(2)

            memory_q, memory_k, memory_v = project(y_BTD, self.w_memory, config)
            gate_BTD = merge_heads(fast_mlp(memory_q, fast)[0], self.gate_norm, config)
            outputs.append(y_BTD * torch.sigmoid(gate_BTD))
            pending_k_NPK = torch.cat((pending_k_NPK, memory_k), 1)
            pending_v_NPK = torch.cat((pending_v_NPK, memory_v), 1)
            if i < len(coefficients):
                fast, momentum = _learn(fast, momentum, pending_k_NPK, pending_v_NPK, coefficients[i])
                pending_k_NPK, pending_v_NPK = pending_k_NPK[:, :0], pending_v_NPK[:, :0]
            if k_seen.shape[2] == persistent + 2 * config.sliding_window:
                k_seen, v_seen = first_k_BHQK, first_v_BHQK

        # Copies of the few numbers that are kept: a view would keep all.
        kept = (pending_k_NPK, pending_v_NPK, *(x_NT[:, done:].clone() for x_NT in steps_NT))
        segment = (x_BHSK[:, :, persistent:] for x_BHSK in (k_seen, v_seen))
        after = TitansState(*segment, *(x_N.unflatten(0, (batch, -1)) for x_N in (*fast, *momentum, *kept)))
        return linear(torch.cat(outputs, 1), self.w_out), after

    def _start(self, x_BTD: Tensor) -> TitansState:
        """The state before a text: an empty segment, the initial weights, no momentum, no pending tokens."""
        batch, heads = len(x_BTD), self.config.num_attention_heads
        w_in, w_out = (w_N.unflatten(0, (batch, heads)) for w_N in self.memory.start(batch, x_BTD.dtype))
        s_in, s_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
        keys, steps = x_BTD.new_empty(batch, heads, 0, self.config.head_dim), w_in.new_empty(batch, heads, 0)
        return TitansState(keys, keys, w_in, w_out, s_in, s_out, keys, keys, steps, steps, steps)

    def _steps(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, eta and keep of every token, [N, T] each."""
        z_BTJ = linear(x_BTD, self.w_steps).to(accumulation_dtype(x_BTD.dtype)) + self.steps_bias
        step, momentum, forget = (z_BTH.transpose(1, 2).flatten(0, 1) for z_BTH in z_BTJ.chunk(3, 2))
        rate = self.config.memory.lr / self.mini_batch
        return rate * torch.sigmoid(step) * torch.sigmoid(-momentum), torch.sigmoid(momentum), torch.sigmoid(-forget)

    def _keys(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values of the attention for tokens, or for the memory's outputs for them: [B, H, T, K] each."""
        k_BTD, v_BTD = linear(x_BTD, self.w_kv).chunk(2, 2)
        v_BTHK = v_BTD.unflatten(2, (self.config.num_attention_heads, -1))
        return self._heads(k_BTD, "k_norm", positions), v_BTHK.transpose(1, 2)

    def _heads(self, x_BTD: Tensor, norm: str, positions: Positions) -> Tensor:
        """Queries or keys by heads, normalised and rotated."""
        x_BTHK = x_BTD.unflatten(2, (self.config.num_attention_heads, -1)).to(accumulation_dtype(x_BTD.dtype))
        if self.config.qk_norm:
            x_BTHK, _ = rms_norm(x_BTHK, getattr(self, norm), self.config.rms_norm_eps)
        return rotate(x_BTHK, positions.cos, positions.sin)[0].to(x_BTD.dtype).transpose(1, 2)

    def _persistent(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The persistent keys and values, normalised but not rotated, [B, H, Q, K] in x's dtype."""
        k_HQK = self.persistent_k.to(accumulation_dtype(x_BTD.dtype))
        if self.config.qk_norm:
            k_HQK, _ = rms_norm(k_HQK, self.k_norm, self.config.rms_norm_eps)
        k_BHQK, v_BHQK = (x.to(x_BTD.dtype).expand(len(x_BTD), -1, -1, -1) for x in (k_HQK, self.persistent_v))
        return k_BHQK, v_BHQK


def _visible(q_BHTK: Tensor, k_BHSK: Tensor, persistent: int) -> Tensor:
    """[T, Q + S]: 0 for persistent keys and the two keys of each token up to a query's own, else minus infinity."""
    length, keys = q_BHTK.shape[2], k_BHSK.shape[2]
    token_S = (torch.arange(keys, device=q_BHTK.device) - persistent) // 2  # negative for the persistent ones
    segment = (keys - persistent) // 2
    token_T = torch.arange(segment - length, segment, device=q_BHTK.device)
    return q_BHTK.new_zeros(length, keys).masked_fill_(token_S > token_T[:, None], -torch.inf)


def _learn(
    fast: FastWeights, momentum: FastWeights, k_NTK: Tensor, v_NTK: Tensor, own: ScanCoefficients
) -> tuple[FastWeights, FastWeights]:
    """Weights and momentum after a mini-batch of T tokens; `own` is its share of each."""
    weights, carried, kept = (x_N[:, None, None] for x_N in (own.weights, own.carried, own.momentum))
    of_weights, of_momentum = gradients(fast, k_NTK, v_NTK, own.in_weights, own.in_momentum)
    new = (weights * w + carried * s - g for w, s, g in zip(fast, momentum, of_weights, strict=True))
    return FastWeights(*new), FastWeights(*(kept * s - g for s, g in zip(momentum, of_momentum, strict=True)))


def titans_cost(config: ModelConfig, context: int) -> MixerCost:
    """The cost of one mixer at `context` tokens; see `model.cost`."""
    width, heads, b = config.hidden_size, config.num_attention_heads, config.mini_batch_size or 1
    persistent = config.memory.num_persistent_tokens
    read, gradient = memory_operations(config)
    weights, projections = 3 * width * config.memory.intermediate_size, width * (8 * width + 3 * heads)
    vectors = 2 * persistent * width + 3 * heads + (4 if config.qk_norm else 2) * config.head_dim
    segments, rest = divmod(context, config.sliding_window)

    def attention(length: int) -> int:  # over a segment, whose every token has two keys
        return score_operations(config, length * persistent + 2 * num_pairs(length, None))

    # What the memory gave goes through the attention's projection to keys and values too.
    static = product_operations(1, 1, projections + 2 * width * width) + 2 * read
    still = context * static + segments * attention(config.sliding_window) + attention(rest)
    learn = read + gradient + read  # one vjp of the residual, then a gradient each for weights and momentum
    text = still + context // b * b * learn
    seen = persistent + (config.sliding_window + 1 if segments else 2 * (context + 1))
    pending = min(context, b)
    learned = -(-context // b) - 1  # mini-batches after which a token reads the memory
    going_back = learned * (read + gradient) + max(0, learned - 1) * read  # the last momentum is of no use
    return MixerCost(
        parameters=weights + projections + vectors,
        cached=(4 * min(context, config.sliding_window) + 2 * pending) * width,
        accumulated=2 * weights + 3 * pending * heads,
        text=text,
        training=text + 2 * (still + b * going_back),
        token=static + score_operations(config, seen) + learn,
    )
