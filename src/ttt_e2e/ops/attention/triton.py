# mypy: allow-untyped-defs
"""Attention, its gradients and the gradients of these as Triton kernels.

`reference.py` holds the formulas. There are two kinds of program. A row program owns a block of queries, walks over the
keys that they see, and writes what belongs to queries: o, dq, gq, gdo and the statistics of rows. A column program owns
a block of keys, walks over the queries that see them (for each query head that shares the key head in turn, so that
sums over these heads need neither atomics nor memory), and writes what belongs to keys: dk, dv, gk, gv. A double
backward is one launch of each, rows first.

Products take operands of the inputs' dtype and accumulate in float32; float32 operands are split in three TF32 parts,
which gives float32's precision at the speed of tensor cores. The softmax is computed in powers of two.

All tensors are contiguous here. Query heads are counted over the batch: head n reads key head n // SHARE.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention.mask import Attended, KeyView, Tangents


class _Blocks(NamedTuple):
    """Queries and keys of a kernel's blocks, and the warps and pipeline stages of its programs."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


LOG2_E = tl.constexpr(1.4426950408889634)


def forward(q: Tensor, k: Tensor, v: Tensor, view: KeyView) -> tuple[Tensor, Tensor]:
    """Attention o [B, H, T, K] and the scores' logsumexp [B, H, T]."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, lse = torch.empty_like(q), _statistic(q)
    blocks = _blocks(tuning.TRITON_FORWARD, q)
    _launch(_forward_kernel, _row_grid(q, blocks), blocks, q, k, view, (q, k, v, o, lse))
    return o, lse


def backward(attended: Attended, do: Tensor, dlse: Tensor | None, view: KeyView) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [B, H, T, K] and dk, dv [B, G, N, K]."""
    q, k, v, o, lse, do = (x.contiguous() for x in (*attended, do))
    dlse = None if dlse is None else dlse.contiguous()
    dq, delta = torch.empty_like(q), _statistic(q)
    dk, dv = (k.new_empty(*k.shape[:2], view.num_new_keys, k.shape[3]) for _ in range(2))
    rows, columns = _blocks(tuning.TRITON_BACKWARD_ROWS, q), _blocks(tuning.TRITON_BACKWARD_COLUMNS, q)
    _launch(_backward_row_kernel, _row_grid(q, rows), rows, q, k, view, (q, k, v, o, lse, do, dlse, delta, dq))
    grid = (triton.cdiv(view.num_new_keys, columns.block_s), k.shape[0] * k.shape[1])
    _launch(_backward_column_kernel, grid, columns, q, k, view, (q, k, v, lse, do, delta, dk, dv))
    return dq, dk, dv


