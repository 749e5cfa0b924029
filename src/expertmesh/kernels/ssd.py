"""Mamba2's scan (SSD, arXiv:2405.21060), chunk by chunk on tensor cores; its backward is in `ssd_backward`.

    dt[t] = clamp(softplus(dt_raw[t] + dt_bias))                       one per head
    state[t] = exp(dt[t] A) state[t-1] + dt[t] x[t] B[t]^T             [P, N] per head; B, C are shared by a group
    y[t] = state[t] C[t] + D x[t]

With c[t] the sum of dt A from the chunk's first token to t, and S the state before the chunk,

    y[t] = sum_{s <= t} (C[t] . B[s]) exp(c[t] - c[s]) dt[s] x[s]  +  exp(c[t]) S C[t]  +  D x[t]

Three launches: `_prepare` (dt, c); `_walk`, which goes over a sequence's chunks with the state in registers and leaves
the state before each chunk in memory; `_mix`, all chunks at once. A program of the last serves a group of heads: C B^T
is made once and stays in registers while the heads pass. What a token hands to later ones is mirrored in the backward:
there, with SOURCES, a kernel's own tokens are sources that look at the targets behind them. Products are in x's dtype
with float32 sums; dt, decays and the running state are float32; the stored states are in x's dtype.

Packed rows: `start` holds for each token where its document starts. Weights across a start are zero, and a state
is carried through a chunk only if no document starts in it.

Letters: B sequences, S tokens, H heads, P head width, G groups, N state width, K = H P + 2 G N channels; in a kernel
Q tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels.grouped_gemm import dot_precision
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.rms_norm import channels_last

#: chunk: tokens between stored states, in every kernel. The others: rows of a program's tile (walk: of the state).
TUNING: dict[str, Any] = {
    "chunk": 128,
    "prepare": {"HEADS": 16, "num_warps": 4},
    "walk": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "outputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "inputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    "finish": {"HEADS": 16, "num_warps": 4},
}


class Sizes(NamedTuple):
    """Letters of the module's docstring."""

    B: int
    S: int
    H: int
    P: int
    G: int
    N: int


def split(xbc_BSK: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views x [B, S, H, P], B and C [B, S, G, N]."""
    x, B, C = xbc_BSK.split([sizes.H * sizes.P, sizes.G * sizes.N, sizes.G * sizes.N], dim=-1)
    shape = sizes.G, sizes.N
    return x.unflatten(-1, (sizes.H, sizes.P)), B.unflatten(-1, shape), C.unflatten(-1, shape)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where exp(x) is far below 1; from 20 on x, as in PyTorch."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)


@fast_jit
def _prepare(
    raw_ptr, bias_ptr, A_ptr, dt_ptr, c_ptr, S, H, chunks, stride_b, stride_s, low, high,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dt [B, H, chunks * Q], zero past the sequence, and log2(e) c: decays are powers of two."""
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    token = (tl.program_id(0) % chunks) * Q + tl.arange(0, Q)[:, None]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :]
    raw = tl.load(
        raw_ptr + batch * stride_b + token.to(tl.int64) * stride_s + head, (token < S) & (head < H), other=0.0
    )
    bias = tl.load(bias_ptr + head, head < H, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + head, head < H, other=0.0).to(tl.float32)
    dt = tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), low), high)
    dt = tl.where(token < S, dt, 0.0)
    c = tl.cumsum(dt * (A * 1.4426950408889634), axis=0)  # log2(e)
    at = (batch * H + tl.trans(head)) * chunks * Q + tl.trans(token)
    tl.store(dt_ptr + at, tl.trans(dt), tl.trans(head) < H)
    tl.store(c_ptr + at, tl.trans(c), tl.trans(head) < H)


