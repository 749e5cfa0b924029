"""Rotary position embedding of query and key heads in one pass, optionally with an RMSNorm of each head before it.

    n = x / sqrt(mean(x^2 over D) + eps) * weight            with a norm (Qwen3), else n = x
    [a', b'] = [a cos_a - b sin_a, b cos_b + a sin_b]

a and b are the halves of the first R elements of n or, if interleaved, their even and odd elements. The other D - R
elements are copied. Each kernel reads and writes a head once, computes in float32 and rounds once. Saved for backward
are cos and sin and, with a norm, q, k and the weights.

Letters: B batch, S sequence, T = B·S tokens, N heads (of q or of k), D head width, R rotated width.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit, num_sms
from expertmesh.kernels.recompute import mark_recomputable
from expertmesh.kernels.rms_norm import rms_norm_reference, sum_partials, unit_stride

Pair = tuple[torch.Tensor, torch.Tensor]

#: ROWS: heads per tile; programs: persistent programs per multiprocessor
TUNING = {
    "rotate": {"ROWS": 16, "num_warps": 4},
    "norm and rotate": {"ROWS": 8, "num_warps": 4},
    "norm backward": {"ROWS": 16, "num_warps": 4, "programs": 5},
}


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False,
    half: bool = False,
) -> Pair:  # fmt: skip
    """Return rotated q [B, Nq, S, D] and k [B, Nk, S, D], as transposed views of contiguous [B, S, N, D] tensors.

    Differentiable in q and k, which may have any strides. cos, sin: [B or 1, S, R], R even and at most D; no gradient.
    Must equal `apply_rotary_pos_emb` of Transformers, which is what to call where Triton does not run:
    of Mixtral and GLM-4 by default, with results in the dtype that x and cos promote to;
    of ERNIE 4.5 if `interleaved`, in x's dtype, with R = D and only the first half of cos and sin used;
    of GPT-OSS if `half`, in x's dtype, with cos and sin R / 2 wide.
    """
    R = cos.shape[-1] * (2 if half else 1)
    assert cos.shape == sin.shape and cos.ndim == 3 and cos.shape[0] in (1, len(q)), "cos, sin must be [B or 1, S, R]"
    assert R % 2 == 0 and q.shape[-1] >= R, "R must be even and at most the head width"
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
    """Return normed and rotated queries and keys. Differentiable in q, k and both weights.

    q: [B, S, Nq, D] and k: [B, S, Nk, D], views of the projections' outputs with any strides; q_weight, k_weight: [D];
    cos, sin: [B or 1, S, D], from the model's rotary embedding (no gradient).
    Returns [B, Nq, S, D] and [B, Nk, S, D] as transposed views of contiguous [B, S, N, D] tensors, which attention
    takes without a copy. Must equal `q_norm`, `k_norm` and `apply_rotary_pos_emb` of Qwen3MoeAttention.
    """
    B, S, _, D = q.shape
    assert k.shape[:2] == (B, S) and k.shape[3] == D and q_weight.shape == k_weight.shape == (D,)
    assert D % 2 == 0 and cos.shape == sin.shape and cos.shape in ((1, S, D), (B, S, D)), "cos, sin: [B or 1, S, D]"
    inputs = q, k, q_weight, k_weight, cos, sin
    if use_triton(q):
        q_dtype, k_dtype = (torch.promote_types(x.dtype, w.dtype) for x, w in ((q, q_weight), (k, k_weight)))
        dtypes = [torch.promote_types(q_dtype, cos.dtype), torch.promote_types(k_dtype, cos.dtype)]
        q_out, k_out = _RoPE.apply(dtypes, cos, sin, D, False, eps, q, k, q_weight, k_weight)
        rotated = q_out.transpose(1, 2), k_out.transpose(1, 2)
    else:
        rotated = qk_norm_rope_reference(*inputs, eps)
    mark_recomputable(rotated, partial(qk_norm_rope, eps=eps), *inputs)
    return rotated


def qk_norm_rope_reference(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, eps: float,
) -> Pair:  # fmt: skip
    """Reference of `qk_norm_rope`: the operations of Qwen3MoeAttention."""
    normed = (rms_norm_reference(x, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return qwen3.apply_rotary_pos_emb(*(x.transpose(1, 2) for x in normed), cos, sin)


@triton.jit
def _tile_rows(tile, num_heads, S, N: tl.constexpr, ROWS: tl.constexpr):
    """Return batch, position, head, flat row in [T * N] and mask, each [ROWS, 1], of a tile's rows; a row is a head."""
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
def _rotate_tile(
    tile, heads, rotation, T, S, eps, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SECOND: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norm (if there is a weight) and rotate one tile of heads. cos_b and sin_b begin at column SECOND."""
    x_ptr, weight_ptr, y_ptr, stride_b, stride_s, stride_n = heads
    cos_ptr, sin_ptr, rot_stride_b, rot_stride_s = rotation
    batch, position, head, row, inside = _tile_rows(tile, T * N, S, N, ROWS)
    x_ptr += batch * stride_b + position * stride_s + head * stride_n
    y_ptr += row * D
    pair = tl.arange(0, BLOCK)[None, :]
    rotation_at = batch * rot_stride_b + position * rot_stride_s + pair
    mask = inside & (pair < R // 2)
    if INTERLEAVED:
        at_a, at_b = 2 * pair, 2 * pair + 1
    else:
        at_a, at_b = pair, pair + R // 2
    a, b = _load_two(x_ptr, at_a, at_b, mask)
    cos_a, cos_b = _load_two(cos_ptr, rotation_at, rotation_at + SECOND, mask)
    sin_a, sin_b = _load_two(sin_ptr, rotation_at, rotation_at + SECOND, mask)
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
def _rotate(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, S,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n, rot_stride_b, rot_stride_s, eps,
    NQ: tl.constexpr, NK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SECOND: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norm and rotate, one program per tile of heads: first the tiles of q, then those of k."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * NQ, ROWS)
    rotation = cos_ptr, sin_ptr, rot_stride_b, rot_stride_s
    if tile < q_tiles:
        _rotate_tile(
            tile, (q_ptr, q_weight_ptr, q_out_ptr, q_stride_b, q_stride_s, q_stride_n), rotation, T, S, eps,
            NQ, D, R, SECOND, INTERLEAVED, BACK, ROWS, BLOCK, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_tile(
            tile - q_tiles, (k_ptr, k_weight_ptr, k_out_ptr, k_stride_b, k_stride_s, k_stride_n), rotation, T, S, eps,
            NK, D, R, SECOND, INTERLEAVED, BACK, ROWS, BLOCK, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    first, step, heads, strides, rotation, T, S, eps,
    N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dx of tiles first, first + step, … and their weight gradient [D] to dweight.

    The weight gradient is summed per row of the tile and reduced once after the loop: the loop has no cross-warp sums.
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
    while tile * ROWS < T * N:  # Triton's interpreter fails at `for … in range` with NumPy >= 2.4
        batch, position, head, row, inside = _tile_rows(tile, T * N, S, N, ROWS)
        mask = inside & (at_a < HALF)
        a, b = _load_two(x_ptr + batch * stride_b + position * stride_s + head * stride_n, at_a, at_b, mask)
        dy_at = batch * dy_stride_b + position * dy_stride_s + head * dy_stride_n
        dy_a, dy_b = _load_two(dy_ptr + dy_at, at_a, at_b, mask)
        rotation_at = batch * rot_stride_b + position * rot_stride_s
        cos_a, cos_b = _load_two(cos_ptr + rotation_at, at_a, at_b, mask)
        sin_a, sin_b = _load_two(sin_ptr + rotation_at, at_a, at_b, mask)
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
    """Persistent kernel: q_programs programs for tiles of q, the others for k. Program p writes row p of dweight."""
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
    """Return the strides of batch and position of cos [B or 1, S, R]; a batch of 1 is broadcast with stride 0."""
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


class _RoPE(torch.autograd.Function):
    """q and k [B, S, N, D], optionally both norm weights → rotated q and k in `dtypes`, contiguous."""

    @staticmethod
    def forward(
        ctx: Any, dtypes: list[torch.dtype], cos: torch.Tensor, sin: torch.Tensor, R: int, interleaved: bool,
        eps: float, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        cos, sin = cos.contiguous(), sin.contiguous()
        heads, weights = [unit_stride(x) for x in tensors[:2]], [weight.contiguous() for weight in tensors[2:]]
        ctx.options = R, interleaved, eps
        ctx.dtypes = [x.dtype for x in heads]
        ctx.save_for_backward(cos, sin, *(heads + weights if weights else []))
        return _launch(heads, weights, cos, sin, dtypes, False, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *normed = ctx.saved_tensors
        douts = [unit_stride(dy) for dy in dys]
        if normed:
            grads = _launch_norm_backward(normed, cos, sin, douts, ctx.options[-1])
        else:
            grads = _launch(douts, [], cos, sin, ctx.dtypes, True, *ctx.options)
        return *[None] * 6, *grads


def _launch(
    heads: list[torch.Tensor], weights: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor,
    dtypes: list[torch.dtype], back: bool, R: int, interleaved: bool, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    (B, S, NQ, D), NK = heads[0].shape, heads[1].shape[2]
    assert heads[1].shape == (B, S, NK, D), "q and k must agree in batch, sequence and head width"
    assert B * S * max(NQ, NK) < 2**31, "the kernels index heads in 32 bits"
    outs = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip(heads, dtypes, strict=True))
    tuning = TUNING["norm and rotate" if weights else "rotate"]
    _rotate[(sum(triton.cdiv(B * S * N, tuning["ROWS"]) for N in (NQ, NK)),)](
        *heads, *(weights or (None, None)), cos, sin, *outs, B * S, S,
        *heads[0].stride()[:3], *heads[1].stride()[:3], *rotation_strides(cos), eps,
        NQ=NQ, NK=NK, D=D, R=R, SECOND=cos.shape[-1] - R // 2, INTERLEAVED=interleaved, BACK=back,
        BLOCK=triton.next_power_of_2(R // 2), BLOCK_REST=triton.next_power_of_2(max(1, D - R)), **tuning,
    )  # fmt: skip
    return outs


def _launch_norm_backward(
    inputs: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, douts: list[torch.Tensor], eps: float
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of `inputs` (q, k and both weights) from `douts`, the gradients of the rotated q and k."""
    (B, S, NQ, D), NK = inputs[0].shape, inputs[1].shape[2]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    tuning = dict(TUNING["norm backward"])
    programs = num_sms(cos.device) * tuning.pop("programs")
    q_programs, k_programs = (
        max(1, min(programs * N // (NQ + NK), triton.cdiv(B * S * N, tuning["ROWS"]))) for N in (NQ, NK)
    )
    partial = torch.empty(q_programs + k_programs, D, dtype=torch.float32, device=cos.device)
    _norm_backward[(q_programs + k_programs,)](
        *inputs, cos, sin, *douts, *grads[:2], partial, q_programs, B * S, S,
        *inputs[0].stride()[:3], *inputs[1].stride()[:3], *rotation_strides(cos),
        *douts[0].stride()[:3], *douts[1].stride()[:3], eps,
        NQ=NQ, NK=NK, HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), **tuning,
    )  # fmt: skip
    sum_partials(partial, q_programs, *grads[2:])
    return grads
