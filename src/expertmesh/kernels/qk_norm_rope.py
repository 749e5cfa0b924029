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
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched, processors
from expertmesh.kernels.rms_norm import channels_last, rms_norm_reference, sum_partials
from expertmesh.kernels.rope import rotation_strides


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
    Must equal `q_norm`, `k_norm` and `apply_rotary_pos_emb` of transformers' Qwen3MoeAttention. Rotary embeddings must
    turn all of D. Raises ValueError if cos or sin want gradients.
    """
    B, S, _, D = q.shape
    assert k.shape[:2] == (B, S) and k.shape[3] == D and q_weight.shape == k_weight.shape == (D,)
    assert D % 2 == 0 and cos.shape == sin.shape and cos.shape in ((1, S, D), (B, S, D)), "whole, even-width heads turn"
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
    return apply_rotary_pos_emb(q, k, cos, sin)


#: heads per tile, warps, and persistent programs per multiprocessor
TUNING = {"forward": {"ROWS": 8, "num_warps": 4}, "backward": {"ROWS": 16, "num_warps": 4, "programs": 5}}


@triton.jit
def _load_halves(ptr, HALF: tl.constexpr, mask):
    return tl.load(ptr, mask, other=0.0).to(tl.float32), tl.load(ptr + HALF, mask, other=0.0).to(tl.float32)


@triton.jit
def _places(tile, num_heads, S, N: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile's heads, counted through all tokens: batch, position, head, flat number and whether there is one."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // N
    b = token // S
    return b.to(tl.int64), (token - b * S).to(tl.int64), row - token * N, row.to(tl.int64), row < num_heads


@triton.jit
def _forward_tile(
    tile, x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, num_heads, S, stride_b, stride_s, stride_n, rot_stride_b,
    rot_stride_s, eps, N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    b, s, head, row, inside = _places(tile, num_heads, S, N, ROWS)
    mask = inside & (cols < HALF)
    x1, x2 = _load_halves(x_ptr + b * stride_b + s * stride_s + head * stride_n + cols, HALF, mask)
    turn = b * rot_stride_b + s * rot_stride_s + cols
    c1, c2 = _load_halves(cos_ptr + turn, HALF, mask)
    s1, s2 = _load_halves(sin_ptr + turn, HALF, mask)
    w1, w2 = _load_halves(weight_ptr + cols, HALF, cols < HALF)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / (2 * HALF) + eps)
    n1 = x1 * rstd * w1
    n2 = x2 * rstd * w2
    y = y_ptr + row * (2 * HALF) + cols
    tl.store(y, n1 * c1 - n2 * s1, mask)
    tl.store(y + HALF, n2 * c2 + n1 * s2, mask)


@launched
def _forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, S,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b, rot_stride_s, eps,
    NQ: tl.constexpr, NK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program per tile of heads: those of q, then those of k."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * NQ, ROWS)
    if tile < q_tiles:
        _forward_tile(
            tile, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, T * NQ, S, q_stride_b, q_stride_s, q_stride_n,
            rot_stride_b, rot_stride_s, eps, NQ, HALF, ROWS, BLOCK_HALF,
        )  # fmt: skip
    else:
        _forward_tile(
            tile - q_tiles, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, T * NK, S, k_stride_b, k_stride_s,
            k_stride_n, rot_stride_b, rot_stride_s, eps, NK, HALF, ROWS, BLOCK_HALF,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    first, step, x_ptr, weight_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, dweight_ptr, num_heads, S,
    stride_b, stride_s, stride_n, dy_stride_b, dy_stride_s, dy_stride_n, rot_stride_b, rot_stride_s, eps,
    N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """dx of tiles first, first + step, …; their weight gradient [D] goes to dweight_ptr.

    The weight gradient is summed per thread and reduced over heads once, at the end: nothing in the loop crosses warps.
    """
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    w1, w2 = _load_halves(weight_ptr + cols, HALF, cols < HALF)
    sum1 = tl.zeros((ROWS, BLOCK_HALF), tl.float32)
    sum2 = tl.zeros((ROWS, BLOCK_HALF), tl.float32)
    tile = first
    while tile * ROWS < num_heads:  # not `for … in range`: NumPy >= 2.4 broke that in Triton's interpreter
        b, s, head, row, inside = _places(tile, num_heads, S, N, ROWS)
        mask = inside & (cols < HALF)
        x1, x2 = _load_halves(x_ptr + b * stride_b + s * stride_s + head * stride_n + cols, HALF, mask)
        dy1, dy2 = _load_halves(dy_ptr + b * dy_stride_b + s * dy_stride_s + head * dy_stride_n + cols, HALF, mask)
        turn = b * rot_stride_b + s * rot_stride_s + cols
        c1, c2 = _load_halves(cos_ptr + turn, HALF, mask)
        s1, s2 = _load_halves(sin_ptr + turn, HALF, mask)
        dn1 = dy1 * c1 + dy2 * s2
        dn2 = dy2 * c2 - dy1 * s1
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / (2 * HALF) + eps)
        x1 *= rstd
        x2 *= rstd
        sum1 += dn1 * x1
        sum2 += dn2 * x2
        dn1 *= w1
        dn2 *= w2
        mean = tl.sum(dn1 * x1 + dn2 * x2, axis=1, keep_dims=True) / (2 * HALF)
        dx = dx_ptr + row * (2 * HALF) + cols
        tl.store(dx, rstd * (dn1 - x1 * mean), mask)
        tl.store(dx + HALF, rstd * (dn2 - x2 * mean), mask)
        tile += step
    tl.store(dweight_ptr + cols, tl.sum(sum1, axis=0, keep_dims=True), cols < HALF)
    tl.store(dweight_ptr + HALF + cols, tl.sum(sum2, axis=0, keep_dims=True), cols < HALF)


@launched
def _backward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr, dq_ptr, dk_ptr, dweight_ptr,
    q_programs, T, S, q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b,
    rot_stride_s, dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n, eps,
    NQ: tl.constexpr, NK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Persistent: the first programs share the tiles of q, the others those of k; program p writes row p of dweight."""
    program = tl.program_id(0)
    dweight_ptr += program * (HALF * 2)
    if program < q_programs:
        _backward_tiles(
            program, q_programs, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dq_ptr, dweight_ptr, T * NQ, S,
            q_stride_b, q_stride_s, q_stride_n, dq_stride_b, dq_stride_s, dq_stride_n, rot_stride_b, rot_stride_s, eps,
            NQ, HALF, ROWS, BLOCK_HALF,
        )  # fmt: skip
    else:
        _backward_tiles(
            program - q_programs, tl.num_programs(0) - q_programs, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_out_ptr,
            dk_ptr, dweight_ptr, T * NK, S, k_stride_b, k_stride_s, k_stride_n, dk_stride_b, dk_stride_s, dk_stride_n,
            rot_stride_b, rot_stride_s, eps, NK, HALF, ROWS, BLOCK_HALF,
        )  # fmt: skip


