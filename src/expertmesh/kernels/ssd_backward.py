"""Backward of Mamba2's scan. What flows from source s to target t in `ssd` flows from t to s here.

With M[t, s] = (dy[t] . x[s]) exp(c[t] - c[s]), s <= t, the gradients within a chunk are

    dx[s] = dt[s] u[s] + D dy[s]        u[s] = sum_t (C[t] . B[s]) exp(c[t] - c[s]) dy[t]
    dB[s] = sum_t dt[s] M[t, s] C[t]    dC[t] = sum_s dt[s] M[t, s] B[s]        both summed over a group's heads

The state S before the chunk and the gradient dS of the state after it add u += dS B[s], dB += dt[s] x[s] dS and
dC += dy[t] S, weighted with exp(c[last] - c[s]) for sources and exp(c[t]) for targets.

The gradient of dt[s] A is the sum over all that decays across token s: from a source s' < s to a target t >= s, from S
to t, from s' to the state after the chunk, and from S to that state. It is a difference of two sums over pairs.
Pairs that do not cross s must cancel in it, so both sums are computed from float32 products that were not rounded.

Seven launches: `ssd._prepare` again, states and their gradients, dx, `_dB_or_dC` twice, `_dt_gradient`, and sums over
tokens. Each program writes its partial sums to a separate row, so all gradients are deterministic.
"""

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels import ssd
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.rms_norm import sum_partials, unit_stride
from expertmesh.kernels.ssd import causal_mask, decay_exponent, is_carried, row_at, softplus, tile_position, tokens


