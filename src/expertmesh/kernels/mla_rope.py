"""Between the projections of latent attention (MLA) and the attention: RoPE, and keys put together, in one pass.

    query = [q_nope; rope(q_rope)]                              for each head
    key   = [k_nope; rope(k_rope)]        value = v             k_rope is shared by all heads

q [.., N, P+R] and kv = [k_nope; v] [.., N, P+V] are the projections' outputs, k_rope [.., R] the part of the latent
that carries positions. Stock DeepSeek-V3 copies q and k twice and turns them in eight more passes. Here forward reads
and writes queries and keys once, and the values stay where they are; backward reads the three gradients once, writes
those of q and kv, and sums k_rope's over the heads in registers, in a fixed order. Only cos and sin are kept: rotation
is linear. All is computed in float32 and rounded once.

Letters: B batch, S sequence, T = B·S tokens, N heads, P width without position, R width with (2·HALF), V value width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton


def mla_rope(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query [B, N, S, P+R], key [B, N, S, P+R], value [B, N, S, V]) for attention; differentiable in q, kv and k_rope.

    q: [B, S, N, P+R] and kv: [B, S, N, P+V], any strides; k_rope: [B, S, R]; cos, sin: [B or 1, S, R] (no gradient).
    interleaved: rotated are the pairs (0, 1), (2, 3), … of the last R, else (0, R/2), (1, R/2 + 1), …; the outputs
    have the first of each pair in their first half either way. query and key are views of [B, S, N, D] memory of their
    own, value is a view of kv. Must equal what transformers' DeepseekV3Attention hands to its attention function.
    """
    B, S, N, D = q.shape
    R = k_rope.shape[-1]
    if kv.shape[:3] != (B, S, N) or k_rope.shape != (B, S, R) or R % 2 or kv.shape[-1] <= D - R:
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)} and k_rope {tuple(k_rope.shape)} must be [B, S, N, P+R], "
            f"[B, S, N, P+V] and [B, S, R] with an even R."
        )
    if cos.shape != sin.shape or cos.shape not in ((B, S, R), (1, S, R)):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [1 or {B}, {S}, {R}].")
    if use_triton(q):
        query, key, value = _MLARope.apply(q, kv, k_rope, cos, sin, interleaved)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return mla_rope_reference(q, kv, k_rope, cos, sin, interleaved)