def double_backward(
    attended: Attended, do: Tensor, dlse: Tensor | None, tangents: Tangents, view: KeyView
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K], gdlse [B, H, T]."""
    q, k, v, o, lse, do, a, b, c = (x.contiguous() for x in (*attended, do, *tangents))
    dlse = None if dlse is None else dlse.contiguous()
    gq, gdo, gk, gv = (torch.empty_like(x) for x in (q, q, k, v))
    delta, mean, w = (_statistic(q) for _ in range(3))
    rows, columns = _blocks(tuning.TRITON_DOUBLE_BACKWARD_ROWS, q), _blocks(tuning.TRITON_DOUBLE_BACKWARD_COLUMNS, q)
    row_tensors = (q, k, v, o, lse, do, dlse, a, b, c, delta, mean, w, gq, gdo)
    _launch(_double_backward_row_kernel, _row_grid(q, rows), rows, q, k, view, row_tensors)
    cached_and_new = (k.shape[2] - view.num_new_keys, view.num_new_keys)
    grid = (sum(triton.cdiv(count, columns.block_s) for count in cached_and_new), k.shape[0] * k.shape[1])
    column_tensors = (q, k, v, lse, do, a, b, c, delta, mean, w, gk, gv)
    _launch(_double_backward_column_kernel, grid, columns, q, k, view, column_tensors)
    return gq, gk, gv, gdo, mean


def _statistic(q_BHTK: Tensor) -> Tensor:
    """One float32 for every query."""
    return q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)


def _blocks(table: tuple[tuning.TritonBlocks, ...], q_BHTK: Tensor) -> _Blocks:
    """The entry of a table of `tuning` for these queries."""
    table = tuning.TRITON_FLOAT32 if q_BHTK.dtype == torch.float32 else table
    return _Blocks(*table[tuning.TRITON_HEAD_DIMS.index(_padded(q_BHTK))])


def _padded(q_BHTK: Tensor) -> int:
    """The head dimension of the tiles: a power of two that the tensor cores take. The columns beyond K are zeros."""
    return max(16, triton.next_power_of_2(q_BHTK.shape[3]))


def _row_grid(q_BHTK: Tensor, blocks: _Blocks) -> tuple[int, int]:
    return triton.cdiv(q_BHTK.shape[2], blocks.block_t), q_BHTK.shape[0] * q_BHTK.shape[1]


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int],
    blocks: _Blocks,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    view: KeyView,
    tensors: tuple[Tensor | None, ...],
) -> None:
    """Run a kernel: each takes its tensors, then these sizes and settings."""
    # The interpreter cannot multiply in bfloat16.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with torch.cuda.device_of(q_BHTK):
        kernel[grid](
            *tensors,
            q_BHTK.new_zeros((), dtype=torch.int32) if view.num_empty_slots is None else view.num_empty_slots,
            q_BHTK.shape[2],
            k_BGSK.shape[2],
            k_BGSK.shape[2] - view.num_new_keys,
            view.window,
            q_BHTK.shape[3] ** -0.5,
            SHARE=q_BHTK.shape[1] // k_BGSK.shape[1],
            K=q_BHTK.shape[3],
            P=_padded(q_BHTK),
            BLOCK_T=blocks.block_t,
            BLOCK_S=blocks.block_s,
            OPERAND=tl.float32 if interpreted else getattr(tl, str(q_BHTK.dtype).removeprefix("torch.")),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )


def _kernel(f):
    """Compile `f` as a kernel, once for all lengths."""
    return triton.jit(f, do_not_specialize=["T", "S", "cached", "window"])


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def _load(base, rows, end, K: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr):
    """Rows of a [*, K], zeros outside 0 <= row < end and in columns K to P."""
    columns = tl.arange(0, P)
    inside = ((rows >= 0) & (rows < end))[:, None]
    if K < P:
        inside = inside & (columns < K)[None, :]
    return tl.load(base + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _store(base, rows, end, x, K: tl.constexpr, P: tl.constexpr):
    columns = tl.arange(0, P)
    inside = (rows < end)[:, None]
    if K < P:
        inside = inside & (columns < K)[None, :]
    tl.store(base + rows[:, None] * K + columns[None, :], x.to(base.dtype.element_ty), inside)


@triton.jit
def _delta(do, o, dlse_ptr, start, rows, end):
    """rowsum(do o), less the gradient of the logsumexp where there is one."""
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + start + rows, rows < end, other=0.0)
    return delta


@triton.jit
def _first_block(position, window, num_empty, BLOCK_S: tl.constexpr):
    """The key at which the walk over keys begins for queries from `position` on."""
    return tl.maximum(position - window + 1, num_empty) // BLOCK_S * BLOCK_S


@triton.jit
def _softmax(
    scores, lse2, scale2, first_position, last_position, first_key, positions, keys, window, num_empty,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Powers of two of scaled scores less the row statistic; 0 where a query does not see a key.

    `positions` and `keys` are shaped to broadcast to the scores, whose orientation is free.
    """
    p = tl.exp2(scores * scale2 - lse2)
    hidden = (first_key + BLOCK_S - 1 > first_position) | (first_key <= last_position - window)
    if hidden | (first_key < num_empty):  # otherwise every query sees every key
        p = tl.where((keys <= positions) & (positions - keys < window) & (keys >= num_empty), p, 0.0)
    return p