@fast_jit
def _dB_or_dC(
    x_ptr, B_ptr, C_ptr, dy_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, dstates_ptr, dm_ptr,
    intra_ptr, inter_ptr, through_ptr, dD_ptr, S, H, groups, chunks,
    stride_b, stride_s, stride_dyb, stride_dys, stride_dxb, stride_dxs, SOURCES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dB of BLOCK sources or dC of BLOCK targets of one group and chunk, and sums per head and token for dt.

    intra, inter [B, H, chunks * Q]: row sums of M (C . B), times dt[s] if own tokens are targets, and the same of the
    terms with a state. through, dD [B * chunks, Q // BLOCK, H]: a block's part of <S, dS> exp(c[last]) and of sum dy x.
    """
    batch, chunk, group, row = tile_position(chunks, groups, Q, BLOCK)
    first = chunk * Q
    lane, p, n = tl.arange(0, BLOCK), tl.arange(0, P), tl.arange(0, N)
    own, head = first + row + lane, group * HEADS
    # advance to the group's first head with 64-bit offsets, so that later ones fit 32 bits
    x_ptr += batch * stride_b + head * P
    dy_ptr += batch * stride_dyb + head * P
    B_ptr += batch * stride_b + group * N
    C_ptr += batch * stride_b + group * N
    start_ptr += batch * S
    line = (batch * H + head) * chunks * Q + first
    dt_ptr += line
    c_ptr += line
    intra_ptr += line
    inter_ptr += line
    state = ((batch * chunks + chunk) * H + head) * P * N
    states_ptr += state
    dstates_ptr += state
    part = ((batch * chunks + chunk) * (Q // BLOCK) + row // BLOCK) * H + head
    if SOURCES:
        own_m_ptr, other_m_ptr, v_ptr, stride_v, w_ptr, stride_w = B_ptr, C_ptr, x_ptr, stride_s, dy_ptr, stride_dys
    else:
        own_m_ptr, other_m_ptr, v_ptr, stride_v, w_ptr, stride_w = C_ptr, B_ptr, dy_ptr, stride_dys, x_ptr, stride_s
    carried = True
    if PACKED:
        carried = tl.load(start_ptr + tl.minimum(first + Q, S) - 1) < first
        connected = is_carried(own, first, start_ptr, S, SOURCES, Q)
    own_m = tokens(own_m_ptr, first + row, S, stride_s, BLOCK, N)
    dm = tl.zeros((BLOCK, N), tl.float32)

    # terms with the states, head by head
    for i in range(0, HEADS):
        own_at = i * chunks * Q + row + lane
        v = tokens(v_ptr + i * P, first + row, S, stride_v, BLOCK, P)
        passing_ptr = dstates_ptr if SOURCES else states_ptr
        passing = tl.load(passing_ptr + i * P * N + p[:, None] * N + n[None, :])
        if SOURCES:
            last = tl.load(c_ptr + i * chunks * Q + Q - 1)
            weight = tl.exp2(last - tl.load(c_ptr + own_at))
            flat = i * P * N + row * (P * N // Q) + tl.arange(0, BLOCK * P * N // Q)
            before = tl.load(states_ptr + flat).to(tl.float32)
            through = tl.sum(before * tl.load(dstates_ptr + flat).to(tl.float32)) * tl.exp2(last)
            tl.store(through_ptr + part + i, tl.where(carried, through, 0.0))
            dy = tokens(w_ptr + i * P, first + row, S, stride_w, BLOCK, P).to(tl.float32)
            tl.store(dD_ptr + part + i, tl.sum(tl.sum(dy * v.to(tl.float32), axis=1)))
        else:
            weight = tl.exp2(tl.load(c_ptr + own_at))
        if PACKED:
            weight = tl.where(connected, weight, 0.0)
        entered = tl.sum(tl.dot(own_m, tl.trans(passing), input_precision=PRECISION) * v.to(tl.float32), axis=1)
        tl.store(inter_ptr + own_at, entered * weight)
        if SOURCES:
            weight *= tl.load(dt_ptr + own_at)
        weighted = v.to(tl.float32) * weight[:, None]
        dm = tl.dot(weighted.to(v.dtype), passing, dm, input_precision=PRECISION)

    # terms between tokens of the chunk, looping over tiles of the other tokens
    for i in range(0, Q // BLOCK - row // BLOCK if SOURCES else row // BLOCK + 1):
        begin = first + row + i * BLOCK if SOURCES else first + row - i * BLOCK
        other_m = tokens(other_m_ptr, begin, S, stride_s, BLOCK, N)
        legal = causal_mask(own, begin + lane, start_ptr, S, SOURCES, PACKED)
        # masked pairs have a score of 0; in `products` they are finite and masked after the loop over heads
        scores = tl.where(legal, tl.dot(own_m, tl.trans(other_m), input_precision=PRECISION), 0.0)
        products = tl.zeros((BLOCK, BLOCK), tl.float32)
        tl.debug_barrier()  # other threads may have written the previous tile's sums in `intra`
        for j in range(0, HEADS):
            own_at, other_at = j * chunks * Q + row + lane, j * chunks * Q + begin - first + lane
            c_own, c_other = tl.load(c_ptr + own_at), tl.load(c_ptr + other_at)
            v = tokens(v_ptr + j * P, first + row, S, stride_v, BLOCK, P)
            w = tokens(w_ptr + j * P, begin, S, stride_w, BLOCK, P)
            decay = tl.exp2(tl.minimum(decay_exponent(c_own, c_other, SOURCES), 0.0))
            product = tl.dot(v, tl.trans(w), input_precision=PRECISION) * decay
            if not SOURCES:
                product *= tl.load(dt_ptr + other_at)[None, :]
            before = tl.load(intra_ptr + own_at, lane < i * BLOCK, other=0.0)
            tl.store(intra_ptr + own_at, tl.sum(product * scores, axis=1) + before)
            if SOURCES:
                product *= tl.load(dt_ptr + own_at)[:, None]
            products += product
        products = tl.where(legal, products, 0.0).to(own_m.dtype)
        dm = tl.dot(products, tokens(other_m_ptr, begin, S, stride_s, BLOCK, N), dm, input_precision=PRECISION)

    to = row_at(dm_ptr + batch * stride_dxb + group * N, first + row, stride_dxs, BLOCK) + n[None, :]
    tl.store(to, dm.to(dm_ptr.dtype.element_ty), (own < S)[:, None])


@fast_jit
def _dt_gradient(
    raw_ptr, bias_ptr, A_ptr, dt_ptr, sums_ptr, through_ptr, dD_ptr, draw_ptr, partial_ptr, S, H, chunks, length,
    stride_b, stride_s, stride_db, stride_ds, low, high, BLOCKS: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of dt_raw (before bias, softplus and clamp) and this chunk's row of dA, d(dt_bias) and dD.

    sums: intra and inter of `_dB_or_dC` for sources, then for targets, `length` elements each.
    """
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    token = (tl.program_id(0) % chunks) * Q + tl.arange(0, Q)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    head_mask = head < H
    at = (batch * H + head) * chunks * Q + token
    dt = tl.load(dt_ptr + at, head_mask, other=0.0)
    intra = tl.load(sums_ptr + at, head_mask, other=0.0)
    inter = tl.load(sums_ptr + length + at, head_mask, other=0.0)
    target = tl.load(sums_ptr + 2 * length + at, head_mask, other=0.0)
    target += tl.load(sums_ptr + 3 * length + at, head_mask, other=0.0) - dt * intra
    through, dD = tl.zeros((HEADS, 1), tl.float32), tl.zeros((HEADS, 1), tl.float32)
    for block in range(BLOCKS):
        part = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * H + head
        through += tl.load(through_ptr + part, head_mask, other=0.0)
        dD += tl.load(dD_ptr + part, head_mask, other=0.0)
    leaving = dt * inter
    crossing = tl.cumsum(target, axis=1, reverse=True) + tl.cumsum(leaving, axis=1) - leaving + through
    A = tl.load(A_ptr + head, head_mask, other=0.0).to(tl.float32)
    inside = head_mask & (token < S)
    raw_at = raw_ptr + batch * stride_b + token.to(tl.int64) * stride_s + head
    raw = tl.load(raw_at, inside, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + head, head_mask, other=0.0).to(tl.float32)
    unclamped = softplus(raw)
    unclipped = inside & (unclamped >= low) & (unclamped <= high)
    draw = tl.where(unclipped, (intra + inter + A * crossing) * tl.sigmoid(raw), 0.0)
    to = draw_ptr + batch * stride_db + token.to(tl.int64) * stride_ds + head
    tl.store(to, draw.to(draw_ptr.dtype.element_ty), inside)
    row = partial_ptr + tl.program_id(0) * 3 * H + head
    tl.store(row, tl.sum(crossing * dt, axis=1, keep_dims=True), head_mask)
    tl.store(row + H, tl.sum(draw, axis=1, keep_dims=True), head_mask)
    tl.store(row + 2 * H, dD, head_mask)


def ssd_backward(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, D_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: ssd.Sizes, dt_limit: tuple[float, float], dy_BSI: torch.Tensor,
    dxbc_BSK: torch.Tensor, ddt_BSH: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Write dxbc and ddt, which may be slices of a wider tensor, and return float32 [3, H]: dA, d(dt_bias), dD."""
    xbc_BSK, dt_BSH, dy_BSI = unit_stride(xbc_BSK), unit_stride(dt_BSH), unit_stride(dy_BSI.to(xbc_BSK.dtype))
    dt, c, (states, dstates) = ssd.scan_states(xbc_BSK, dt_BSH, A_H, dt_bias_H, start, sizes, dt_limit, dy_BSI)
    chunks, Q = states.shape[1], ssd.TUNING["chunk"]
    x, B, C = ssd.split(xbc_BSK, sizes)
    dx, dB, dC = ssd.split(dxbc_BSK, sizes)
    consts = ssd.constants("gradients", Q, sizes, x.dtype, start)
    sums = torch.empty(4, *c.shape, dtype=torch.float32, device=x.device)
    blocks = Q // consts["BLOCK"]
    through, dD = torch.empty(2, sizes.B * chunks, blocks, sizes.H, dtype=torch.float32, device=x.device)
    strides = *xbc_BSK.stride()[:2], *dy_BSI.stride()[:2], *dxbc_BSK.stride()[:2]
    ssd.chunk_scan(xbc_BSK, dy_BSI, D_H, dt, c, start, dstates, dx, sizes)
    for sources, dm, (intra, inter) in ((True, dB, sums[:2]), (False, dC, sums[2:])):
        _dB_or_dC[(sizes.B * chunks * sizes.G * blocks,)](
            x, B, C, dy_BSI, dt, c, start if start is not None else c, states, dstates, dm, intra, inter, through, dD,
            sizes.S, sizes.H, sizes.G, chunks, *strides, SOURCES=sources, **consts,
        )  # fmt: skip
    partial = torch.empty(sizes.B * chunks, 3 * sizes.H, dtype=torch.float32, device=x.device)
    finish = ssd.TUNING["finish"]
    _dt_gradient[(sizes.B * chunks, triton.cdiv(sizes.H, finish["HEADS"]))](
        dt_BSH, dt_bias_H, A_H, dt, sums, through, dD, ddt_BSH, partial, sizes.S, sizes.H, chunks, c.numel(),
        *dt_BSH.stride()[:2], *ddt_BSH.stride()[:2], *map(float, dt_limit),
        BLOCKS=blocks, Q=Q, **finish,
    )  # fmt: skip
    small = torch.empty(3, sizes.H, dtype=torch.float32, device=x.device)
    sum_partials(partial, len(partial), small)
    return small