def mla_rope_reference(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification: DeepseekV3Attention's operations."""
    R = k_rope.shape[-1]
    nope = q.shape[-1] - R
    key_nope, value = kv.transpose(1, 2).split([nope, kv.shape[-1] - nope], dim=-1)
    key_rope = rotated(k_rope[:, None], cos, sin, interleaved).to(kv.dtype)
    key = torch.cat([key_nope, key_rope.expand(-1, q.shape[2], -1, -1)], dim=-1)
    return rotated_tail(q.transpose(1, 2), R, cos, sin, interleaved), key, value


def rotated_tail(q: torch.Tensor, width: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """q [B, N, S, D], the last `width` of each head rotated."""
    nope, rope = q.split([q.shape[-1] - width, width], dim=-1)
    return torch.cat([nope, rotated(rope, cos, sin, interleaved)], dim=-1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE of x [B, N, S, R] by cos and sin [B or 1, S, R]; both variants put the first of each pair in front."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    (cos_1, cos_2), (sin_1, sin_2) = (part.unsqueeze(1).chunk(2, dim=-1) for part in (cos, sin))
    if interleaved:
        cos_2, sin_2 = cos_1, sin_1
    return torch.cat([first * cos_1 - second * sin_1, second * cos_2 + first * sin_2], dim=-1)


#: heads of a token per tile, and warps; a program of the forward has one tile, of the backward all tiles of a token
TUNING = {
    "forward": {"HEADS": 16, "num_warps": 4},
    "backward": {"HEADS": 16, "num_warps": 4},
}


@triton.jit
def _load_pairs(ptr, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second of each pair of rows at ptr [ROWS, 1], in float32."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(ptr + cols, mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, (x.shape[0], BLOCK_HALF, 2)))
    else:
        return _load_halves(ptr, mask, HALF, BLOCK_HALF)


@triton.jit
def _load_halves(ptr, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = mask & (cols < HALF)
    first, second = tl.load(ptr + cols, mask, other=0.0), tl.load(ptr + HALF + cols, mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(ptr, first, second, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        tl.store(ptr + cols, tl.interleave(first, second), mask & (cols < 2 * HALF))
    else:
        _store_halves(ptr, first, second, mask, HALF, BLOCK_HALF)


@triton.jit
def _store_halves(ptr, first, second, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    tl.store(ptr + cols, first, mask & (cols < HALF))
    tl.store(ptr + HALF + cols, second, mask & (cols < HALF))


@triton.jit
def _copy(source, target, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at source [ROWS, 1] to those at target."""
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(target + cols, tl.load(source + cols, mask & (cols < WIDTH), other=0.0), mask & (cols < WIDTH))


@triton.jit
def _rotation(cos_ptr, sin_ptr, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """cos and sin of the first, then of the second halves, [1, BLOCK_HALF]; pairs turn by those of the first halves."""
    c1, c2 = _load_halves(cos_ptr, mask, HALF, BLOCK_HALF)
    s1, s2 = _load_halves(sin_ptr, mask, HALF, BLOCK_HALF)
    if INTERLEAVED:
        return c1, s1, c1, s1
    else:
        return c1, s1, c2, s2


@triton.jit
def _forward(
    q_ptr, kv_ptr, k_rope_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, S,
    q_stride_b, q_stride_s, q_stride_n, kv_stride_b, kv_stride_s, kv_stride_n, rope_stride_b, rope_stride_s,
    rot_stride_b, rot_stride_s,
    N: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program for each token and tile of heads."""
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    s = token - b * S
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    mask = head < N
    turn = b * rot_stride_b + s * rot_stride_s
    c1, s1, c2, s2 = _rotation(cos_ptr + turn, sin_ptr + turn, token >= 0, HALF, BLOCK_HALF, INTERLEAVED)
    out = (token * N + head) * (P + 2 * HALF)
    q = q_ptr + b * q_stride_b + s * q_stride_s + head * q_stride_n
    _copy(q, q_out_ptr + out, mask, P, BLOCK_P)
    x1, x2 = _load_pairs(q + P, mask, HALF, BLOCK_HALF, INTERLEAVED)
    _store_halves(q_out_ptr + out + P, x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, mask, HALF, BLOCK_HALF)
    _copy(kv_ptr + b * kv_stride_b + s * kv_stride_s + head * kv_stride_n, k_out_ptr + out, mask, P, BLOCK_P)
    k_rope = k_rope_ptr + b * rope_stride_b + s * rope_stride_s + tl.zeros((HEADS, 1), tl.int64)
    x1, x2 = _load_pairs(k_rope, mask, HALF, BLOCK_HALF, INTERLEAVED)
    _store_halves(k_out_ptr + out + P, x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, mask, HALF, BLOCK_HALF)


@triton.jit
def _backward(
    dq_out_ptr, dk_out_ptr, dv_ptr, cos_ptr, sin_ptr, dq_ptr, dkv_ptr, dk_rope_ptr, S,
    dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n, dv_stride_b, dv_stride_s, dv_stride_n,
    rot_stride_b, rot_stride_s,
    N: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program for each token: its heads tile by tile; k_rope's gradient is summed over heads at the end."""
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    s = token - b * S
    turn = b * rot_stride_b + s * rot_stride_s
    c1, s1, c2, s2 = _rotation(cos_ptr + turn, sin_ptr + turn, token >= 0, HALF, BLOCK_HALF, INTERLEAVED)
    sum1 = tl.zeros((HEADS, BLOCK_HALF), tl.float32)
    sum2 = tl.zeros((HEADS, BLOCK_HALF), tl.float32)
    for tile in tl.static_range((N + HEADS - 1) // HEADS):
        head = (tile * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = head < N
        dq_out = dq_out_ptr + b * dq_stride_b + s * dq_stride_s + head * dq_stride_n
        dk_out = dk_out_ptr + b * dk_stride_b + s * dk_stride_s + head * dk_stride_n
        dq = dq_ptr + (token * N + head) * (P + 2 * HALF)
        dkv = dkv_ptr + (token * N + head) * (P + V)
        _copy(dq_out, dq, mask, P, BLOCK_P)
        dy1, dy2 = _load_halves(dq_out + P, mask, HALF, BLOCK_HALF)
        _store_pairs(dq + P, dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1, mask, HALF, BLOCK_HALF, INTERLEAVED)
        _copy(dk_out, dkv, mask, P, BLOCK_P)
        _copy(dv_ptr + b * dv_stride_b + s * dv_stride_s + head * dv_stride_n, dkv + P, mask, V, BLOCK_V)
        dy1, dy2 = _load_halves(dk_out + P, mask, HALF, BLOCK_HALF)
        sum1 += dy1
        sum2 += dy2
    dy1 = tl.sum(sum1, axis=0, keep_dims=True)
    dy2 = tl.sum(sum2, axis=0, keep_dims=True)
    dk_rope = dk_rope_ptr + token * (2 * HALF)
    _store_pairs(dk_rope, dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1, token >= 0, HALF, BLOCK_HALF, INTERLEAVED)


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _batch_stride(cos: torch.Tensor) -> int:
    return cos.stride(0) if cos.shape[0] > 1 else 0


class _MLARope(torch.autograd.Function):
    """q, kv, k_rope, cos, sin → query and key in [B, S, N, P+R] memory of their own, value as a view of kv."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        (B, S, N, D), R = q.shape, k_rope.shape[-1]
        P = D - R
        q, kv, k_rope = _dense_last(q), _dense_last(kv), _dense_last(k_rope)
        cos, sin = cos.contiguous(), sin.contiguous()
        q_out = torch.empty(q.shape, dtype=torch.promote_types(q.dtype, cos.dtype), device=q.device)
        k_out = torch.empty(q.shape, dtype=kv.dtype, device=q.device)
        tuning = TUNING["forward"]
        if B * S:
            _forward[(B * S, triton.cdiv(N, tuning["HEADS"]))](
                q, kv, k_rope, cos, sin, q_out, k_out, S, *q.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2],
                _batch_stride(cos), cos.stride(1), N=N, P=P, HALF=R // 2, BLOCK_P=triton.next_power_of_2(P),
                BLOCK_HALF=triton.next_power_of_2(R // 2), INTERLEAVED=interleaved, **tuning,
            )  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.dtypes = interleaved, (q.dtype, kv.dtype, k_rope.dtype)
        return q_out, k_out, kv[..., P:]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (B, S, N, D), R, V = dq_out.shape, cos.shape[-1], dv.shape[-1]
        P = D - R
        dq_out, dk_out, dv = _dense_last(dq_out), _dense_last(dk_out), _dense_last(dv)
        dq, dkv, dk_rope = (
            torch.empty(shape, dtype=dtype, device=dv.device)
            for shape, dtype in zip(((B, S, N, D), (B, S, N, P + V), (B, S, R)), ctx.dtypes, strict=True)
        )
        if B * S:
            _backward[(B * S,)](
                dq_out, dk_out, dv, cos, sin, dq, dkv, dk_rope, S, *dq_out.stride()[:3], *dk_out.stride()[:3],
                *dv.stride()[:3], _batch_stride(cos), cos.stride(1), N=N, P=P, HALF=R // 2, V=V,
                BLOCK_P=triton.next_power_of_2(P), BLOCK_HALF=triton.next_power_of_2(R // 2),
                BLOCK_V=triton.next_power_of_2(V), INTERLEAVED=ctx.interleaved, **TUNING["backward"],
            )  # fmt: skip
        return dq, dkv, dk_rope, None, None, None