@_kernel
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, num_empty_slots_ptr,
    T, S, cached, window, scale,
    SHARE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    num_empty = tl.load(num_empty_slots_ptr).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // SHARE * S * K
    v_ptr += head // SHARE * S * K
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = S - T + tl.program_id(0) * BLOCK_T
    positions = (S - T + rows)[:, None]
    q = _load(q_ptr + head * T * K, rows, T, K, P, OPERAND)
    largest = tl.full([BLOCK_T], -1.0e30, tl.float32)  # finite, so that differences are not NaN
    total = tl.zeros([BLOCK_T], tl.float32)
    o = tl.zeros([BLOCK_T, P], tl.float32)
    for start in range(_first_block(first, window, num_empty, BLOCK_S), tl.minimum(first + BLOCK_T, S), BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, keys, S, K, P, OPERAND)
        scores = _dot(q, tl.trans(k)) * (scale * LOG2_E)
        if (start + BLOCK_S - 1 > first) | (start <= first + BLOCK_T - 1 - window) | (start < num_empty):
            seen = (keys[None, :] <= positions) & (positions - keys[None, :] < window) & (keys[None, :] >= num_empty)
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr, keys, S, K, P, OPERAND)
        o = o * shrink[:, None] + _dot(p.to(OPERAND), v)
        largest = larger
    _store(o_ptr + head * T * K, rows, T, o / total[:, None], K, P)
    tl.store(lse_ptr + head * T + rows, (largest + tl.log2(total)) / LOG2_E, rows < T)


@_kernel
def _backward_row_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dq_ptr, num_empty_slots_ptr,
    T, S, cached, window, scale,
    SHARE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    num_empty = tl.load(num_empty_slots_ptr).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // SHARE * S * K
    v_ptr += head // SHARE * S * K
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = S - T + tl.program_id(0) * BLOCK_T
    positions = (S - T + rows)[:, None]
    q = _load(q_ptr + head * T * K, rows, T, K, P, OPERAND)
    do = _load(do_ptr + head * T * K, rows, T, K, P, OPERAND)
    o = _load(o_ptr + head * T * K, rows, T, K, P, OPERAND)
    lse2 = tl.load(lse_ptr + head * T + rows, rows < T, other=0.0) * LOG2_E
    delta = _delta(do, o, dlse_ptr, head * T, rows, T)
    tl.store(delta_ptr + head * T + rows, delta, rows < T)
    dq = tl.zeros([BLOCK_T, P], tl.float32)
    for start in range(_first_block(first, window, num_empty, BLOCK_S), tl.minimum(first + BLOCK_T, S), BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, keys, S, K, P, OPERAND)
        v = _load(v_ptr, keys, S, K, P, OPERAND)
        p = _softmax(
            _dot(q, tl.trans(k)), lse2[:, None], scale * LOG2_E,
            first, first + BLOCK_T - 1, start, positions, keys[None, :], window, num_empty, BLOCK_S,
        )  # fmt: skip
        ds = p * (_dot(do, tl.trans(v)) - delta[:, None])
        dq += _dot(ds.to(OPERAND), k)
    _store(dq_ptr + head * T * K, rows, T, dq * scale, K, P)


@_kernel
def _backward_column_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, num_empty_slots_ptr,
    T, S, cached, window, scale,
    SHARE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    num_empty = tl.load(num_empty_slots_ptr).to(tl.int32)
    key_head = tl.program_id(1).to(tl.int64)
    start = cached + tl.program_id(0) * BLOCK_S
    keys = start + tl.arange(0, BLOCK_S)
    k = _load(k_ptr + key_head * S * K, keys, S, K, P, OPERAND)
    v = _load(v_ptr + key_head * S * K, keys, S, K, P, OPERAND)
    dk = tl.zeros([BLOCK_S, P], tl.float32)
    dv = tl.zeros([BLOCK_S, P], tl.float32)
    # Tiles are transposed here, [BLOCK_S, BLOCK_T], so that they are left operands without a transposition.
    for head in range(key_head * SHARE, key_head * SHARE + SHARE):
        for t in range(
            tl.maximum(start - (S - T), 0) // BLOCK_T * BLOCK_T,
            tl.where(start + BLOCK_S > num_empty, tl.minimum(start + BLOCK_S - 1 + window - (S - T), T), 0),
            BLOCK_T,
        ):
            rows = t + tl.arange(0, BLOCK_T)
            q = _load(q_ptr + head * T * K, rows, T, K, P, OPERAND)
            do = _load(do_ptr + head * T * K, rows, T, K, P, OPERAND)
            lse2 = tl.load(lse_ptr + head * T + rows, rows < T, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + head * T + rows, rows < T, other=0.0)
            p = _softmax(
                _dot(k, tl.trans(q)), lse2[None, :], scale * LOG2_E,
                S - T + t, S - T + t + BLOCK_T - 1, start, (S - T + rows)[None, :], keys[:, None],
                window, num_empty, BLOCK_S,
            )  # fmt: skip
            dv += _dot(p.to(OPERAND), do)
            ds = p * (_dot(v, tl.trans(do)) - delta[None, :])
            dk += _dot(ds.to(OPERAND), q)
    new = S - cached
    _store(dk_ptr + key_head * new * K, keys - cached, new, dk * scale, K, P)
    _store(dv_ptr + key_head * new * K, keys - cached, new, dv, K, P)


