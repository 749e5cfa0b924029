"""RMSNorm of every query and key head, then rotary position embedding, in one pass over the projections' outputs.

    n = q / sqrt(mean(q^2 over D) + eps) * weight        (the same for k with its own weight)
    out = n * cos + rotate_half(n) * sin                 rotate_half([a, b]) = [-b, a], halves of D

This is what Qwen3 and Qwen3-MoE attention does between its projections and its attention. Stock Transformers needs
about fifteen passes over q and k; here forward reads and writes each once, backward reads q, k and the two gradients
once and writes dq and dk. Only q and k (which the projections made anyway), the weights and cos and sin are kept for
backward. All is computed in float32 and rounded once, where stock rounds to the input's dtype after every operation.

Letters: B batch, S sequence, N heads (of q or of k), D head width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.rms_norm import partial_rows, rms_norm_reference


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed and rotated queries and keys, ready for attention; differentiable in q, k and both weights.

    q: [B, S, Nq, D] and k: [B, S, Nk, D], the projections' outputs seen by head, any strides; q_weight, k_weight: [D];
    cos, sin: [B or 1, S, D], as the model's rotary embedding gives them (no gradient).
    Returns [B, Nq, S, D] and [B, Nk, S, D] as transposed views of [B, S, N, D] memory: the layout that stock
    Transformers hands to attention as well, flash kernels read it without a copy and SDPA takes it through strides.
    Must equal `q_norm`, `k_norm` and `apply_rotary_pos_emb` of transformers' Qwen3MoeAttention. Rotary embeddings that
    turn only a part of D are not supported: ValueError.
    """
    B, S, _, D = q.shape
    if D % 2 or cos.shape[-1] != D:
        raise ValueError(f"cos is {cos.shape[-1]} wide but heads are {D}: qk_norm_rope turns whole, even-width heads.")
    if k.shape[:2] != q.shape[:2] or k.shape[-1] != D or q_weight.shape != (D,) or k_weight.shape != (D,):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, S, heads, D] with equal B, S and D, and their "
            f"weights [D]; got weights {tuple(q_weight.shape)} and {tuple(k_weight.shape)}."
        )
    if cos.shape != sin.shape or cos.ndim != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != S:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [1 or {B}, {S}, {D}].")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("qk_norm_rope gives cos and sin no gradient: detach them.")
    if use_triton(q):
        q_out, k_out = _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, eps)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)
    return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification: Qwen3MoeAttention's operations, one by one."""
    q = rms_norm_reference(q, q_weight, eps).transpose(1, 2)
    k = rms_norm_reference(k, k_weight, eps).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@triton.jit
def _load_rotation(cos_ptr, sin_ptr, b, s, stride_b, stride_s, HALF, cols, mask):
    """cos and sin of one token, each as its two halves [1, BLOCK_HALF]."""
    base = b * stride_b + s * stride_s + cols
    c1 = tl.load(cos_ptr + base, mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + base + HALF, mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + base, mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + base + HALF, mask, other=0.0).to(tl.float32)
    return c1, c2, s1, s2


@triton.jit
def _load_halves(ptr, HALF, mask):
    return tl.load(ptr, mask, other=0.0).to(tl.float32), tl.load(ptr + HALF, mask, other=0.0).to(tl.float32)


@triton.jit
def _heads_forward(
    x_ptr, weight_ptr, y_ptr, c1, c2, s1, s2, N, HALF, stride_n, eps, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """All heads [N, D] of one token; x_ptr and y_ptr point at the token."""
    heads = tl.arange(0, BLOCK_N)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < N) & (cols < HALF)
    x1, x2 = _load_halves(x_ptr + heads * stride_n + cols, HALF, mask)
    w1, w2 = _load_halves(weight_ptr + cols, HALF, cols < HALF)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / (2 * HALF) + eps)
    n1 = x1 * rstd * w1
    n2 = x2 * rstd * w2
    y = y_ptr + heads * (2 * HALF) + cols
    tl.store(y, n1 * c1 - n2 * s1, mask)
    tl.store(y + HALF, n2 * c2 + n1 * s2, mask)


@triton.jit
def _forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, S, NQ, NK, HALF,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b, rot_stride_s, eps,
    BLOCK_NQ: tl.constexpr, BLOCK_NK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    c1, c2, s1, s2 = _load_rotation(cos_ptr, sin_ptr, b, s, rot_stride_b, rot_stride_s, HALF, cols, cols < HALF)
    q = q_ptr + b * q_stride_b + s * q_stride_s
    k = k_ptr + b * k_stride_b + s * k_stride_s
    q_out = q_out_ptr + token * (NQ * HALF * 2)
    k_out = k_out_ptr + token * (NK * HALF * 2)
    _heads_forward(q, q_weight_ptr, q_out, c1, c2, s1, s2, NQ, HALF, q_stride_n, eps, BLOCK_NQ, BLOCK_HALF)
    _heads_forward(k, k_weight_ptr, k_out, c1, c2, s1, s2, NK, HALF, k_stride_n, eps, BLOCK_NK, BLOCK_HALF)


