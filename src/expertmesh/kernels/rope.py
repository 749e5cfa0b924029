"""Rotary position embedding without a norm before it: one pass over queries and one over keys, forward and backward.

    [a', b'] = [a cos_a - b sin_a, b cos_b + a sin_b]

a and b are the halves of the turned width R or, interleaved, its even and odd elements; the rest of a head passes
unturned. All is computed in float32 and rounded once. Only cos and sin are kept: backward turns the gradients back.
Heads with a norm of their own and a whole turn (Qwen3) have `qk_norm_rope`.

Letters: B batch, S sequence, N heads, D head width, R turned width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.models.gpt_oss.modeling_gpt_oss import _apply_rotary_emb

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched
from expertmesh.kernels.rms_norm import channels_last

#: heads per tile, and warps
TUNING = {"forward": {"ROWS": 16, "num_warps": 4}, "backward": {"ROWS": 16, "num_warps": 4}}


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, S, N, D] in x's dtype, contiguous, turned by cos and sin (no gradient).

    x: [B, S, N, D], any strides; cos, sin: [B or 1, S, D / 2]. Must equal `apply_rotary_pos_emb` of Transformers'
    GPT-OSS.
    """
    assert cos.shape == sin.shape and cos.shape[0] in (1, x.shape[0]) and 2 * cos.shape[2] == x.shape[3]
    return _RoPE.apply(x, cos, sin, x.shape[3], False, x.dtype) if use_triton(x) else rope_reference(x, cos, sin)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The specification: GPT-OSS's."""
    return _apply_rotary_emb(x, cos[:, :, None], sin[:, :, None]).to(x.dtype)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned queries [B, Nq, S, D] and keys [B, Nk, S, D], differentiable in both; q and k may have any strides.

    cos, sin: [B or 1, S, R], R even and at most D; no gradient. Must equal `apply_rotary_pos_emb` of Transformers'
    Mixtral and GLM-4 (results in the dtype that x and cos promote to) and, interleaved, of ERNIE 4.5 (in x's dtype; of
    cos and sin the first half counts). The kernel's results are transposed views of [B, S, N, D] memory.
    """
    R = cos.shape[-1]
    if cos.shape != sin.shape or cos.ndim != 3 or R % 2 or q.shape[-1] < R:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [1 or {q.shape[0]}, {q.shape[2]}, R], "
            f"R even and at most the heads' width, {q.shape[-1]}."
        )
    if not use_triton(q):
        return rotary_reference(q, k, cos, sin, interleaved)
    if interleaved:
        cos, sin = cos[..., : R // 2], sin[..., : R // 2]

    def turned(x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if interleaved else torch.promote_types(x.dtype, cos.dtype)
        return _RoPE.apply(x.transpose(1, 2), cos, sin, R, interleaved, dtype).transpose(1, 2)

    return turned(q), turned(k)


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification: the functions of Transformers' Mixtral and, interleaved, ERNIE 4.5, on the turned part."""
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe  # which nothing but this needs
    from transformers.models.mixtral import modeling_mixtral

    family, R = modeling_ernie4_5_moe if interleaved else modeling_mixtral, cos.shape[-1]
    turned = family.apply_rotary_pos_emb(q[..., :R], k[..., :R], cos, sin)
    if q.shape[-1] == R:
        return turned
    return torch.cat([turned[0], q[..., R:]], dim=-1), torch.cat([turned[1], k[..., R:]], dim=-1)


@launched
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_heads, S, stride_b, stride_s, stride_n, rot_stride_b, rot_stride_s,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SECOND: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program per tile of heads, counted through all tokens; cos and sin of b begin at SECOND."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // N
    batch = (token // S).to(tl.int64)
    position = (token % S).to(tl.int64)
    inside = row < num_heads
    x_ptr += batch * stride_b + position * stride_s + (row % N).to(tl.int64) * stride_n
    y_ptr += row.to(tl.int64) * D
    pair = tl.arange(0, BLOCK)[None, :]
    turn = batch * rot_stride_b + position * rot_stride_s + pair
    mask = inside & (pair < R // 2)
    if INTERLEAVED:
        at_a, at_b = 2 * pair, 2 * pair + 1
    else:
        at_a, at_b = pair, pair + R // 2
    a = tl.load(x_ptr + at_a, mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at_b, mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + turn, mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + turn, mask, other=0.0).to(tl.float32)
    cos_b, sin_b = cos_a, sin_a
    if SECOND > 0:
        cos_b = tl.load(cos_ptr + turn + SECOND, mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + turn + SECOND, mask, other=0.0).to(tl.float32)
    if BACK:
        sin_a, sin_b = -sin_b, -sin_a
    tl.store(y_ptr + at_a, a * cos_a - b * sin_a, mask)
    tl.store(y_ptr + at_b, b * cos_b + a * sin_b, mask)
    if R < D:
        at = R + tl.arange(0, BLOCK_REST)[None, :]
        rest = inside & (at < D)
        tl.store(y_ptr + at, tl.load(x_ptr + at, rest, other=0.0).to(tl.float32), rest)


def rotation_strides(cos: torch.Tensor) -> tuple[int, int]:
    """Those of batch and position of cos [B or 1, S, R], of which one row may serve all."""
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


class _RoPE(torch.autograd.Function):
    """x [B, S, N, D] → the same, contiguous. cos, sin: [B or 1, S, R], or half as wide for both halves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, R: int, interleaved: bool, dtype: Any):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.R, ctx.interleaved, ctx.dtype = R, interleaved, x.dtype
        return _turned(x, cos, sin, R, interleaved, dtype, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = _turned(dy, cos, sin, ctx.R, ctx.interleaved, ctx.dtype, back=True)
        return dx, None, None, None, None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, R: int, interleaved: bool, dtype: torch.dtype, back: bool
) -> torch.Tensor:
    B, S, N, D = x.shape
    assert B * S * N < 2**31, "heads are counted in 32 bits"
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    tuning = TUNING["backward" if back else "forward"]
    if y.numel():
        _turn[(triton.cdiv(B * S * N, tuning["ROWS"]),)](
            x, cos, sin, y, B * S * N, S, *x.stride()[:3], *rotation_strides(cos),
            N=N, D=D, R=R, SECOND=cos.shape[-1] - R // 2, INTERLEAVED=interleaved, BACK=back,
            BLOCK=triton.next_power_of_2(R // 2), BLOCK_REST=triton.next_power_of_2(max(1, D - R)), **tuning,
        )  # fmt: skip
    return y