@_kernel
def _double_backward_row_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, do_ptr, dlse_ptr, a_ptr, b_ptr, c_ptr, delta_ptr, mean_ptr, w_ptr, gq_ptr,
    gdo_ptr, num_empty_slots_ptr,
    T, S, cached, window, scale,
    SHARE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    num_empty = tl.load(num_empty_slots_ptr).to(tl.int32)
    head = tl.program_id(1).to(tl.int64)
    new = S - cached
    k_ptr += head // SHARE * S * K
    v_ptr += head // SHARE * S * K
    b_ptr += head // SHARE * new * K
    c_ptr += head // SHARE * new * K
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = S - T + tl.program_id(0) * BLOCK_T
    last = first + BLOCK_T - 1
    positions = (S - T + rows)[:, None]
    first_block, stop = _first_block(first, window, num_empty, BLOCK_S), tl.minimum(last + 1, S)
    q = _load(q_ptr + head * T * K, rows, T, K, P, OPERAND)
    do = _load(do_ptr + head * T * K, rows, T, K, P, OPERAND)
    a = _load(a_ptr + head * T * K, rows, T, K, P, OPERAND)
    lse2 = tl.load(lse_ptr + head * T + rows, rows < T, other=0.0) * LOG2_E

    # First sweep: what needs whole rows.
    mean = tl.zeros([BLOCK_T], tl.float32)
    gdo = tl.zeros([BLOCK_T, P], tl.float32)
    for start in range(first_block, stop, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, keys, S, K, P, OPERAND)
        v = _load(v_ptr, keys, S, K, P, OPERAND)
        p = _softmax(
            _dot(q, tl.trans(k)), lse2[:, None], scale * LOG2_E,
            first, last, start, positions, keys[None, :], window, num_empty, BLOCK_S,
        )  # fmt: skip
        x = _dot(a, tl.trans(k))
        if start + BLOCK_S > cached:
            b = _load(b_ptr, keys - cached, new, K, P, OPERAND)
            c = _load(c_ptr, keys - cached, new, K, P, OPERAND)
            x += _dot(q, tl.trans(b))
            gdo += _dot(p.to(OPERAND), c)
        px = p * (x * scale)
        mean += tl.sum(px, 1)
        gdo += _dot(px.to(OPERAND), v)
    o = _load(o_ptr + head * T * K, rows, T, K, P, OPERAND).to(tl.float32)
    gdo -= mean[:, None] * o
    delta = _delta(do, o, dlse_ptr, head * T, rows, T)
    w = tl.sum(do.to(tl.float32) * gdo, 1)
    _store(gdo_ptr + head * T * K, rows, T, gdo, K, P)
    tl.store(delta_ptr + head * T + rows, delta, rows < T)
    tl.store(mean_ptr + head * T + rows, mean, rows < T)
    tl.store(w_ptr + head * T + rows, w, rows < T)

    # Second sweep: the gradient of q.
    gq = tl.zeros([BLOCK_T, P], tl.float32)
    for start in range(first_block, stop, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, keys, S, K, P, OPERAND)
        v = _load(v_ptr, keys, S, K, P, OPERAND)
        p = _softmax(
            _dot(q, tl.trans(k)), lse2[:, None], scale * LOG2_E,
            first, last, start, positions, keys[None, :], window, num_empty, BLOCK_S,
        )  # fmt: skip
        ds = p * (_dot(do, tl.trans(v)) - delta[:, None])
        x = _dot(a, tl.trans(k))
        y = -w[:, None] + tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        if start + BLOCK_S > cached:
            b = _load(b_ptr, keys - cached, new, K, P, OPERAND)
            c = _load(c_ptr, keys - cached, new, K, P, OPERAND)
            x += _dot(q, tl.trans(b))
            y += _dot(do, tl.trans(c))
            gq += _dot(ds.to(OPERAND), b)
        g = (x * scale - mean[:, None]) * ds + p * y
        gq += _dot(g.to(OPERAND), k)
    _store(gq_ptr + head * T * K, rows, T, gq * scale, K, P)


