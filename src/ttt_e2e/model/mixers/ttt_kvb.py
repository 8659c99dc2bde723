"""TTT-KVB: sliding-window attention, and beside it a memory that binds keys to values (arXiv 2512.23675, baselines).

The nearest published layer is LaCT (arXiv 2505.23884). As there, the memory is a SwiGLU MLP per head, trained in
mini-batches while reading, with a step per token and head. Its loss here is the squared error, its update plain
gradient descent; see `memory`.

Shapes: B sequences, H heads, N = B H, T tokens, P pending tokens, D hidden size, K head dimension, F hidden width of
the inner MLP, E = 2 F; G key/value heads and S keys of the attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.counting import product_operations
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.attention import Attention, attention_cost
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, MixerCost, Positions
from ttt_e2e.model.mixers.memory import Memory, gradients, memory_operations, merge_heads, project, split_lengths
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.fast_mlp import FastWeights, fast_mlp
from ttt_e2e.ops.linear import linear


class TTTKVBState(NamedTuple):
    """The attention's cache; the memory's weights; and the tokens of the incomplete mini-batch."""

    k_BGSK: Tensor
    v_BGSK: Tensor
    w_in_BHEK: Tensor
    w_out_BHKF: Tensor
    pending_k_BHPK: Tensor
    pending_v_BHPK: Tensor
    pending_theta_BHP: Tensor


class TTTKVB(Mixer):
    """Sliding-window attention, plus the memory's output for each token's query.

    A token reads the memory as it was at the start of its mini-batch; anything younger is in the window. The step of
    every head is memory.lr sigmoid(w_step x_t + step_bias) / mini_batch_size, divided as in `memory`.
    """

    State = TTTKVBState
    no_weight_decay = ("step_bias",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.mini_batch_size is not None, "ModelConfig lets no TTT-KVB through without a mini-batch"
        self.config, self.mini_batch = config, config.mini_batch_size
        self.attention = Attention(config, config.sliding_window)
        self.memory = Memory(config)
        self.w_qkv = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.w_step = nn.Parameter(torch.empty(config.num_attention_heads, config.hidden_size))
        self.step_bias = nn.Parameter(torch.empty(config.num_attention_heads))
        self.read_norm = nn.Parameter(torch.ones(config.head_dim))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the memory at its own scale and set all steps to about half of `memory.lr`; the rest as every mixer."""
        super().reset_parameters(std, generator)
        self.memory.reset_parameters(generator)
        with torch.no_grad():
            self.step_bias.zero_()

    def forward(
        self, x_BTD: Tensor, positions: Positions, state: TTTKVBState | None = None, cache_view: CacheView = ALL_FILLED
    ) -> tuple[Tensor, TTTKVBState]:
        """See `Mixer.forward`. A Python loop runs over the mini-batches. Memory is linear in T."""
        config, b = self.config, self.mini_batch
        batch, length = x_BTD.shape[:2]
        old = None if state is None else KVCache(*state[:2])
        y_BTD, cache = self.attention(x_BTD, positions, old, cache_view._replace(donated=False))

        q_NTK, k_NTK, v_NTK = project(x_BTD, self.w_qkv, config)
        z_BTH = linear(x_BTD, self.w_step).to(accumulation_dtype(x_BTD.dtype)) + self.step_bias
        theta_NT = (config.memory.lr / b * torch.sigmoid(z_BTH)).transpose(1, 2).flatten(0, 1)
        if state is None:
            fast, pending = self.memory.start(batch, x_BTD.dtype), 0
        else:
            fast = FastWeights(state.w_in_BHEK.flatten(0, 1), state.w_out_BHKF.flatten(0, 1))
            pending, new = state.pending_k_BHPK.shape[2], (k_NTK, v_NTK, theta_NT)
            k_NTK, v_NTK, theta_NT = (torch.cat((p.flatten(0, 1), x), 1) for p, x in zip(state[4:], new, strict=True))

        reads = []
        queries = q_NTK.split(split_lengths(pending, length, b), 1)
        for q, k, v, theta in zip(queries, k_NTK.split(b, 1), v_NTK.split(b, 1), theta_NT.split(b, 1), strict=True):
            reads.append(fast_mlp(q, fast)[0])
            if k.shape[1] == b:
                (step,) = gradients(fast, k, v, theta)
                fast = FastWeights(*(w - g for w, g in zip(fast, step, strict=True)))
        y_BTD = y_BTD + linear(merge_heads(torch.cat(reads, 1), self.read_norm, config), self.w_out)

        # Copies of the few tokens that are kept: a view would keep all.
        done = (pending + length) // b * b
        left = [x_NT[:, done:].clone() for x_NT in (k_NTK, v_NTK, theta_NT)]
        return y_BTD, TTTKVBState(*cache, *(x_N.unflatten(0, (batch, -1)) for x_N in (*fast, *left)))


def ttt_kvb_cost(config: ModelConfig, context: int) -> MixerCost:
    """The cost of one mixer at `context` tokens; see `model.cost`."""
    width, heads, b = config.hidden_size, config.num_attention_heads, config.mini_batch_size or 1
    attention = attention_cost(config, config.sliding_window, context)
    read, gradient = memory_operations(config)
    weights, projections = 3 * width * config.memory.intermediate_size, width * (4 * width + heads)
    learn, pending = read + gradient, min(context, b)
    static = product_operations(1, 1, projections) + read
    text = attention.text + context * static + context // b * b * learn
    learned = (-(-context // b) - 1) * b  # what a later token reads the memory of
    return MixerCost(
        parameters=attention.parameters + weights + projections + heads + config.head_dim,
        cached=attention.cached + 2 * pending * width,
        accumulated=weights + pending * heads,
        text=text,
        training=text + 2 * (attention.text + context * static + learned * learn),
        token=attention.token + static + learn,
    )
