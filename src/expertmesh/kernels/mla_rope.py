"""Between the projections of latent attention (MLA) and the attention: RoPE, and keys put together, in one pass.

    query = [q_nope; rope(q_rope)]                              for each head
    key   = [k_nope; rope(k_rope)]        value = v             k_rope is shared by all heads

q [.., N, P+R] and kv = [k_nope; v] [.., N, P+V] are the projections' outputs, k_rope [.., R] the part of the latent
that carries positions. Queries and keys are read and written once, values stay where they are. Backward sums k_rope's
gradient over the heads in registers, in a fixed order, and needs cos and sin only: rotation is linear. All is computed
in float32 and rounded once.

Letters: B batch, S sequence, T = B·S tokens, N heads, P width without position, R width with (2·HALF), V value width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched
from expertmesh.kernels.recompute import again
from expertmesh.kernels.rms_norm import channels_last
from expertmesh.kernels.rope import rotation_strides


def mla_rope(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query [B, N, S, P+R], key [B, N, S, P+R], value [B, N, S, V]) for attention; differentiable in q, kv and k_rope.

    q: [B, S, N, P+R] and kv: [B, S, N, P+V], any strides; k_rope: [B, S, R]; cos, sin: [B or 1, S, R] (no gradient).
    query and key are views of [B, S, N, P+R] memory of their own, value is a view of kv. Must equal what transformers'
    DeepseekV3Attention hands to its attention function with `rope_interleave`: pairs (0, 1), (2, 3), … turn by the
    angles in the first half of cos and sin, and in the output the first of each pair come first.
    """
    B, S, N, D = q.shape
    R = k_rope.shape[-1]
    assert kv.shape[:3] == (B, S, N) and kv.shape[-1] > D - R and k_rope.shape == (B, S, R) and R % 2 == 0
    assert cos.shape == sin.shape and cos.shape in ((B, S, R), (1, S, R))
    if use_triton(q):
        query, key, value = (x.transpose(1, 2) for x in _MLARope.apply(q, kv, k_rope, cos, sin))
    else:
        query, key, value = mla_rope_reference(q, kv, k_rope, cos, sin)

    def keys(kv: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor]:  # of q nothing is kept but `query`
        return (mla_rope(kv.new_zeros(B, S, N, D), kv, *more)[1],)

    again((key,), keys, kv, k_rope, cos, sin)
    return query, key, value


def mla_rope_reference(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification: DeepseekV3Attention's operations."""
    nope = q.shape[-1] - k_rope.shape[-1]
    key_nope, value = kv.transpose(1, 2).split([nope, kv.shape[-1] - nope], dim=-1)
    key_rope = rotated(k_rope[:, None], cos, sin).to(kv.dtype)
    key = torch.cat([key_nope, key_rope.expand(-1, q.shape[2], -1, -1)], dim=-1)
    return rotated(q.transpose(1, 2), cos, sin), key, value


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, N, S, D], the last R of each row turned by cos and sin [B or 1, S, R]."""
    R = cos.shape[-1]
    cos, sin = cos[:, None, :, : R // 2], sin[:, None, :, : R // 2]
    keep, turn = x.split([x.shape[-1] - R, R], dim=-1)
    first, second = turn[..., 0::2], turn[..., 1::2]
    return torch.cat([keep, first * cos - second * sin, second * cos + first * sin], dim=-1)


#: heads of a token per tile, and warps; a program of the forward has one tile, of the backward all tiles of a token
TUNING = {"forward": {"HEADS": 16, "num_warps": 4}, "backward": {"HEADS": 16, "num_warps": 4}}


@triton.jit
def _copy(source, target, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at source [ROWS, 1] to those at target."""
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(target + cols, tl.load(source + cols, mask & (cols < WIDTH), other=0.0), mask & (cols < WIDTH))