@_kernel
def _double_backward_column_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, do_ptr, a_ptr, b_ptr, c_ptr, delta_ptr, mean_ptr, w_ptr, gk_ptr, gv_ptr,
    num_empty_slots_ptr,
    T, S, cached, window, scale,
    SHARE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    num_empty = tl.load(num_empty_slots_ptr).to(tl.int32)
    key_head = tl.program_id(1).to(tl.int64)
    new = S - cached
    # Blocks of cached keys come first; none reaches across to the new ones.
    cached_blocks = tl.cdiv(cached, BLOCK_S)
    variable = tl.program_id(0) >= cached_blocks
    start = tl.program_id(0) * BLOCK_S
    end = cached
    if variable:
        start = cached + (tl.program_id(0) - cached_blocks) * BLOCK_S
        end = S
    keys = start + tl.arange(0, BLOCK_S)
    k = _load(k_ptr + key_head * S * K, keys, end, K, P, OPERAND)
    v = _load(v_ptr + key_head * S * K, keys, end, K, P, OPERAND)
    b = _load(b_ptr + key_head * new * K, keys - cached, new, K, P, OPERAND)
    c = _load(c_ptr + key_head * new * K, keys - cached, new, K, P, OPERAND)
    gk = tl.zeros([BLOCK_S, P], tl.float32)
    gv = tl.zeros([BLOCK_S, P], tl.float32)
    # Tiles are transposed here, [BLOCK_S, BLOCK_T], so that they are left operands without a transposition.
    for head in range(key_head * SHARE, key_head * SHARE + SHARE):
        for t in range(
            tl.maximum(start - (S - T), 0) // BLOCK_T * BLOCK_T,
            tl.where(start + BLOCK_S > num_empty, tl.minimum(start + BLOCK_S - 1 + window - (S - T), T), 0),
            BLOCK_T,
        ):
            rows = t + tl.arange(0, BLOCK_T)
            q = _load(q_ptr + head * T * K, rows, T, K, P, OPERAND)
            do = _load(do_ptr + head * T * K, rows, T, K, P, OPERAND)
            a = _load(a_ptr + head * T * K, rows, T, K, P, OPERAND)
            lse2 = tl.load(lse_ptr + head * T + rows, rows < T, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + head * T + rows, rows < T, other=0.0)
            mean = tl.load(mean_ptr + head * T + rows, rows < T, other=0.0)
            w = tl.load(w_ptr + head * T + rows, rows < T, other=0.0)
            p = _softmax(
                _dot(k, tl.trans(q)), lse2[None, :], scale * LOG2_E,
                S - T + t, S - T + t + BLOCK_T - 1, start, (S - T + rows)[None, :], keys[:, None],
                window, num_empty, BLOCK_S,
            )  # fmt: skip
            x = _dot(k, tl.trans(a))
            y = -w[None, :] + tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
            if variable:
                x += _dot(b, tl.trans(q))
                y += _dot(c, tl.trans(do))
            x = x * scale - mean[None, :]
            gv += _dot((p * x).to(OPERAND), do)
            ds = p * (_dot(v, tl.trans(do)) - delta[None, :])
            gk += _dot(ds.to(OPERAND), a)
            g = x * ds + p * y
            gk += _dot(g.to(OPERAND), q)
    _store(gk_ptr + key_head * S * K, keys, end, gk * scale, K, P)
    _store(gv_ptr + key_head * S * K, keys, end, gv, K, P)
