"""Backward of Mamba2's scan, mirrored: what flows from s to t in `ssd` flows from t to s here.

With M[t, s] = (dy[t] . x[s]) exp(c[t] - c[s]), s <= t, the gradients of what a chunk's tokens give each other are

    dx[s] = dt[s] u[s] + D dy[s]        u[s] = sum_t (C[t] . B[s]) exp(c[t] - c[s]) dy[t]
    dB[s] = sum_t dt[s] M[t, s] C[t]    dC[t] = sum_s dt[s] M[t, s] B[s]        both summed over a group's heads

and the states before (S) and their gradients after (dS) the chunk add, with exp(c[last] - c[s]) and exp(c[t]), the
terms u += dS B[s], dB += dt[s] x[s] dS, dC += dy[t] S. The gradient of dt[s] A, inside a chunk, is the sum of all
that passes over token s: pairs s' < s <= t, what enters for a t >= s, what leaves from an s' < s, what passes through.
Pairs that do not pass over s cancel in it; both their sums are therefore taken from float32 products that were not
rounded.

Five launches: dt and c again, the states and their gradients (two directions in one), one kernel for both sides, in
which a side's own rows are sources s (x, B, dx, dB) or targets t (dy, C, dC), the gradients of dt, and the sums over
tokens, which every program leaves in a row of its own: all is deterministic.
"""

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels.causal_conv import channels_last
from expertmesh.kernels.rms_norm import sum_partials
from expertmesh.kernels.ssd_forward import (
    TUNING,
    Sizes,
    constants,
    fitting,
    place,
    prepare,
    softplus,
    split,
    tokens,
    walk,
)


