"""Rotary position embedding of query and key heads, alone or with RMSNorm of every head before it, in one pass.

    n = x / sqrt(mean(x^2 over D) + eps) * weight            where heads have a norm (Qwen3), else n = x
    [a', b'] = [a cos_a - b sin_a, b cos_b + a sin_b]

a and b are the halves of the turned width R of n or, interleaved, its even and odd elements; the rest of a head passes
unturned. Each kernel reads and writes a head once; all is computed in float32 and rounded once. Kept for backward: cos,
sin and, if normed, what the projections made anyway.

Letters: B batch, S sequence, T = B·S tokens, N heads (of q or of k), D head width, R turned width.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit, num_sms
from expertmesh.kernels.recompute import mark_recomputable
from expertmesh.kernels.rms_norm import channels_last, rms_norm_reference, sum_partials

Pair = tuple[torch.Tensor, torch.Tensor]

#: heads per tile, and warps; of the backward of norms also persistent programs per multiprocessor
TUNING = {
    "turn": {"ROWS": 16, "num_warps": 4},
    "norm and turn": {"ROWS": 8, "num_warps": 4},
    "backward": {"ROWS": 16, "num_warps": 4, "programs": 5},
}


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False,
    half: bool = False,
) -> Pair:  # fmt: skip
    """Turned queries [B, Nq, S, D] and keys [B, Nk, S, D], differentiable in both; q and k may have any strides.

    cos, sin: [B or 1, S, R], R even and at most D; no gradient. Must equal `apply_rotary_pos_emb` of Transformers'
    Mixtral and GLM-4 (results in the dtype that x and cos promote to); interleaved, of ERNIE 4.5 (in x's dtype; R is D,
    of cos and sin the first half counts); with `half`, of GPT-OSS (in x's dtype; cos and sin are R / 2 wide, for both).
    The results are transposed views of [B, S, N, D] memory. Where Triton does not run, call those.
    """
    R = cos.shape[-1] * (2 if half else 1)
    assert cos.shape == sin.shape and cos.ndim == 3 and cos.shape[0] in (1, len(q)), "cos and sin are [B or 1, S, R]"
    assert R % 2 == 0 and q.shape[-1] >= R, "R is even and at most the heads' width"
    if interleaved:
        cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    heads = q.transpose(1, 2), k.transpose(1, 2)
    dtypes = [x.dtype if interleaved or half else torch.promote_types(x.dtype, cos.dtype) for x in heads]
    q, k = _RoPE.apply(dtypes, cos, sin, R, interleaved, 0.0, *heads)
    return q.transpose(1, 2), k.transpose(1, 2)


def qk_norm_rope(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, eps: float,
) -> Pair:  # fmt: skip
    """Normed and rotated queries and keys, ready for attention; differentiable in q, k and both weights.

    q: [B, S, Nq, D] and k: [B, S, Nk, D], the projections' outputs seen by head, any strides; q_weight, k_weight: [D];
    cos, sin: [B or 1, S, D], as the model's rotary embedding gives them (no gradient).
    Returns [B, Nq, S, D] and [B, Nk, S, D] as transposed views of [B, S, N, D] memory, which attention takes without a
    copy. Must equal `q_norm`, `k_norm` and `apply_rotary_pos_emb` of transformers' Qwen3MoeAttention.
    """
    B, S, _, D = q.shape
    assert k.shape[:2] == (B, S) and k.shape[3] == D and q_weight.shape == k_weight.shape == (D,)
    assert D % 2 == 0 and cos.shape == sin.shape and cos.shape in ((1, S, D), (B, S, D)), "whole, even-width heads turn"
    inputs = q, k, q_weight, k_weight, cos, sin
    if use_triton(q):
        q_dtype, k_dtype = (torch.promote_types(x.dtype, w.dtype) for x, w in ((q, q_weight), (k, k_weight)))
        dtypes = [torch.promote_types(q_dtype, cos.dtype), torch.promote_types(k_dtype, cos.dtype)]
        q_out, k_out = _RoPE.apply(dtypes, cos, sin, D, False, eps, q, k, q_weight, k_weight)
        turned = q_out.transpose(1, 2), k_out.transpose(1, 2)
    else:
        turned = qk_norm_rope_reference(*inputs, eps)
    mark_recomputable(turned, partial(qk_norm_rope, eps=eps), *inputs)
    return turned


def qk_norm_rope_reference(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, eps: float,
) -> Pair:  # fmt: skip
    """The specification: Qwen3MoeAttention's operations, one by one."""
    normed = (rms_norm_reference(x, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return qwen3.apply_rotary_pos_emb(*(x.transpose(1, 2) for x in normed), cos, sin)


@triton.jit
def _places(tile, num_heads, S, N: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile's heads, counted through all tokens: batch, position, head, flat number and whether there is one."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // N
    b = token // S
    return (
        b.to(tl.int64),
        (token - b * S).to(tl.int64),
        (row - token * N).to(tl.int64),
        row.to(tl.int64),
        row < num_heads,
    )


@triton.jit
def _load_two(ptr, at_a, at_b, mask):
    return tl.load(ptr + at_a, mask, other=0.0).to(tl.float32), tl.load(ptr + at_b, mask, other=0.0).to(tl.float32)


@triton.jit
def _turn_tile(
    tile, heads, rotation, T, S, eps, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SECOND: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norms and turns one tile of heads; cos and sin of b begin at SECOND."""
    x_ptr, weight_ptr, y_ptr, stride_b, stride_s, stride_n = heads
    cos_ptr, sin_ptr, rot_stride_b, rot_stride_s = rotation
    batch, position, head, row, inside = _places(tile, T * N, S, N, ROWS)
    x_ptr += batch * stride_b + position * stride_s + head * stride_n
    y_ptr += row * D
    pair = tl.arange(0, BLOCK)[None, :]
    turn = batch * rot_stride_b + position * rot_stride_s + pair
    mask = inside & (pair < R // 2)
    if INTERLEAVED:
        at_a, at_b = 2 * pair, 2 * pair + 1
    else:
        at_a, at_b = pair, pair + R // 2
    a, b = _load_two(x_ptr, at_a, at_b, mask)
    cos_a, cos_b = _load_two(cos_ptr, turn, turn + SECOND, mask)
    sin_a, sin_b = _load_two(sin_ptr, turn, turn + SECOND, mask)
    if weight_ptr is not None:
        weight_a, weight_b = _load_two(weight_ptr, at_a, at_b, pair < R // 2)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / D + eps)
        a = a * rstd * weight_a
        b = b * rstd * weight_b
    if BACK:
        sin_a, sin_b = -sin_b, -sin_a
    tl.store(y_ptr + at_a, a * cos_a - b * sin_a, mask)
    tl.store(y_ptr + at_b, b * cos_b + a * sin_b, mask)
    if R < D:
        at = R + tl.arange(0, BLOCK_REST)[None, :]
        rest = inside & (at < D)
        tl.store(y_ptr + at, tl.load(x_ptr + at, rest, other=0.0).to(tl.float32), rest)


@fast_jit
def _turn(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, S,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b, rot_stride_s, eps,
    NQ: tl.constexpr, NK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SECOND: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program per tile of heads: those of q, then those of k."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * NQ, ROWS)
    rotation = cos_ptr, sin_ptr, rot_stride_b, rot_stride_s
    if tile < q_tiles:
        _turn_tile(
            tile, (q_ptr, q_weight_ptr, q_out_ptr, q_stride_b, q_stride_s, q_stride_n), rotation, T, S, eps,
            NQ, D, R, SECOND, INTERLEAVED, BACK, ROWS, BLOCK, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_tile(
            tile - q_tiles, (k_ptr, k_weight_ptr, k_out_ptr, k_stride_b, k_stride_s, k_stride_n), rotation, T, S, eps,
            NK, D, R, SECOND, INTERLEAVED, BACK, ROWS, BLOCK, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    first, step, heads, strides, rotation, T, S, eps,
    N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of tiles first, first + step, …; their weight gradient [D] goes to dweight.

    The weight gradient is summed per thread and reduced over heads once, at the end: nothing in the loop crosses warps.
    """
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr = heads
    stride_b, stride_s, stride_n, dy_stride_b, dy_stride_s, dy_stride_n = strides
    cos_ptr, sin_ptr, rot_stride_b, rot_stride_s = rotation
    at_a = tl.arange(0, BLOCK)[None, :]
    at_b = at_a + HALF
    weight_a, weight_b = _load_two(weight_ptr, at_a, at_b, at_a < HALF)
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    tile = first
    while tile * ROWS < T * N:  # not `for … in range`: NumPy >= 2.4 broke that in Triton's interpreter
        batch, position, head, row, inside = _places(tile, T * N, S, N, ROWS)
        mask = inside & (at_a < HALF)
        a, b = _load_two(x_ptr + batch * stride_b + position * stride_s + head * stride_n, at_a, at_b, mask)
        dy_at = batch * dy_stride_b + position * dy_stride_s + head * dy_stride_n
        dy_a, dy_b = _load_two(dy_ptr + dy_at, at_a, at_b, mask)
        turn = batch * rot_stride_b + position * rot_stride_s
        cos_a, cos_b = _load_two(cos_ptr + turn, at_a, at_b, mask)
        sin_a, sin_b = _load_two(sin_ptr + turn, at_a, at_b, mask)
        dn_a = dy_a * cos_a + dy_b * sin_b
        dn_b = dy_b * cos_b - dy_a * sin_a
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * HALF) + eps)
        a *= rstd
        b *= rstd
        sum_a += dn_a * a
        sum_b += dn_b * b
        dn_a *= weight_a
        dn_b *= weight_b
        mean = tl.sum(dn_a * a + dn_b * b, axis=1, keep_dims=True) / (2 * HALF)
        dx = dx_ptr + row * (2 * HALF)
        tl.store(dx + at_a, rstd * (dn_a - a * mean), mask)
        tl.store(dx + at_b, rstd * (dn_b - b * mean), mask)
        tile += step
    tl.store(dweight_ptr + at_a, tl.sum(sum_a, axis=0, keep_dims=True), at_a < HALF)
    tl.store(dweight_ptr + at_b, tl.sum(sum_b, axis=0, keep_dims=True), at_a < HALF)


@fast_jit
def _norm_backward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_out_ptr, dk_out_ptr, dq_ptr, dk_ptr, dweight_ptr,
    q_programs, T, S, q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b,
    rot_stride_s, dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n, eps,
    NQ: tl.constexpr, NK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Persistent: the first programs share the tiles of q, the others those of k; program p writes row p of dweight."""
    program = tl.program_id(0)
    dweight_ptr += program * (HALF * 2)
    rotation = cos_ptr, sin_ptr, rot_stride_b, rot_stride_s
    if program < q_programs:
        _backward_tiles(
            program, q_programs, (q_ptr, q_weight_ptr, dq_out_ptr, dq_ptr, dweight_ptr),
            (q_stride_b, q_stride_s, q_stride_n, dq_stride_b, dq_stride_s, dq_stride_n), rotation, T, S, eps,
            NQ, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _backward_tiles(
            program - q_programs, tl.num_programs(0) - q_programs,
            (k_ptr, k_weight_ptr, dk_out_ptr, dk_ptr, dweight_ptr),
            (k_stride_b, k_stride_s, k_stride_n, dk_stride_b, dk_stride_s, dk_stride_n), rotation, T, S, eps,
            NK, HALF, ROWS, BLOCK,
        )  # fmt: skip


def rotation_strides(cos: torch.Tensor) -> tuple[int, int]:
    """Those of batch and position of cos [B or 1, S, R], of which one row may serve all."""
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


class _RoPE(torch.autograd.Function):
    """Heads of q and k [B, S, N, D] → the same turned, contiguous, in `dtypes`; given weights, normed before."""

    @staticmethod
    def forward(
        ctx: Any, dtypes: list[torch.dtype], cos: torch.Tensor, sin: torch.Tensor, R: int, interleaved: bool,
        eps: float, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        cos, sin = cos.contiguous(), sin.contiguous()
        heads, weights = [channels_last(x) for x in tensors[:2]], [weight.contiguous() for weight in tensors[2:]]
        ctx.options = R, interleaved, eps
        ctx.dtypes = [x.dtype for x in heads]
        ctx.save_for_backward(cos, sin, *(heads + weights if weights else []))
        return _launch(heads, weights, cos, sin, dtypes, False, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *normed = ctx.saved_tensors
        outs = [channels_last(dy) for dy in dys]
        if normed:
            grads = _launch_norm_backward(normed, cos, sin, outs, ctx.options[-1])
        else:
            grads = _launch(outs, [], cos, sin, ctx.dtypes, True, *ctx.options)
        return *[None] * 6, *grads


def _launch(
    heads: list[torch.Tensor], weights: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor,
    dtypes: list[torch.dtype], back: bool, R: int, interleaved: bool, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    (B, S, NQ, D), NK = heads[0].shape, heads[1].shape[2]
    assert heads[1].shape == (B, S, NK, D), "heads of q and k are as wide"
    assert B * S * max(NQ, NK) < 2**31, "heads are counted in 32 bits"
    outs = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip(heads, dtypes, strict=True))
    tuning = TUNING["norm and turn" if weights else "turn"]
    _turn[(sum(triton.cdiv(B * S * N, tuning["ROWS"]) for N in (NQ, NK)),)](
        *heads, *(weights or (None, None)), cos, sin, *outs, B * S, S,
        *heads[0].stride()[:3], *heads[1].stride()[:3], *rotation_strides(cos), eps,
        NQ=NQ, NK=NK, D=D, R=R, SECOND=cos.shape[-1] - R // 2, INTERLEAVED=interleaved, BACK=back,
        BLOCK=triton.next_power_of_2(R // 2), BLOCK_REST=triton.next_power_of_2(max(1, D - R)), **tuning,
    )  # fmt: skip
    return outs


def _launch_norm_backward(
    normed: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, outs: list[torch.Tensor], eps: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and both weights, which are `normed`, from `outs`, those of the turned q and k."""
    (B, S, NQ, D), NK = normed[0].shape, normed[1].shape[2]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in normed)
    tuning = dict(TUNING["backward"])
    programs = num_sms(cos.device) * tuning.pop("programs")
    q_programs, k_programs = (
        max(1, min(programs * N // (NQ + NK), triton.cdiv(B * S * N, tuning["ROWS"]))) for N in (NQ, NK)
    )
    partial = torch.empty(q_programs + k_programs, D, dtype=torch.float32, device=cos.device)
    _norm_backward[(q_programs + k_programs,)](
        *normed, cos, sin, *outs, *grads[:2], partial, q_programs, B * S, S,
        *normed[0].stride()[:3], *normed[1].stride()[:3], *rotation_strides(cos),
        *outs[0].stride()[:3], *outs[1].stride()[:3], eps,
        NQ=NQ, NK=NK, HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), **tuning,
    )  # fmt: skip
    sum_partials(partial, q_programs, *grads[2:])
    return grads