@triton.jit
def _heads_backward(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, c1, c2, s1, s2, N, HALF, stride_n, dy_stride_n, eps,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Writes dx of one token's heads; returns its terms of the weight's gradient, [BLOCK_HALF] twice."""
    heads = tl.arange(0, BLOCK_N)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < N) & (cols < HALF)
    x1, x2 = _load_halves(x_ptr + heads * stride_n + cols, HALF, mask)
    w1, w2 = _load_halves(weight_ptr + cols, HALF, cols < HALF)
    dy1, dy2 = _load_halves(dy_ptr + heads * dy_stride_n + cols, HALF, mask)
    dn1 = dy1 * c1 + dy2 * s2
    dn2 = dy2 * c2 - dy1 * s1
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / (2 * HALF) + eps)
    x1 *= rstd
    x2 *= rstd
    mean = tl.sum(dn1 * w1 * x1 + dn2 * w2 * x2, axis=1, keep_dims=True) / (2 * HALF)
    dx = dx_ptr + heads * (2 * HALF) + cols
    tl.store(dx, rstd * (dn1 * w1 - x1 * mean), mask)
    tl.store(dx + HALF, rstd * (dn2 * w2 - x2 * mean), mask)
    return tl.sum(dn1 * x1, axis=0), tl.sum(dn2 * x2, axis=0)


@triton.jit
def _store_sums(ptr, sum1, sum2, HALF, BLOCK_HALF: tl.constexpr):
    cols = tl.arange(0, BLOCK_HALF)
    tl.store(ptr + cols, sum1, cols < HALF)
    tl.store(ptr + HALF + cols, sum2, cols < HALF)


@triton.jit
def _backward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr, dq_ptr, dk_ptr, dweight_ptr,
    T, S, NQ, NK, HALF,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b, rot_stride_s,
    dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n, eps,
    BLOCK_NQ: tl.constexpr, BLOCK_NK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Persistent: program p takes tokens p, p + P, ...; its weight gradients go to dweight[p] of [P, 2 (q, k), D]."""
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    q_sum1 = tl.zeros((BLOCK_HALF,), tl.float32)
    q_sum2 = tl.zeros((BLOCK_HALF,), tl.float32)
    k_sum1 = tl.zeros((BLOCK_HALF,), tl.float32)
    k_sum2 = tl.zeros((BLOCK_HALF,), tl.float32)
    token = tl.program_id(0).to(tl.int64)
    while token < T:  # not `for … in range`: NumPy >= 2.4 broke that in Triton's interpreter
        b, s = token // S, token % S
        c1, c2, s1, s2 = _load_rotation(cos_ptr, sin_ptr, b, s, rot_stride_b, rot_stride_s, HALF, cols, cols < HALF)
        term1, term2 = _heads_backward(
            q_ptr + b * q_stride_b + s * q_stride_s, q_weight_ptr, dq_out_ptr + b * dq_stride_b + s * dq_stride_s,
            dq_ptr + token * (NQ * HALF * 2), c1, c2, s1, s2, NQ, HALF, q_stride_n, dq_stride_n, eps,
            BLOCK_NQ, BLOCK_HALF,
        )  # fmt: skip
        q_sum1 += term1
        q_sum2 += term2
        term1, term2 = _heads_backward(
            k_ptr + b * k_stride_b + s * k_stride_s, k_weight_ptr, dk_out_ptr + b * dk_stride_b + s * dk_stride_s,
            dk_ptr + token * (NK * HALF * 2), c1, c2, s1, s2, NK, HALF, k_stride_n, dk_stride_n, eps,
            BLOCK_NK, BLOCK_HALF,
        )  # fmt: skip
        k_sum1 += term1
        k_sum2 += term2
        token += tl.num_programs(0)
    partial = dweight_ptr + tl.program_id(0) * (HALF * 4)
    _store_sums(partial, q_sum1, q_sum2, HALF, BLOCK_HALF)
    _store_sums(partial + HALF * 2, k_sum1, k_sum2, HALF, BLOCK_HALF)


def _blocks(NQ: int, NK: int, D: int) -> dict[str, int]:
    """Tiles of all heads by half a head, with 32 query elements per thread."""
    block_nq, block_half = triton.next_power_of_2(NQ), triton.next_power_of_2(D // 2)
    warps = min(16, max(1, block_nq * block_half // 512))
    return {"BLOCK_NQ": block_nq, "BLOCK_NK": triton.next_power_of_2(NK), "BLOCK_HALF": block_half, "num_warps": warps}


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _QKNormRope(torch.autograd.Function):
    """q, k, both weights, cos, sin → rotated q and k in [B, S, N, D] memory."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        B, S, NQ, D = q.shape
        NK = k.shape[2]
        q, k = _dense_last(q), _dense_last(k)
        q_weight, k_weight, cos, sin = q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous()
        q_out, k_out = (
            torch.empty(
                x.shape, device=x.device, dtype=torch.promote_types(torch.promote_types(x.dtype, w.dtype), cos.dtype)
            )
            for x, w in ((q, q_weight), (k, k_weight))
        )
        if B * S:
            _forward[(B * S,)](
                q, k, q_weight, k_weight, cos, sin, q_out, k_out, S, NQ, NK, D // 2, *q.stride()[:3], *k.stride()[:3],
                cos.stride(0) if cos.shape[0] == B else 0, cos.stride(1), eps, **_blocks(NQ, NK, D),
            )  # fmt: skip
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        B, S, NQ, D = q.shape
        NK = k.shape[2]
        dq_out, dk_out = _dense_last(dq_out), _dense_last(dk_out)
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        programs = partial_rows(q.device, B * S, per_processor=4)
        partial = torch.empty(programs, 2, D, dtype=torch.float32, device=q.device)
        _backward[(programs,)](
            q, k, q_weight, k_weight, cos, sin, dq_out, dk_out, dq, dk, partial, B * S, S, NQ, NK, D // 2,
            *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.shape[0] == B else 0, cos.stride(1),
            *dq_out.stride()[:3], *dk_out.stride()[:3], ctx.eps, **_blocks(NQ, NK, D),
        )  # fmt: skip
        dweights = partial.sum(0)
        return dq, dk, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None, None, None