@triton.jit
def _walk_chunks(
    v_ptr, m_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, S, chunks, stride_vs, stride_ms, stride_chunk,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the state before each chunk (its gradient after each chunk, in reverse) of one head.

    v: x or dy, of this head and block; m: B or C. What a chunk adds is sum_q weight[q] v[q] m[q]^T.
    """
    lane, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK, N), tl.float32)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        first = chunk * Q
        at = states_ptr + tl.cast(chunk, tl.int64) * stride_chunk + p[:, None] * N + n[None, :]
        tl.store(at, state.to(states_ptr.dtype.element_ty))
        c = tl.load(c_ptr + first + lane)
        last = tl.load(c_ptr + first + Q - 1)
        carried = tl.exp2(last)
        weight = tl.exp2(c) if REVERSE else tl.load(dt_ptr + first + lane) * tl.exp2(last - c)
        if PACKED:
            carried = tl.where(tl.load(start_ptr + tl.minimum(first + Q, S) - 1) < first, carried, 0.0)
            weight = tl.where(reaches(first + lane, first, start_ptr, S, not REVERSE, Q), weight, 0.0)
        v = tokens(v_ptr, first, S, stride_vs, Q, BLOCK)
        m = tokens(m_ptr, first, S, stride_ms, Q, N)
        v = (v.to(tl.float32) * weight[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(v), m, state * carried, input_precision=PRECISION)


@fast_jit
def _walk(
    x_ptr, B_ptr, dy_ptr, C_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, dstates_ptr, S, H, chunks,
    stride_b, stride_s, stride_dyb, stride_dys,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of the state's rows, head, sequence); the second half of axis 1, if launched, goes in reverse."""
    per_head: tl.constexpr = P // BLOCK
    block = tl.program_id(0) % per_head * BLOCK
    head = (tl.program_id(0) // per_head) % H
    batch = (tl.program_id(0) // per_head // H).to(tl.int64)
    row = (batch * H + head) * chunks * Q
    state = (batch * chunks * H + head) * P * N + block * N
    at, group = batch * stride_b, head // HEADS * N
    stride_chunk = H * P * N
    if tl.program_id(1) == 0:
        _walk_chunks(
            x_ptr + at + head * P + block, B_ptr + at + group, dt_ptr + row, c_ptr + row, start_ptr + batch * S,
            states_ptr + state, S, chunks, stride_s, stride_s, stride_chunk, False, PACKED, PRECISION, P, N, Q, BLOCK,
        )  # fmt: skip
    else:
        _walk_chunks(
            dy_ptr + batch * stride_dyb + head * P + block, C_ptr + at + group, dt_ptr + row, c_ptr + row,
            start_ptr + batch * S, dstates_ptr + state, S, chunks, stride_dys, stride_s, stride_chunk,
            True, PACKED, PRECISION, P, N, Q, BLOCK,
        )  # fmt: skip


@triton.jit
def place(chunks, groups, Q: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, chunk, group, first row in the chunk): the row blocks of a group run side by side and share its reads."""
    blocks: tl.constexpr = Q // BLOCK
    pid = tl.program_id(0)
    row = pid % blocks * BLOCK
    group = pid // blocks % groups
    chunk = pid // blocks // groups % chunks
    return (pid // blocks // groups // chunks).to(tl.int64), chunk, group, row


@triton.jit
def tokens(ptr, first, S, stride, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """[NUM, WIDTH] of one sequence from token `first` on; zeros past its end."""
    at = row_at(ptr, first, stride, NUM) + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, (first + tl.arange(0, NUM) < S)[:, None], other=0.0)


@triton.jit
def row_at(ptr, first, stride, NUM: tl.constexpr):
    """Where rows [NUM, 1] begin. Only the first is far away: 64-bit offsets of each would stay in registers."""
    return ptr + first.to(tl.int64) * stride + tl.arange(0, NUM)[:, None] * stride


@triton.jit
def pairs(own, other, start_ptr, S, SOURCES: tl.constexpr, PACKED: tl.constexpr):
    """[own, other]: whether the source comes before the target or is it, in the same document."""
    if SOURCES:
        legal = own[:, None] <= other[None, :]
        if PACKED:
            legal &= own[:, None] >= tl.load(start_ptr + other, other < S, other=0)[None, :]
    else:
        legal = own[:, None] >= other[None, :]
        if PACKED:
            legal &= other[None, :] >= tl.load(start_ptr + own, own < S, other=0)[:, None]
    return legal


@triton.jit
def reaches(own, first, start_ptr, S, SOURCES: tl.constexpr, Q: tl.constexpr):
    """Whether sources of the chunk at `first` are of the document that goes on behind it, or targets of the one that
    came into it.
    """
    if SOURCES:
        return own >= tl.load(start_ptr + tl.minimum(first + Q, S) - 1)
    else:
        return tl.load(start_ptr + own, own < S, other=0) < first


@triton.jit
def difference(c_own, c_other, SOURCES: tl.constexpr):
    """c[t] - c[s] of all pairs [own, other]."""
    return c_other[None, :] - c_own[:, None] if SOURCES else c_own[:, None] - c_other[None, :]


@fast_jit
def _mix(
    v_ptr, own_m_ptr, other_m_ptr, D_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, out_ptr, S, H, groups, chunks,
    stride_vb, stride_vs, stride_b, stride_s, stride_ob, stride_os, SOURCES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of BLOCK targets from x, C, B and the states; with SOURCES dx of BLOCK sources from dy, B, C and the states'
    gradients.
    """
    batch, chunk, group, row = place(chunks, groups, Q, BLOCK)
    first = chunk * Q
    lane, lanes = tl.arange(0, BLOCK), tl.arange(0, Q)
    own, other = first + row + lane, first + lanes
    p, n = tl.arange(0, P), tl.arange(0, N)
    at = batch * stride_b + group * N
    start_ptr += batch * S
    own_m = tokens(own_m_ptr + at, first + row, S, stride_s, BLOCK, N)
    other_m = tokens(other_m_ptr + at, first, S, stride_s, Q, N)
    scores = tl.dot(own_m, tl.trans(other_m), input_precision=PRECISION)
    scores = tl.where(pairs(own, other, start_ptr, S, SOURCES, PACKED), scores, 0.0)
    if PACKED:
        reached = reaches(own, first, start_ptr, S, SOURCES, Q)
    for head in range(group * HEADS, group * HEADS + HEADS):
        line = (batch * H + head) * chunks * Q + first
        c_own, c_other = tl.load(c_ptr + line + row + lane), tl.load(c_ptr + line + lanes)
        weights = scores * tl.exp2(tl.minimum(difference(c_own, c_other, SOURCES), 0.0))
        if SOURCES:
            weight = tl.exp2(tl.load(c_ptr + line + Q - 1) - c_own)
        else:
            weights *= tl.load(dt_ptr + line + lanes)[None, :]
            weight = tl.exp2(c_own)
        if PACKED:
            weight = tl.where(reached, weight, 0.0)
        state = states_ptr + ((batch * chunks + chunk) * H + head) * P * N + p[:, None] * N + n[None, :]
        sums = tl.dot(own_m, tl.trans(tl.load(state)), input_precision=PRECISION) * weight[:, None]
        v = v_ptr + batch * stride_vb + head * P
        sums = tl.dot(weights.to(own_m.dtype), tokens(v, first, S, stride_vs, Q, P), sums, input_precision=PRECISION)
        own_v = tokens(v, first + row, S, stride_vs, BLOCK, P).to(tl.float32)
        if SOURCES:
            sums *= tl.load(dt_ptr + line + row + lane)[:, None]
        sums += own_v * tl.load(D_ptr + head).to(tl.float32)
        to = row_at(out_ptr + batch * stride_ob + head * P, first + row, stride_os, BLOCK) + p[None, :]
        tl.store(to, sums.to(out_ptr.dtype.element_ty), (own < S)[:, None])


def constants(
    kernel: str, rows: int, sizes: Sizes, dtype: torch.dtype, start_BS: torch.Tensor | None
) -> dict[str, Any]:
    """What a tensor-core kernel is compiled for, with a BLOCK that no chunk or head is too small for."""
    tuning = TUNING[kernel] | {"BLOCK": min(TUNING[kernel]["BLOCK"], rows)}
    shape = dict(HEADS=sizes.H // sizes.G, P=sizes.P, N=sizes.N, Q=TUNING["chunk"])
    return dict(PACKED=start_BS is not None, PRECISION=dot_precision(dtype), **shape, **tuning)


def scan_states(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float], dy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dt and log2(e) c, [B, H, chunks * Q] float32; and the states before each chunk [1, B, chunks, H, P, N], with dy
    [2, ...]: and their gradients after each chunk.
    """
    x, B, C = split(xbc_BSK, sizes)
    chunks, directions, tuning = triton.cdiv(sizes.S, TUNING["chunk"]), 1 if dy is None else 2, TUNING["prepare"]
    dt, c = torch.empty(2, sizes.B, sizes.H, chunks * TUNING["chunk"], dtype=torch.float32, device=x.device)
    _prepare[(sizes.B * chunks, triton.cdiv(sizes.H, tuning["HEADS"]))](
        dt_BSH, dt_bias_H, A_H, dt, c, sizes.S, sizes.H, chunks, *dt_BSH.stride()[:2], *map(float, dt_limit),
        Q=TUNING["chunk"], **tuning,
    )  # fmt: skip
    shape = directions, sizes.B, chunks, sizes.H, sizes.P, sizes.N
    states = torch.empty(shape, dtype=x.dtype, device=x.device)
    known = constants("walk", sizes.P, sizes, x.dtype, start)
    dy_BSI = dy if dy is not None else xbc_BSK
    _walk[(sizes.B * sizes.H * sizes.P // known["BLOCK"], directions)](
        x, B, dy_BSI, C, dt, c, start if start is not None else c, states[0], states[-1], sizes.S, sizes.H, chunks,
        *xbc_BSK.stride()[:2], *dy_BSI.stride()[:2], **known,
    )  # fmt: skip
    return dt, c, states


def mix(
    xbc_BSK: torch.Tensor, dy: torch.Tensor | None, D_H: torch.Tensor, dt: torch.Tensor, c: torch.Tensor,
    start: torch.Tensor | None, states: torch.Tensor, out: torch.Tensor, sizes: Sizes,
) -> None:  # fmt: skip
    """Writes y from the states before each chunk, or with dy dx from their gradients after it."""
    (x, B, C), chunks = split(xbc_BSK, sizes), states.shape[1]
    v, own_m, other_m = (x, C, B) if dy is None else (dy, B, C)
    known = constants("outputs" if dy is None else "inputs", TUNING["chunk"], sizes, x.dtype, start)
    _mix[(sizes.B * chunks * sizes.G * (known["Q"] // known["BLOCK"]),)](
        v, own_m, other_m, D_H, dt, c, start if start is not None else c, states, out, sizes.S, sizes.H, sizes.G,
        chunks, *v.stride()[:2], *xbc_BSK.stride()[:2], *out.stride()[:2], SOURCES=dy is not None, **known,
    )  # fmt: skip


def ssd_forward(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, D_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """y [B, S, H * P]."""
    xbc_BSK, dt_BSH = channels_last(xbc_BSK), channels_last(dt_BSH)
    y = torch.empty(sizes.B, sizes.S, sizes.H * sizes.P, dtype=xbc_BSK.dtype, device=xbc_BSK.device)
    dt, c, (states,) = scan_states(xbc_BSK, dt_BSH, A_H, dt_bias_H, start, sizes, dt_limit)
    mix(xbc_BSK, None, D_H, dt, c, start, states, y, sizes)
    return y