@triton.jit
def _side(
    x_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, dstates_ptr, dx_ptr, dm_ptr,
    intra_ptr, inter_ptr, through_ptr, dD_ptr, S, H, groups, chunks,
    stride_b, stride_s, stride_dyb, stride_dys, stride_dxb, stride_dxs, SOURCES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group's heads in one chunk; own rows: BLOCK sources or targets, the others: all Q of the opposite kind.

    dm: dB or dC. intra, inter [B, H, chunks * Q]: each row's sum of M (C . B), with dt[s] on the targets' side, and of
    the same with the state. through, dD [B * chunks, Q // BLOCK, H]: <S, dS> exp(c[last]), and sum dy x, of a block.
    """
    batch, chunk, group, row = place(chunks, groups, Q, BLOCK)
    first = chunk * Q
    own, other = first + row + tl.arange(0, BLOCK), first + tl.arange(0, Q)
    at, at_dy, m = batch * stride_b, batch * stride_dyb, group * N
    if SOURCES:
        own_ptr, other_ptr, stride_own, stride_other = x_ptr + at, dy_ptr + at_dy, stride_s, stride_dys
        own_m_ptr, other_m_ptr, passing_ptr = B_ptr + at + m, C_ptr + at + m, dstates_ptr
        legal = own[:, None] <= other[None, :]
    else:
        own_ptr, other_ptr, stride_own, stride_other = dy_ptr + at_dy, x_ptr + at, stride_dys, stride_s
        own_m_ptr, other_m_ptr, passing_ptr = C_ptr + at + m, B_ptr + at + m, states_ptr
        legal = own[:, None] >= other[None, :]
    if PACKED:
        last_start = tl.load(start_ptr + batch * S + tl.minimum(first + Q, S) - 1)
        if SOURCES:
            start = tl.load(start_ptr + batch * S + other, other < S, other=0)
            legal &= own[:, None] >= start[None, :]
            reached = own >= last_start
        else:
            start = tl.load(start_ptr + batch * S + own, own < S, other=0)
            legal &= other[None, :] >= start[:, None]
            reached = start < first
    own_m = tokens(own_m_ptr, first + row, S, stride_s, BLOCK, N)
    scores = tl.dot(own_m, tl.trans(tokens(other_m_ptr, first, S, stride_s, Q, N)), input_precision=PRECISION)
    pairs = tl.zeros((BLOCK, Q), tl.float32)
    dm = tl.zeros((BLOCK, N), tl.float32)
    p, n = tl.arange(0, P), tl.arange(0, N)
    head = group * HEADS
    for _ in range(0, HEADS):
        line = (batch * H + head) * chunks * Q
        c_own, c_other = tl.load(c_ptr + line + own), tl.load(c_ptr + line + other)
        state = ((batch * chunks + chunk) * H + head) * P * N
        passing = tl.load(passing_ptr + state + p[:, None] * N + n[None, :])
        v = tokens(own_ptr + head * P, first + row, S, stride_own, BLOCK, P)
        w = tokens(other_ptr + head * P, first, S, stride_other, Q, P)
        if SOURCES:
            last = tl.load(c_ptr + line + first + Q - 1)
            decay = tl.exp2(tl.where(legal, c_other[None, :] - c_own[:, None], float("-inf")))
            weight = tl.exp2(last - c_own)
            dt = tl.load(dt_ptr + line + own)
        else:
            decay = tl.exp2(tl.where(legal, c_own[:, None] - c_other[None, :], float("-inf")))
            decay *= tl.load(dt_ptr + line + other)[None, :]
            weight = tl.exp2(c_own)
        if PACKED:
            weight = tl.where(reached, weight, 0.0)
        v32 = v.to(tl.float32)
        u = tl.dot(own_m, tl.trans(passing), input_precision=PRECISION) * weight[:, None]
        tl.store(inter_ptr + line + own, tl.sum(u * v32, axis=1))
        if SOURCES:
            u = tl.dot((scores * decay).to(v.dtype), w, u, input_precision=PRECISION)
        product = tl.dot(v, tl.trans(w), input_precision=PRECISION) * decay
        tl.store(intra_ptr + line + own, tl.sum(product * scores, axis=1))
        if SOURCES:
            pairs += product * dt[:, None]
            weight *= dt
            dy = tokens(dy_ptr + at_dy + head * P, first + row, S, stride_dys, BLOCK, P).to(tl.float32)
            dx = u * dt[:, None] + dy * tl.load(D_ptr + head).to(tl.float32)
            to = dx_ptr + batch * stride_dxb + own.to(tl.int64)[:, None] * stride_dxs + head * P + p[None, :]
            tl.store(to, dx.to(dx_ptr.dtype.element_ty), (own < S)[:, None])
            part = ((batch * chunks + chunk) * (Q // BLOCK) + row // BLOCK) * H + head
            tl.store(dD_ptr + part, tl.sum(dy * v32))
            flat = state + row * (P * N // Q) + tl.arange(0, BLOCK * P * N // Q)
            before = tl.load(states_ptr + flat).to(tl.float32)
            through = tl.sum(before * tl.load(dstates_ptr + flat).to(tl.float32)) * tl.exp2(last)
            if PACKED:
                through = tl.where(last_start < first, through, 0.0)
            tl.store(through_ptr + part, through)
        else:
            pairs += product
        dm = tl.dot((v32 * weight[:, None]).to(v.dtype), passing, dm, input_precision=PRECISION)
        head += 1
    other_m = tokens(other_m_ptr, first, S, stride_s, Q, N)
    dm = tl.dot(pairs.to(other_m.dtype), other_m, dm, input_precision=PRECISION)
    to = dm_ptr + batch * stride_dxb + own.to(tl.int64)[:, None] * stride_dxs + m + n[None, :]
    tl.store(to, dm.to(dm_ptr.dtype.element_ty), (own < S)[:, None])


@triton.jit
def _finish(
    raw_ptr, bias_ptr, A_ptr, dt_ptr, sums_ptr, through_ptr, dD_ptr, draw_ptr, partial_ptr, S, H, chunks, length,
    stride_b, stride_s, stride_db, stride_ds, low, high, BLOCKS: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradient of dt as the projection made it, and this chunk's rows of dA, d(dt_bias) and dD.

    sums: intra and inter of the sources, then of the targets, `length` elements each.
    """
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    token = (tl.program_id(0) % chunks) * Q + tl.arange(0, Q)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    real = head < H
    at = (batch * H + head) * chunks * Q + token
    dt = tl.load(dt_ptr + at, real, other=0.0)
    intra = tl.load(sums_ptr + at, real, other=0.0)
    inter = tl.load(sums_ptr + length + at, real, other=0.0)
    target = tl.load(sums_ptr + 2 * length + at, real, other=0.0)
    target += tl.load(sums_ptr + 3 * length + at, real, other=0.0) - dt * intra
    through, dD = tl.zeros((HEADS, 1), tl.float32), tl.zeros((HEADS, 1), tl.float32)
    for block in range(BLOCKS):
        part = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * H + head
        through += tl.load(through_ptr + part, real, other=0.0)
        dD += tl.load(dD_ptr + part, real, other=0.0)
    leaving = dt * inter
    over = tl.cumsum(target, axis=1, reverse=True) + tl.cumsum(leaving, axis=1) - leaving + through
    A = tl.load(A_ptr + head, real, other=0.0).to(tl.float32)
    inside = real & (token < S)
    raw_at = raw_ptr + batch * stride_b + token.to(tl.int64) * stride_s + head
    raw = tl.load(raw_at, inside, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + head, real, other=0.0).to(tl.float32)
    unclamped = softplus(raw)
    open_ = inside & (unclamped >= low) & (unclamped <= high)
    draw = tl.where(open_, (intra + inter + A * over) * tl.sigmoid(raw), 0.0)
    to = draw_ptr + batch * stride_db + token.to(tl.int64) * stride_ds + head
    tl.store(to, draw.to(draw_ptr.dtype.element_ty), inside)
    row = partial_ptr + tl.program_id(0) * 3 * H + head
    tl.store(row, tl.sum(over * dt, axis=1, keep_dims=True), real)
    tl.store(row + H, tl.sum(draw, axis=1, keep_dims=True), real)
    tl.store(row + 2 * H, dD, real)


def ssd_backward(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, D_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float], dy_BSI: torch.Tensor,
    dxbc_BSK: torch.Tensor, ddt_BSH: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Writes dxbc and ddt (slices of a wider gradient or not) and returns float32 [3, H]: dA, d(dt_bias), dD."""
    xbc_BSK, dt_BSH, dy_BSI = channels_last(xbc_BSK), channels_last(dt_BSH), channels_last(dy_BSI.to(xbc_BSK.dtype))
    dt, c = prepare(dt_BSH, dt_bias_H, A_H, dt_limit)
    states, dstates = walk(xbc_BSK, dy_BSI, dt, c, start, sizes)
    chunks, Q = states.shape[1], TUNING["chunk"]
    tuning = fitting("gradients", Q)
    blocks = Q // tuning["BLOCK"]
    x, B, C = split(xbc_BSK, sizes)
    dx, dB, dC = split(dxbc_BSK, sizes)
    sums = torch.empty(4, *c.shape, dtype=torch.float32, device=x.device)
    through, dD = torch.empty(2, sizes.B * chunks, blocks, sizes.H, dtype=torch.float32, device=x.device)
    strides = *xbc_BSK.stride()[:2], *dy_BSI.stride()[:2], *dxbc_BSK.stride()[:2]
    for sources, dm, intra, inter in ((True, dB, sums[0], sums[1]), (False, dC, sums[2], sums[3])):
        _side[(sizes.B * chunks * sizes.G * blocks,)](
            x, B, C, D_H, dy_BSI, dt, c, start if start is not None else c, states, dstates, dx, dm, intra, inter,
            through, dD, sizes.S, sizes.H, sizes.G, chunks, *strides, SOURCES=sources,
            **constants(sizes, x.dtype, start), **tuning,
        )  # fmt: skip
    partial = torch.empty(sizes.B * chunks, 3 * sizes.H, dtype=torch.float32, device=x.device)
    finish = TUNING["finish"]
    _finish[(sizes.B * chunks, triton.cdiv(sizes.H, finish["HEADS"]))](
        dt_BSH, dt_bias_H, A_H, dt, sums, through, dD, ddt_BSH, partial, sizes.S, sizes.H, chunks, c.numel(),
        *dt_BSH.stride()[:2], *ddt_BSH.stride()[:2], *map(float, dt_limit), BLOCKS=blocks, Q=Q, **finish,
    )  # fmt: skip
    small = torch.empty(3, sizes.H, dtype=torch.float32, device=x.device)
    sum_partials(partial, len(partial), small)
    return small
