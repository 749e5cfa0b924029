"""Mamba2's scan (SSD, arXiv:2405.21060), chunked to run on tensor cores. Its backward is in `ssd_backward`.

    dt[t] = clamp(softplus(dt_raw[t] + dt_bias))                       one per head
    state[t] = exp(dt[t] A) state[t-1] + dt[t] x[t] B[t]^T             [P, N] per head; B, C are shared by a group
    y[t] = state[t] C[t] + D x[t]

With c[t] the sum of dt A from the chunk's first token to t, and S the state before the chunk,

    y[t] = sum_{s <= t} (C[t] . B[s]) exp(c[t] - c[s]) dt[s] x[s]  +  exp(c[t]) S C[t]  +  D x[t]

Three launches. `_prepare` computes dt and c. `_pass_states` iterates over the chunks of a sequence with the state in
registers and stores the state before each chunk. `_chunk_scan` processes all chunks in parallel; a program computes
C B^T once for a group of heads and keeps it in registers while it iterates over them.

A source s contributes to targets t >= s. In the forward a program's own tokens are targets. The backward runs the same
kernels mirrored: with SOURCES a program's own tokens are sources, and the others are the targets that follow them.

Matmuls are in x's dtype with float32 accumulation. dt, decays and the running state are float32; stored states are in
x's dtype. Packed rows: `start` holds the start of each token's document. Weights across a start are zero, and a state
is carried through a chunk only if no document starts in it.

Letters: B sequences, S tokens, H heads, P head width, G groups, N state width, K = H P + 2 G N channels, Q chunk size.
"""

from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels.grouped_gemm import dot_precision
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.rms_norm import unit_stride

#: chunk: tokens between stored states. BLOCK: rows of a program's tile, which are tokens, but of the state in "states".
TUNING: dict[str, Any] = {
    "chunk": 128,
    "prepare": {"HEADS": 16, "num_warps": 4},
    "states": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "outputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "inputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
    "finish": {"HEADS": 16, "num_warps": 4},
}


class Sizes(NamedTuple):
    """See the letters in the module's docstring."""

    B: int
    S: int
    H: int
    P: int
    G: int
    N: int


