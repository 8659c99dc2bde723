"""Windowed attention, its gradients and their gradients, tile by tile in PyTorch: linear memory on any device.

`windowed_attention` holds the formulas and the operators that call these functions. Here every function walks over
blocks of queries and, for each, over the blocks of keys that some query of the block sees. A tile is one block of
queries against one block of keys, for all sequences and heads at once; only a few tiles exist at any time.

Shapes: N = B G pairs of sequence and key head; R = t H / G rows, the t queries of a block for each of the query heads
that share a key head; s keys of a block; K head width. Sums are kept in float32, or float64 for float64 inputs;
operands of matrix products have the inputs' dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_e2e.ops.elementwise import accumulation_dtype

# Large enough for matrix products to run at speed, small enough for a tile of a few heads to stay in a CPU's cache.
QUERIES = 256
KEYS = 512


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, empty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention o [B, H, T, K] and the scores' logsumexp [B, H, T]."""
    rows = _Rows(q, k, window, empty)
    k_NSK, v_NSK = k.flatten(0, 1), v.flatten(0, 1)
    o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), rows.statistic()
    for block in rows.blocks():
        q_NRK = rows.take(q, block) * rows.scale
        largest_NR1 = rows.zeros(q_NRK, 1).fill_(torch.finfo(rows.dtype).min)  # finite: its differences are no NaN
        total_NR1, o_NRK = rows.zeros(q_NRK, 1), rows.zeros(q_NRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_NRs = _product(q_NRK, k_NSK[:, keys].mT, rows.dtype)
            rows.hide_(p_NRs, block, keys, -torch.inf)
            larger_NR1 = torch.maximum(largest_NR1, p_NRs.amax(-1, keepdim=True))
            shrink_NR1 = (largest_NR1 - larger_NR1).exp_()
            p_NRs.sub_(larger_NR1).exp_()
            total_NR1.mul_(shrink_NR1).add_(p_NRs.sum(-1, keepdim=True))
            _add_product_(o_NRK.mul_(shrink_NR1), p_NRs, v_NSK[:, keys])
            largest_NR1 = larger_NR1
        rows.put(o, block, o_NRK.div_(total_NR1))
        rows.put(lse[..., None], block, largest_NR1.add_(total_NR1.log_()))
    return o, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    own: int,
    window: int,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [B, H, T, K] and dk, dv [B, G, own, K]."""
    rows = _Rows(q, k, window, empty, own)
    k_NSK, v_NSK = k.flatten(0, 1), v.flatten(0, 1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk_NOK, dv_NOK = rows.zeros(k_NSK[:, :own], k.shape[3]), rows.zeros(v_NSK[:, :own], k.shape[3])
    for block in rows.blocks():
        q_NRK, do_NRK = rows.take(q, block) * rows.scale, rows.take(do, block)
        lse_NR1 = rows.take(lse[..., None], block)
        delta_NR1 = rows.dot(do_NRK, rows.take(o, block))
        dq_NRK = rows.zeros(q_NRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_NRs = rows.softmax(q_NRK, k_NSK, lse_NR1, block, keys)
            ds_NRs = _product(do_NRK, v_NSK[:, keys].mT, rows.dtype).sub_(delta_NR1).mul_(p_NRs)
            _add_product_(dq_NRK, ds_NRs, k_NSK[:, keys])
            if keys.start >= rows.cached:
                own_keys = rows.among_own(keys)
                _add_product_(dk_NOK[:, own_keys], ds_NRs.mT, q_NRK)
                _add_product_(dv_NOK[:, own_keys], p_NRs.mT, do_NRK)
        rows.put(dq, block, dq_NRK.mul_(rows.scale))
    return dq, rows.heads(dk_NOK, k), rows.heads(dv_NOK, v)


def double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    a: Tensor,
    b_own: Tensor,
    c_own: Tensor,
    own: int,
    window: int,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K]."""
    rows = _Rows(q, k, window, empty, own)
    k_NSK, v_NSK, b_NOK, c_NOK = (x.flatten(0, 1) for x in (k, v, b_own, c_own))
    gq, gdo = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    gk_NSK, gv_NSK = rows.zeros(k_NSK, k.shape[3]), rows.zeros(v_NSK, k.shape[3])
    for block in rows.blocks():
        q_NRK, a_NRK = rows.take(q, block) * rows.scale, rows.take(a, block) * rows.scale
        do_NRK, o_NRK, lse_NR1 = rows.take(do, block), rows.take(o, block), rows.take(lse[..., None], block)
        delta_NR1 = rows.dot(do_NRK, o_NRK)

        # First sweep: what needs whole rows.
        mean_NR1, gdo_NRK = rows.zeros(q_NRK, 1), rows.zeros(q_NRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_NRs = rows.softmax(q_NRK, k_NSK, lse_NR1, block, keys)
            px_NRs = rows.tangent(q_NRK, a_NRK, k_NSK, b_NOK, keys).mul_(p_NRs)
            mean_NR1 += px_NRs.sum(-1, keepdim=True)
            _add_product_(gdo_NRK, px_NRs, v_NSK[:, keys])
            if keys.start >= rows.cached:
                _add_product_(gdo_NRK, p_NRs, c_NOK[:, rows.among_own(keys)])
        gdo_NRK -= mean_NR1 * o_NRK
        w_NR1 = rows.dot(do_NRK, gdo_NRK)
        rows.put(gdo, block, gdo_NRK)

        # Second sweep: the gradients of q, k and v.
        gq_NRK = rows.zeros(q_NRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_NRs = rows.softmax(q_NRK, k_NSK, lse_NR1, block, keys)
            ds_NRs = _product(do_NRK, v_NSK[:, keys].mT, rows.dtype).sub_(delta_NR1).mul_(p_NRs)
            x_NRs = rows.tangent(q_NRK, a_NRK, k_NSK, b_NOK, keys).sub_(mean_NR1)
            g_NRs = x_NRs * ds_NRs
            _add_product_(gv_NSK[:, keys], x_NRs.mul_(p_NRs).mT, do_NRK)
            if keys.start >= rows.cached:
                own_keys = rows.among_own(keys)
                y_NRs = _product(do_NRK, c_NOK[:, own_keys].mT, rows.dtype)
                g_NRs.addcmul_(p_NRs, y_NRs.sub_(w_NR1))
                _add_product_(gq_NRK, ds_NRs, b_NOK[:, own_keys])
            else:
                g_NRs.addcmul_(p_NRs, w_NR1, value=-1)
            _add_product_(gq_NRK, g_NRs, k_NSK[:, keys])
            _add_product_(gk_NSK[:, keys], g_NRs.mT, q_NRK)
            _add_product_(gk_NSK[:, keys], ds_NRs.mT, a_NRK)
        rows.put(gq, block, gq_NRK.mul_(rows.scale))
    return gq, rows.heads(gk_NSK, k), rows.heads(gv_NSK, v), gdo


class _Rows:
    """The walk over blocks of queries and keys, and the way between [B, H, T, ...] and a block's rows [N, R, ...]."""

    def __init__(self, q_BHTK: Tensor, k_BGSK: Tensor, window: int, empty: Tensor | None, own: int = 0):
        self.batch, self.heads_q, self.queries, width = q_BHTK.shape
        self.heads_k, self.keys = k_BGSK.shape[1:3]
        self.window, self.empty = window, 0 if empty is None else int(empty)
        self.cached = self.keys - own  # how many keys are constants; no block of keys reaches across
        self.offset = self.keys - self.queries  # query i stands at key offset + i
        self.scale = width**-0.5
        self.dtype = accumulation_dtype(q_BHTK.dtype)
        self.device = q_BHTK.device

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.queries, QUERIES):
            yield slice(start, min(start + QUERIES, self.queries))

    def key_blocks(self, block: slice) -> Iterator[slice]:
        """Every key that some query of the block sees."""
        first, last = max(self.empty, self.offset + block.start - self.window + 1), self.offset + block.stop
        middle = min(max(first, self.cached), last)
        for low, high in ((first, middle), (middle, last)):
            for start in range(low, high, KEYS):
                yield slice(start, min(start + KEYS, high))

    def among_own(self, keys: slice) -> slice:
        return slice(keys.start - self.cached, keys.stop - self.cached)

    def take(self, x_BHTK: Tensor, block: slice) -> Tensor:
        return x_BHTK[:, :, block].reshape(self.batch * self.heads_k, -1, x_BHTK.shape[3])

    def put(self, x_BHTK: Tensor, block: slice, rows_NRK: Tensor) -> None:
        x_BHTK[:, :, block] = rows_NRK.view(self.batch, self.heads_q, -1, x_BHTK.shape[3])

    def heads(self, x_NSK: Tensor, like_BGSK: Tensor) -> Tensor:
        return x_NSK.unflatten(0, like_BGSK.shape[:2]).to(like_BGSK.dtype)

    def statistic(self) -> Tensor:
        return torch.empty(self.batch, self.heads_q, self.queries, dtype=self.dtype, device=self.device)

    def zeros(self, like: Tensor, width: int) -> Tensor:
        return torch.zeros(*like.shape[:2], width, dtype=self.dtype, device=self.device)

    def dot(self, x_NRK: Tensor, y_NRK: Tensor) -> Tensor:
        return (x_NRK.to(self.dtype) * y_NRK).sum(-1, keepdim=True)

    def softmax(self, q_NRK: Tensor, k_NSK: Tensor, lse_NR1: Tensor, block: slice, keys: slice) -> Tensor:
        p_NRs = _product(q_NRK, k_NSK[:, keys].mT, self.dtype).sub_(lse_NR1).exp_()
        self.hide_(p_NRs, block, keys, 0.0)
        return p_NRs

    def tangent(self, q_NRK: Tensor, a_NRK: Tensor, k_NSK: Tensor, b_NOK: Tensor, keys: slice) -> Tensor:
        x_NRs = _product(a_NRK, k_NSK[:, keys].mT, self.dtype)
        if keys.start >= self.cached:
            _add_product_(x_NRs, q_NRK, b_NOK[:, self.among_own(keys)].mT)
        return x_NRs

    def hide_(self, x_NRs: Tensor, block: slice, keys: slice, value: float) -> None:
        """Overwrite what the queries do not see; tiles that all of them see whole are left alone."""
        first, last = self.offset + block.start, self.offset + block.stop - 1
        if keys.stop - 1 <= first and keys.start > last - self.window:
            return
        position_t1 = torch.arange(first, last + 1, device=self.device)[:, None]
        distance_ts = position_t1 - torch.arange(keys.start, keys.stop, device=self.device)
        hidden_ts = (distance_ts < 0) | (distance_ts >= self.window)
        x_NRs.unflatten(1, (-1, hidden_ts.shape[0])).masked_fill_(hidden_ts, value)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(x, y).to(dtype)


def _add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y, the operands in y's dtype."""
    if total.dtype == y.dtype:
        total.baddbmm_(x, y)
    else:
        total += torch.bmm(x.to(y.dtype), y)
