"""Attention, its gradients and the gradients of these, tile by tile in PyTorch: linear memory on any device.

`reference.py` holds the formulas. Every function here walks over blocks of queries and, for each, over the blocks of
keys that some query of the block sees. A tile is one block of queries against one block of keys, for all sequences and
heads at once; only a few tiles exist at any time.

Shapes: P = B G pairs of sequence and key head; R = t H / G rows, the t queries of a block for each of the query heads
that share a key head; s keys of a block. Sums are kept in float32, or float64 for float64 inputs; operands of matrix
products have the inputs' dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention.mask import Attended, KeyView, Tangents, hidden_keys
from ttt_e2e.ops.elementwise import accumulation_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, view: KeyView) -> tuple[Tensor, Tensor]:
    """Attention o [B, H, T, K] and the scores' logsumexp [B, H, T]."""
    rows = _Rows(q, k, view)
    k_PSK, v_PSK = k.flatten(0, 1), v.flatten(0, 1)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=rows.dtype, device=q.device)
    for block in rows.blocks():
        q_PRK = rows.take(q, block) * rows.scale
        largest_PR1 = rows.zeros(q_PRK, 1).fill_(torch.finfo(rows.dtype).min)  # finite, so that differences are not NaN
        total_PR1, o_PRK = rows.zeros(q_PRK, 1), rows.zeros(q_PRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_PRs = torch.bmm(q_PRK, k_PSK[:, keys].mT).to(rows.dtype)
            rows.mask_(p_PRs, block, keys, -torch.inf)
            larger_PR1 = torch.maximum(largest_PR1, p_PRs.amax(-1, keepdim=True))
            shrink_PR1 = (largest_PR1 - larger_PR1).exp_()
            p_PRs.sub_(larger_PR1).exp_()
            total_PR1.mul_(shrink_PR1).add_(p_PRs.sum(-1, keepdim=True))
            _add_product_(o_PRK.mul_(shrink_PR1), p_PRs, v_PSK[:, keys])
            largest_PR1 = larger_PR1
        rows.put(o, block, o_PRK.div_(total_PR1))
        rows.put(lse[..., None], block, largest_PR1.add_(total_PR1.log_()))
    return o, lse


def backward(attended: Attended, do: Tensor, dlse: Tensor | None, view: KeyView) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [B, H, T, K] and dk, dv [B, G, N, K]."""
    q, k, v, o, lse = attended
    rows = _Rows(q, k, view)
    k_PSK, v_PSK = k.flatten(0, 1), v.flatten(0, 1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk_PNK, dv_PNK = (rows.zeros(k_PSK[:, : view.num_new_keys], k.shape[3]) for _ in range(2))
    for block in rows.blocks():
        q_PRK, do_PRK = rows.take(q, block) * rows.scale, rows.take(do, block)
        lse_PR1 = rows.take(lse[..., None], block)
        delta_PR1 = rows.delta(do_PRK, rows.take(o, block), dlse, block)
        dq_PRK = rows.zeros(q_PRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_PRs = rows.softmax(q_PRK, k_PSK, lse_PR1, block, keys)
            ds_PRs = torch.bmm(do_PRK, v_PSK[:, keys].mT).to(rows.dtype).sub_(delta_PR1).mul_(p_PRs)
            _add_product_(dq_PRK, ds_PRs, k_PSK[:, keys])
            if keys.start >= rows.cached:
                new_keys = rows.among_new(keys)
                _add_product_(dk_PNK[:, new_keys], ds_PRs.mT, q_PRK)
                _add_product_(dv_PNK[:, new_keys], p_PRs.mT, do_PRK)
        rows.put(dq, block, dq_PRK.mul_(rows.scale))
    return dq, rows.heads(dk_PNK, k), rows.heads(dv_PNK, v)


def double_backward(
    attended: Attended, do: Tensor, dlse: Tensor | None, tangents: Tangents, view: KeyView
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K], gdlse [B, H, T]."""
    (q, k, v, o, lse), (a, b, c) = attended, tangents
    rows = _Rows(q, k, view)
    k_PSK, v_PSK, b_PNK, c_PNK = (x.flatten(0, 1) for x in (k, v, b, c))
    gq, gdo = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    gk_PSK, gv_PSK = rows.zeros(k_PSK, k.shape[3]), rows.zeros(v_PSK, k.shape[3])
    gdlse = torch.empty(q.shape[:3], dtype=rows.dtype, device=q.device)
    for block in rows.blocks():
        q_PRK, a_PRK = rows.take(q, block) * rows.scale, rows.take(a, block) * rows.scale
        do_PRK, o_PRK, lse_PR1 = rows.take(do, block), rows.take(o, block), rows.take(lse[..., None], block)
        delta_PR1 = rows.delta(do_PRK, o_PRK, dlse, block)

        # First sweep: what needs whole rows.
        mean_PR1, gdo_PRK = rows.zeros(q_PRK, 1), rows.zeros(q_PRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_PRs = rows.softmax(q_PRK, k_PSK, lse_PR1, block, keys)
            px_PRs = rows.tangent(q_PRK, a_PRK, k_PSK, b_PNK, keys).mul_(p_PRs)
            mean_PR1 += px_PRs.sum(-1, keepdim=True)
            _add_product_(gdo_PRK, px_PRs, v_PSK[:, keys])
            if keys.start >= rows.cached:
                _add_product_(gdo_PRK, p_PRs, c_PNK[:, rows.among_new(keys)])
        gdo_PRK -= mean_PR1 * o_PRK
        w_PR1 = rows.dot(do_PRK, gdo_PRK)
        rows.put(gdo, block, gdo_PRK)
        rows.put(gdlse[..., None], block, mean_PR1)

        # Second sweep: the gradients of q, k and v.
        gq_PRK = rows.zeros(q_PRK, q.shape[3])
        for keys in rows.key_blocks(block):
            p_PRs = rows.softmax(q_PRK, k_PSK, lse_PR1, block, keys)
            ds_PRs = torch.bmm(do_PRK, v_PSK[:, keys].mT).to(rows.dtype).sub_(delta_PR1).mul_(p_PRs)
            x_PRs = rows.tangent(q_PRK, a_PRK, k_PSK, b_PNK, keys).sub_(mean_PR1)
            g_PRs = x_PRs * ds_PRs
            _add_product_(gv_PSK[:, keys], x_PRs.mul_(p_PRs).mT, do_PRK)
            if keys.start >= rows.cached:
                new_keys = rows.among_new(keys)
                y_PRs = torch.bmm(do_PRK, c_PNK[:, new_keys].mT).to(rows.dtype)
                g_PRs.addcmul_(p_PRs, y_PRs.sub_(w_PR1))
                _add_product_(gq_PRK, ds_PRs, b_PNK[:, new_keys])
            else:
                g_PRs.addcmul_(p_PRs, w_PR1, value=-1)
            _add_product_(gq_PRK, g_PRs, k_PSK[:, keys])
            _add_product_(gk_PSK[:, keys], g_PRs.mT, q_PRK)
            _add_product_(gk_PSK[:, keys], ds_PRs.mT, a_PRK)
        rows.put(gq, block, gq_PRK.mul_(rows.scale))
    return gq, rows.heads(gk_PSK, k), rows.heads(gv_PSK, v), gdo, gdlse


class _Rows:
    """The walk over blocks of queries and keys, and the conversion of [B, H, T, ...] to a block's rows [P, R, ...]."""

    def __init__(self, q_BHTK: Tensor, k_BGSK: Tensor, view: KeyView):
        self.batch, self.heads_q, self.queries, width = q_BHTK.shape
        self.heads_k, self.keys = k_BGSK.shape[1:3]
        self.window, self.first_key = view.window, 0 if view.num_empty_slots is None else int(view.num_empty_slots)
        self.cached = self.keys - view.num_new_keys  # number of constant keys; no block of keys reaches across
        self.offset = self.keys - self.queries  # query i is at the position of key offset + i
        self.scale = width**-0.5
        self.dtype = accumulation_dtype(q_BHTK.dtype)
        self.device = q_BHTK.device

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.queries, tuning.TILE_QUERIES):
            yield slice(start, min(start + tuning.TILE_QUERIES, self.queries))

    def key_blocks(self, block: slice) -> Iterator[slice]:
        """Every key that some query of the block sees."""
        first, last = max(self.first_key, self.offset + block.start - self.window + 1), self.offset + block.stop
        middle = min(max(first, self.cached), last)
        for low, high in ((first, middle), (middle, last)):
            for start in range(low, high, tuning.TILE_KEYS):
                yield slice(start, min(start + tuning.TILE_KEYS, high))

    def among_new(self, keys: slice) -> slice:
        return slice(keys.start - self.cached, keys.stop - self.cached)

    def take(self, x_BHTK: Tensor, block: slice) -> Tensor:
        rows = self.heads_q // self.heads_k * (block.stop - block.start)
        return x_BHTK[:, :, block].reshape(self.batch * self.heads_k, rows, x_BHTK.shape[3])

    def put(self, x_BHTK: Tensor, block: slice, rows_PRK: Tensor) -> None:
        x_BHTK[:, :, block] = rows_PRK.view(self.batch, self.heads_q, block.stop - block.start, x_BHTK.shape[3])

    def heads(self, x_PSK: Tensor, like_BGSK: Tensor) -> Tensor:
        return x_PSK.unflatten(0, like_BGSK.shape[:2]).to(like_BGSK.dtype)

    def zeros(self, like: Tensor, width: int) -> Tensor:
        return torch.zeros(*like.shape[:2], width, dtype=self.dtype, device=self.device)

    def dot(self, x_PRK: Tensor, y_PRK: Tensor) -> Tensor:
        return (x_PRK.to(self.dtype) * y_PRK).sum(-1, keepdim=True)

    def delta(self, do_PRK: Tensor, o_PRK: Tensor, dlse: Tensor | None, block: slice) -> Tensor:
        delta_PR1 = self.dot(do_PRK, o_PRK)
        return delta_PR1 if dlse is None else delta_PR1 - self.take(dlse[..., None], block)

    def softmax(self, q_PRK: Tensor, k_PSK: Tensor, lse_PR1: Tensor, block: slice, keys: slice) -> Tensor:
        p_PRs = torch.bmm(q_PRK, k_PSK[:, keys].mT).to(self.dtype).sub_(lse_PR1).exp_()
        self.mask_(p_PRs, block, keys, 0.0)
        return p_PRs

    def tangent(self, q_PRK: Tensor, a_PRK: Tensor, k_PSK: Tensor, b_PNK: Tensor, keys: slice) -> Tensor:
        x_PRs = torch.bmm(a_PRK, k_PSK[:, keys].mT).to(self.dtype)
        if keys.start >= self.cached:
            _add_product_(x_PRs, q_PRK, b_PNK[:, self.among_new(keys)].mT)
        return x_PRs

    def mask_(self, x_PRs: Tensor, block: slice, keys: slice, value: float) -> None:
        """Set what the queries do not see to `value`; a tile that all of them see whole is left alone."""
        first, last = self.offset + block.start, self.offset + block.stop - 1
        if keys.stop - 1 <= first and keys.start > last - self.window:
            return
        query_t = torch.arange(first, last + 1, device=self.device)
        key_s = torch.arange(keys.start, keys.stop, device=self.device)
        hidden_ts = hidden_keys(query_t, key_s, self.window)
        x_PRs.unflatten(1, (-1, hidden_ts.shape[0])).masked_fill_(hidden_ts, value)


def _add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y, with the operands in y's dtype."""
    if total.dtype == y.dtype:
        total.baddbmm_(x, y)
    else:
        total += torch.bmm(x.to(y.dtype), y)