def split(xbc_BSK: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split xbc into views x [B, S, H, P], B and C [B, S, G, N]."""
    x, B, C = xbc_BSK.split([sizes.H * sizes.P, sizes.G * sizes.N, sizes.G * sizes.N], dim=-1)
    shape = sizes.G, sizes.N
    return x.unflatten(-1, (sizes.H, sizes.P)), B.unflatten(-1, shape), C.unflatten(-1, shape)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), accurate also if exp(x) is far below 1. Above 20 it is x, as in PyTorch."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)


@fast_jit
def _prepare(
    raw_ptr, bias_ptr, A_ptr, dt_ptr, c_ptr, S, H, chunks, stride_b, stride_s, low, high,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write dt [B, H, chunks * Q], zero past the sequence, and log2(e) c, so that decays are computed with exp2."""
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
def _pass_states_of_head(
    v_ptr, m_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, S, chunks, stride_vs, stride_ms, stride_chunk,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a head's state before each chunk, or with REVERSE the gradient of the state after each chunk.

    v: x or dy, of this head and block; m: B or C. A chunk adds sum_q weight[q] v[q] m[q]^T to the state.
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
            weight = tl.where(is_carried(first + lane, first, start_ptr, S, not REVERSE, Q), weight, 0.0)
        v = tokens(v_ptr, first, S, stride_vs, Q, BLOCK)
        m = tokens(m_ptr, first, S, stride_ms, Q, N)
        v = (v.to(tl.float32) * weight[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(v), m, state * carried, input_precision=PRECISION)


@fast_jit
def _pass_states(
    x_ptr, B_ptr, dy_ptr, C_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, dstates_ptr, S, H, chunks,
    stride_b, stride_s, stride_dyb, stride_dys,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of the state's rows, head and sequence. Programs (*, 1), if launched, go in reverse."""
    per_head: tl.constexpr = P // BLOCK
    block = tl.program_id(0) % per_head * BLOCK
    head = (tl.program_id(0) // per_head) % H
    batch = (tl.program_id(0) // per_head // H).to(tl.int64)
    row = (batch * H + head) * chunks * Q
    state = (batch * chunks * H + head) * P * N + block * N
    at, group = batch * stride_b, head // HEADS * N
    stride_chunk = H * P * N
    if tl.program_id(1) == 0:
        _pass_states_of_head(
            x_ptr + at + head * P + block, B_ptr + at + group, dt_ptr + row, c_ptr + row, start_ptr + batch * S,
            states_ptr + state, S, chunks, stride_s, stride_s, stride_chunk, False, PACKED, PRECISION, P, N, Q, BLOCK,
        )  # fmt: skip
    else:
        _pass_states_of_head(
            dy_ptr + batch * stride_dyb + head * P + block, C_ptr + at + group, dt_ptr + row, c_ptr + row,
            start_ptr + batch * S, dstates_ptr + state, S, chunks, stride_dys, stride_s, stride_chunk,
            True, PACKED, PRECISION, P, N, Q, BLOCK,
        )  # fmt: skip


@triton.jit
def tile_position(chunks, groups, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Return (batch, chunk, group, first row in the chunk). A group's row blocks have adjacent ids to share reads."""
    blocks: tl.constexpr = Q // BLOCK
    pid = tl.program_id(0)
    row = pid % blocks * BLOCK
    group = pid // blocks % groups
    chunk = pid // blocks // groups % chunks
    return (pid // blocks // groups // chunks).to(tl.int64), chunk, group, row


@triton.jit
def tokens(ptr, first, S, stride, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """Load [NUM, WIDTH] of one sequence, beginning at token `first`; zeros past its end."""
    at = row_at(ptr, first, stride, NUM) + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, (first + tl.arange(0, NUM) < S)[:, None], other=0.0)


@triton.jit
def row_at(ptr, first, stride, NUM: tl.constexpr):
    """Return pointers to rows [NUM, 1]. Only `first` gets a 64-bit offset; one per row would cost registers."""
    return ptr + first.to(tl.int64) * stride + tl.arange(0, NUM)[:, None] * stride


@triton.jit
def causal_mask(own, other, start_ptr, S, SOURCES: tl.constexpr, PACKED: tl.constexpr):
    """Return the mask [own, other]: source <= target and both are in the same document."""
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
def is_carried(own, first, start_ptr, S, SOURCES: tl.constexpr, Q: tl.constexpr):
    """Return the mask of own tokens that a state connects to other chunks. Sources: their document reaches the end of
    the chunk at `first`. Targets: their document began before it."""
    if SOURCES:
        return own >= tl.load(start_ptr + tl.minimum(first + Q, S) - 1)
    else:
        return tl.load(start_ptr + own, own < S, other=0) < first


@triton.jit
def decay_exponent(c_own, c_other, SOURCES: tl.constexpr):
    """Return c[t] - c[s] of all pairs [own, other]."""
    return c_other[None, :] - c_own[:, None] if SOURCES else c_own[:, None] - c_other[None, :]


@fast_jit
def _chunk_scan(
    v_ptr, own_m_ptr, other_m_ptr, D_ptr, dt_ptr, c_ptr, start_ptr, states_ptr, out_ptr, S, H, groups, chunks,
    stride_vb, stride_vs, stride_b, stride_s, stride_ob, stride_os, SOURCES: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y of BLOCK targets from x, C, B and the states, or with SOURCES dx of BLOCK sources from dy, B, C and the
    gradients of the states."""
    batch, chunk, group, row = tile_position(chunks, groups, Q, BLOCK)
    first = chunk * Q
    lane, lanes = tl.arange(0, BLOCK), tl.arange(0, Q)
    own, other = first + row + lane, first + lanes
    p, n = tl.arange(0, P), tl.arange(0, N)
    at = batch * stride_b + group * N
    start_ptr += batch * S
    own_m = tokens(own_m_ptr + at, first + row, S, stride_s, BLOCK, N)
    other_m = tokens(other_m_ptr + at, first, S, stride_s, Q, N)
    scores = tl.dot(own_m, tl.trans(other_m), input_precision=PRECISION)
    scores = tl.where(causal_mask(own, other, start_ptr, S, SOURCES, PACKED), scores, 0.0)
    if PACKED:
        connected = is_carried(own, first, start_ptr, S, SOURCES, Q)
    for head in range(group * HEADS, group * HEADS + HEADS):
        line = (batch * H + head) * chunks * Q + first
        c_own, c_other = tl.load(c_ptr + line + row + lane), tl.load(c_ptr + line + lanes)
        weights = scores * tl.exp2(tl.minimum(decay_exponent(c_own, c_other, SOURCES), 0.0))
        if SOURCES:
            weight = tl.exp2(tl.load(c_ptr + line + Q - 1) - c_own)
        else:
            weights *= tl.load(dt_ptr + line + lanes)[None, :]
            weight = tl.exp2(c_own)
        if PACKED:
            weight = tl.where(connected, weight, 0.0)
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
    """Return the constexprs and launch options of a tensor-core kernel. BLOCK is at most `rows`."""
    tuning = TUNING[kernel] | {"BLOCK": min(TUNING[kernel]["BLOCK"], rows)}
    shape = dict(HEADS=sizes.H // sizes.G, P=sizes.P, N=sizes.N, Q=TUNING["chunk"])
    return dict(PACKED=start_BS is not None, PRECISION=dot_precision(dtype), **shape, **tuning)


def scan_states(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float], dy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return dt and log2(e) c, [B, H, chunks * Q] float32, and the states before each chunk, [1, B, chunks, H, P, N] in
    x's dtype. With dy the states are [2, ...]: also the gradients of the states after each chunk."""
    x, B, C = split(xbc_BSK, sizes)
    chunks, directions, tuning = triton.cdiv(sizes.S, TUNING["chunk"]), 1 if dy is None else 2, TUNING["prepare"]
    dt, c = torch.empty(2, sizes.B, sizes.H, chunks * TUNING["chunk"], dtype=torch.float32, device=x.device)
    _prepare[(sizes.B * chunks, triton.cdiv(sizes.H, tuning["HEADS"]))](
        dt_BSH, dt_bias_H, A_H, dt, c, sizes.S, sizes.H, chunks, *dt_BSH.stride()[:2], *map(float, dt_limit),
        Q=TUNING["chunk"], **tuning,
    )  # fmt: skip
    shape = directions, sizes.B, chunks, sizes.H, sizes.P, sizes.N
    states = torch.empty(shape, dtype=x.dtype, device=x.device)
    consts = constants("states", sizes.P, sizes, x.dtype, start)
    dy_BSI = dy if dy is not None else xbc_BSK
    _pass_states[(sizes.B * sizes.H * sizes.P // consts["BLOCK"], directions)](
        x, B, dy_BSI, C, dt, c, start if start is not None else c, states[0], states[-1], sizes.S, sizes.H, chunks,
        *xbc_BSK.stride()[:2], *dy_BSI.stride()[:2], **consts,
    )  # fmt: skip
    return dt, c, states


def chunk_scan(
    xbc_BSK: torch.Tensor, dy: torch.Tensor | None, D_H: torch.Tensor, dt: torch.Tensor, c: torch.Tensor,
    start: torch.Tensor | None, states: torch.Tensor, out: torch.Tensor, sizes: Sizes,
) -> None:  # fmt: skip
    """Write y to `out` from the states before each chunk, or with dy write dx from the gradients of those after it."""
    (x, B, C), chunks = split(xbc_BSK, sizes), states.shape[1]
    v, own_m, other_m = (x, C, B) if dy is None else (dy, B, C)
    consts = constants("outputs" if dy is None else "inputs", TUNING["chunk"], sizes, x.dtype, start)
    _chunk_scan[(sizes.B * chunks * sizes.G * (consts["Q"] // consts["BLOCK"]),)](
        v, own_m, other_m, D_H, dt, c, start if start is not None else c, states, out, sizes.S, sizes.H, sizes.G,
        chunks, *v.stride()[:2], *xbc_BSK.stride()[:2], *out.stride()[:2], SOURCES=dy is not None, **consts,
    )  # fmt: skip


def ssd_forward(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, D_H: torch.Tensor, dt_bias_H: torch.Tensor,
    start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """Return y [B, S, H * P], contiguous."""
    xbc_BSK, dt_BSH = unit_stride(xbc_BSK), unit_stride(dt_BSH)
    y = torch.empty(sizes.B, sizes.S, sizes.H * sizes.P, dtype=xbc_BSK.dtype, device=xbc_BSK.device)
    dt, c, (states,) = scan_states(xbc_BSK, dt_BSH, A_H, dt_bias_H, start, sizes, dt_limit)
    chunk_scan(xbc_BSK, None, D_H, dt, c, start, states, y, sizes)
    return y