@triton.jit
def _load(ptr, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + cols, mask & (cols < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(ptr + cols, x, mask & (cols < WIDTH))


@triton.jit
def _turn(source, target, cos, sin, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rotated pairs of rows at source [ROWS, 1] to the halves of those at target."""
    x = _load(source, mask, 2 * HALF, 2 * BLOCK)
    first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    _store(target, first * cos - second * sin, mask, HALF, BLOCK)
    _store(target + HALF, second * cos + first * sin, mask, HALF, BLOCK)


@triton.jit
def _turn_back(target, first, second, cos, sin, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the halves to those of the pairs."""
    pairs = tl.interleave(first * cos + second * sin, second * cos - first * sin)
    _store(target, pairs, mask, 2 * HALF, 2 * BLOCK)


@launched
def _forward(
    q_ptr, kv_ptr, k_rope_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, S,
    q_stride_b, q_stride_s, q_stride_n, kv_stride_b, kv_stride_s, kv_stride_n, rope_stride_b, rope_stride_s,
    rot_stride_b, rot_stride_s,
    N: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One program for each token and tile of heads."""
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    s = token - b * S
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    mask = head < N
    every = tl.zeros((1, 1), tl.int32) == 0
    cos = _load(cos_ptr + b * rot_stride_b + s * rot_stride_s, every, HALF, BLOCK_HALF)
    sin = _load(sin_ptr + b * rot_stride_b + s * rot_stride_s, every, HALF, BLOCK_HALF)
    out = (token * N + head) * (P + 2 * HALF)
    q = q_ptr + b * q_stride_b + s * q_stride_s + head * q_stride_n
    _copy(q, q_out_ptr + out, mask, P, BLOCK_P)
    _turn(q + P, q_out_ptr + out + P, cos, sin, mask, HALF, BLOCK_HALF)
    _copy(kv_ptr + b * kv_stride_b + s * kv_stride_s + head * kv_stride_n, k_out_ptr + out, mask, P, BLOCK_P)
    k_rope = k_rope_ptr + b * rope_stride_b + s * rope_stride_s + tl.zeros((HEADS, 1), tl.int64)
    _turn(k_rope, k_out_ptr + out + P, cos, sin, mask, HALF, BLOCK_HALF)


@launched
def _backward(
    dq_out_ptr, dk_out_ptr, dv_ptr, cos_ptr, sin_ptr, dq_ptr, dkv_ptr, dk_rope_ptr, S,
    dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n, dv_stride_b, dv_stride_s, dv_stride_n,
    rot_stride_b, rot_stride_s,
    N: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program for each token: its heads tile by tile; k_rope's gradient is summed over heads at the end."""
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    s = token - b * S
    every = tl.zeros((1, 1), tl.int32) == 0
    cos = _load(cos_ptr + b * rot_stride_b + s * rot_stride_s, every, HALF, BLOCK_HALF)
    sin = _load(sin_ptr + b * rot_stride_b + s * rot_stride_s, every, HALF, BLOCK_HALF)
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
        first, second = (_load(dq_out + P, mask, HALF, BLOCK_HALF), _load(dq_out + P + HALF, mask, HALF, BLOCK_HALF))
        _turn_back(dq + P, first, second, cos, sin, mask, HALF, BLOCK_HALF)
        _copy(dk_out, dkv, mask, P, BLOCK_P)
        _copy(dv_ptr + b * dv_stride_b + s * dv_stride_s + head * dv_stride_n, dkv + P, mask, V, BLOCK_V)
        sum1 += _load(dk_out + P, mask, HALF, BLOCK_HALF)
        sum2 += _load(dk_out + P + HALF, mask, HALF, BLOCK_HALF)
    first, second = tl.sum(sum1, axis=0, keep_dims=True), tl.sum(sum2, axis=0, keep_dims=True)
    _turn_back(dk_rope_ptr + token * (2 * HALF), first, second, cos, sin, every, HALF, BLOCK_HALF)


class _MLARope(torch.autograd.Function):
    """q, kv, k_rope, cos, sin → query and key in [B, S, N, P+R] memory of their own, value as a view of kv."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        (B, S, N, D), R = q.shape, k_rope.shape[-1]
        P = D - R
        q, kv, k_rope = channels_last(q), channels_last(kv), channels_last(k_rope)
        cos, sin = cos.contiguous(), sin.contiguous()
        q_out = torch.empty(q.shape, dtype=torch.promote_types(q.dtype, cos.dtype), device=q.device)
        k_out = torch.empty(q.shape, dtype=kv.dtype, device=q.device)
        tuning = TUNING["forward"]
        if B * S:
            _forward[(B * S, triton.cdiv(N, tuning["HEADS"]))](
                q, kv, k_rope, cos, sin, q_out, k_out, S, *q.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2],
                *rotation_strides(cos), N=N, P=P, HALF=R // 2, BLOCK_P=triton.next_power_of_2(P),
                BLOCK_HALF=triton.next_power_of_2(R // 2), **tuning,
            )  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, kv.dtype, k_rope.dtype
        return q_out, k_out, kv[..., P:]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (B, S, N, D), R, V = dq_out.shape, cos.shape[-1], dv.shape[-1]
        P = D - R
        dq_out, dk_out, dv = channels_last(dq_out), channels_last(dk_out), channels_last(dv)
        dq, dkv, dk_rope = (
            torch.empty(shape, dtype=dtype, device=dv.device)
            for shape, dtype in zip(((B, S, N, D), (B, S, N, P + V), (B, S, R)), ctx.dtypes, strict=True)
        )
        if B * S:
            _backward[(B * S,)](
                dq_out, dk_out, dv, cos, sin, dq, dkv, dk_rope, S, *dq_out.stride()[:3], *dk_out.stride()[:3],
                *dv.stride()[:3], *rotation_strides(cos), N=N, P=P, HALF=R // 2, V=V,
                BLOCK_P=triton.next_power_of_2(P), BLOCK_HALF=triton.next_power_of_2(R // 2),
                BLOCK_V=triton.next_power_of_2(V), **TUNING["backward"],
            )  # fmt: skip
        return dq, dkv, dk_rope, None, None
