"""The Triton kernels of sink_attention.py, one per direction: over queries (forward, and dq), over keys (dk and dv).
Formulas, letters and the reference stand there.

Each kernel walks over the blocks that its block of queries (or of keys) meets, in three parts: those that the lower
bound cuts (by a window, or where a document begins), those that need no mask, and those on the diagonal or behind
padding. Without SPLIT, for small windows, one masked part does it all.
"""

import math
from typing import Any

from expertmesh.backends import tl, triton
from expertmesh.kernels.grouped_gemm import matrix_tile
from expertmesh.kernels.launch import launched

_LOG2E: Any = tl.constexpr(math.log2(math.e))


@triton.jit
def _first_key(start, row, S, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """low(r): the first key that a query sees; `start` is that of its batch row."""
    key = row * 0
    if WINDOW > 0:
        key = tl.maximum(row - (WINDOW - 1), 0)
    if PACKED:
        key = tl.maximum(key, tl.load(start + row, mask=row < S, other=0))
    return key


@triton.jit
def _behind_last_query(end, key, S, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """The first query behind a key that does not see it."""
    row = key * 0 + S
    if WINDOW > 0:
        row = tl.minimum(key + WINDOW, row)
    if PACKED:
        row = tl.minimum(row, tl.load(end + key, mask=key < S, other=0))
    return row


@triton.jit
def _key_parts(
    start, whole, begin, S, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Where the three parts of a query block's keys begin, and the end: its first key block; the first that the bound
    cuts for no query; the next that needs a mask (on the diagonal, or with padding: `whole` keys come before the
    first). All but the end are multiples of BN. Without SPLIT the third part is all there is.
    """
    end = tl.minimum(begin + BM, S)
    first = _first_key(start, begin, S, WINDOW, PACKED) // BN * BN
    if not SPLIT:
        return first, first, first, end
    uncut = tl.cdiv(_first_key(start, end - 1, S, WINDOW, PACKED), BN) * BN
    masked = begin // BN * BN
    if PADDED:
        masked = tl.maximum(tl.minimum(masked, tl.load(whole) // BN * BN), first)
    return first, tl.minimum(uncut, masked), masked, end


@triton.jit
def _query_parts(
    end, first_key, S, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Where the three parts of the queries that see a key block begin, and the end: the queries of the second see all
    its keys. Without SPLIT the third part is all there is.
    """
    first = first_key // BM * BM
    stop = _behind_last_query(end, tl.minimum(first_key + BN, S) - 1, S, WINDOW, PACKED)
    if not SPLIT:
        return first, first, first, stop
    below = tl.minimum(tl.cdiv(first_key + BN, BM) * BM, stop)
    uncut = tl.maximum(_behind_last_query(end, first_key, S, WINDOW, PACKED) // BM * BM, below)
    return first, below, uncut, stop


@triton.jit
def _sees(row, low, key, seen, S, PADDED: tl.constexpr):
    """[M, N]: whether queries `row`, which see keys from `low` on, see the keys."""
    mask = (key[None, :] <= row[:, None]) & (key[None, :] >= low[:, None])
    if PADDED:
        mask = mask & (tl.load(seen + key, mask=key < S, other=0) != 0)[None, :]
    return mask


@triton.jit
def _row_tile(x, row, head, base, S, N: tl.constexpr, D: tl.constexpr):
    """[rows, D] of one head by pointers; zeros behind the row's end. Returns them, where they are, and the mask."""
    at = (base + row)[:, None] * (N * D) + head * D + tl.arange(0, D)[None, :]
    inside = (row < S)[:, None]
    return tl.load(x + at, mask=inside, other=0.0), at, inside


@launched
def sink_over_keys(
    q, k, v, sinks, start, seen, whole, out, lse, dout, delta, dq, dsinks, num_rows, S, scale,
    BACKWARD: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out and lse by an online softmax; BACKWARD dq, δ for `sink_over_queries`, and this block's part of the sinks'
    gradient; then peak is lse, total δ and acc Σ ds·k.

    One program per head and query block; the last blocks, which have most keys, come first.
    """
    batch, head = tl.program_id(0) // NQ, tl.program_id(0) % NQ
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    base, column = batch * S, head // (NQ // NK) * D
    row = block * BM + tl.arange(0, BM)
    flat = (batch * NQ + head) * S + row
    low = _first_key(start + base, row, S, WINDOW, PACKED)
    parts = _key_parts(start + base, whole + batch, block * BM, S, BM, BN, WINDOW, PACKED, PADDED, SPLIT)
    queries, at, inside = _row_tile(q, row, head, base, S, NQ, D)
    douts = queries
    if BACKWARD:
        douts = tl.load(dout + at, mask=inside, other=0.0)
        outs = tl.load(out + at, mask=inside, other=0.0)
        total = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
        peak = tl.load(lse + flat, mask=row < S, other=0.0)
        tl.store(delta + flat, total, mask=row < S)
        # 0 behind the row's end, as dout is
        sunk = tl.exp2(tl.load(sinks + head).to(tl.float32) * _LOG2E - peak) * total
        tl.store(dsinks + (block * (num_rows // S) + batch) * NQ + head, -tl.sum(sunk, 0))
    else:
        peak = tl.zeros((BM,), tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2E
        total = tl.zeros((BM,), tl.float32) + 1.0  # the sink itself
    acc = tl.zeros((BM, D), tl.float32)
    seen += base
    scale_2 = scale * _LOG2E  # for powers of two
    BEGIN: tl.constexpr = 2 if not SPLIT else 0 if WINDOW > 0 or PACKED else 1
    for part in tl.static_range(BEGIN, 3):
        for n in range(parts[part], parts[part + 1], BN):
            keys = matrix_tile(k, base + n, column, num_rows, NK * D, BN, D, DESCRIPTOR)
            if BACKWARD:
                values = matrix_tile(v, base + n, column, num_rows, NK * D, BN, D, DESCRIPTOR)
                p = tl.exp2(tl.dot(queries, keys.T, input_precision=PRECISION) * scale_2 - peak[:, None])
                if part != 1:
                    p = tl.where(_sees(row, low, n + tl.arange(0, BN), seen, S, PADDED), p, 0.0)
                ds = p * (tl.dot(douts, values.T, input_precision=PRECISION) - total[:, None])
                acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
            else:
                scores = tl.dot(queries, keys.T, input_precision=PRECISION)
                if part != 1:
                    scores = tl.where(_sees(row, low, n + tl.arange(0, BN), seen, S, PADDED), scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_2)
                p = tl.exp2(scores * scale_2 - new_peak[:, None])
                shrink = tl.exp2(peak - new_peak)
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None]
                values = matrix_tile(v, base + n, column, num_rows, NK * D, BN, D, DESCRIPTOR)
                acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
                peak = new_peak
    if BACKWARD:
        tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=inside)
    else:
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
        tl.store(lse + flat, peak + tl.log2(total), mask=row < S)


@launched
def sink_over_queries(
    q, dout, k, v, end, seen, lse, delta, dk_out, dv_out, num_rows, S, scale,
    NQ: tl.constexpr, NK: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per head of keys and key block; the first blocks, which have most queries, come first."""
    batch, head, first_key = tl.program_id(0) // NK, tl.program_id(0) % NK, tl.program_id(1) * BN
    base = batch * S
    key = first_key + tl.arange(0, BN)
    behind = tl.minimum(_behind_last_query(end + base, key, S, WINDOW, PACKED), S)
    keys, at, inside = _row_tile(k, key, head, base, S, NK, D)
    values = tl.load(v + at, mask=inside, other=0.0)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    parts = _query_parts(end + base, first_key, S, BM, BN, WINDOW, PACKED, SPLIT)
    GROUP: tl.constexpr = NQ // NK
    scale_2 = scale * _LOG2E  # for powers of two
    for part in tl.static_range(0 if SPLIT else 2, 3):
        begin = parts[part]
        steps = tl.cdiv(tl.maximum(parts[part + 1] - begin, 0), BM)
        for item in range(0, GROUP * steps):  # the queries of all heads that share the key head
            q_head = head * GROUP + item // steps
            m = begin + item % steps * BM
            row = m + tl.arange(0, BM)
            flat = (batch * NQ + q_head) * S + row
            queries = matrix_tile(q, base + m, q_head * D, num_rows, NQ * D, BM, D, DESCRIPTOR)
            lses = tl.load(lse + flat, mask=row < S, other=0.0)
            p = tl.exp2(tl.dot(keys, queries.T, input_precision=PRECISION) * scale_2 - lses[None, :])
            if part != 1:
                p = tl.where((row[None, :] >= key[:, None]) & (row[None, :] < behind[:, None]), p, 0.0)
            douts = matrix_tile(dout, base + m, q_head * D, num_rows, NQ * D, BM, D, DESCRIPTOR)
            dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision=PRECISION)
            deltas = tl.load(delta + flat, mask=row < S, other=0.0)
            ds = p * (tl.dot(values, douts.T, input_precision=PRECISION) - deltas[None, :])
            dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    if PADDED:
        shown = (tl.load(seen + base + key, mask=key < S, other=0) != 0)[:, None]
        dk = tl.where(shown, dk, 0.0)
        dv = tl.where(shown, dv, 0.0)
    tl.store(dk_out + at, (dk * scale).to(dk_out.dtype.element_ty), mask=inside)
    tl.store(dv_out + at, dv.to(dv_out.dtype.element_ty), mask=inside)