class _QKNormRope(torch.autograd.Function):
    """q, k, both weights, cos, sin → rotated q and k in [B, S, N, D] memory."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor, eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        B, S, NQ, D = q.shape
        NK = k.shape[2]
        assert B * S * max(NQ, NK) < 2**31, "heads are counted in 32 bits"
        q, k = channels_last(q), channels_last(k)
        q_weight, k_weight, cos, sin = q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous()
        q_dtype, k_dtype = (
            torch.promote_types(torch.promote_types(x.dtype, w.dtype), cos.dtype)
            for x, w in ((q, q_weight), (k, k_weight))
        )
        q_out = torch.empty(q.shape, dtype=q_dtype, device=q.device)
        k_out = torch.empty(k.shape, dtype=k_dtype, device=k.device)
        tuning = TUNING["forward"]
        if B * S:
            programs = sum(triton.cdiv(B * S * N, tuning["ROWS"]) for N in (NQ, NK))
            _forward[(programs,)](
                q, k, q_weight, k_weight, cos, sin, q_out, k_out, B * S, S, *q.stride()[:3], *k.stride()[:3],
                *rotation_strides(cos), eps,
                NQ=NQ, NK=NK, HALF=D // 2, BLOCK_HALF=triton.next_power_of_2(D // 2), **tuning,
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
        dq_out, dk_out = channels_last(dq_out), channels_last(dk_out)
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
        tuning = dict(TUNING["backward"])
        programs = processors(q.device) * tuning.pop("programs")
        k_programs, q_programs = (
            max(1, min(programs * N // (NQ + NK), triton.cdiv(B * S * N, tuning["ROWS"]))) for N in (NK, NQ)
        )
        partial = torch.empty(q_programs + k_programs, D, dtype=torch.float32, device=q.device)
        _backward[(q_programs + k_programs,)](
            q, k, q_weight, k_weight, cos, sin, dq_out, dk_out, dq, dk, partial, q_programs, B * S, S,
            *q.stride()[:3], *k.stride()[:3], *rotation_strides(cos),
            *dq_out.stride()[:3], *dk_out.stride()[:3], ctx.eps,
            NQ=NQ, NK=NK, HALF=D // 2, BLOCK_HALF=triton.next_power_of_2(D // 2), **tuning,
        )  # fmt: skip
        sum_partials(partial, q_programs, dq_weight, dk_weight)
        return dq, dk, dq_weight, dk_weight, None, None, None
