"""Rotary position embedding of queries and keys, for attention whose q/k-norms, if any, stand elsewhere.

    [a', b'] = [a cos_a - b sin_a, b cos_b + a sin_b]

a and b are the halves of the turned width R or, interleaved, its even and odd elements; the rest of a head passes
unturned. Stock Transformers needs about ten passes over q and k; here each is read and written once, computed in
float32 and rounded once. Only cos and sin are kept: backward turns the gradients back.

Letters: B batch, N heads, S sequence, D head width, R turned width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton

#: heads per tile, and warps
TUNING = {"forward": {"ROWS": 16, "num_warps": 4}, "backward": {"ROWS": 16, "num_warps": 4}}


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned queries [B, Nq, S, D] and keys [B, Nk, S, D], differentiable in both; q and k may have any strides.

    cos, sin: [B or 1, S, R], R even and at most D; no gradient. Must equal `apply_rotary_pos_emb` of Transformers'
    Mixtral and GLM-4 (results in the dtype that x and cos promote to) and, interleaved, of ERNIE 4.5 (in x's dtype; of
    cos and sin the first half counts). The kernel's results are transposed views of [B, S, N, D] memory.
    """
    if cos.shape != sin.shape or cos.ndim != 3 or cos.shape[-1] % 2 or cos.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [1 or {q.shape[0]}, {q.shape[2]}, R], "
            f"R even and at most the heads' width, {q.shape[-1]}."
        )
    if use_triton(q):
        return _RoPE.apply(q, cos, sin, interleaved), _RoPE.apply(k, cos, sin, interleaved)
    return rope_reference(q, k, cos, sin, interleaved)


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in Transformers' operations."""
    R = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        cos, sin = (x[..., : R // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        turn, rest = x[..., :R], x[..., R:]
        if interleaved:
            half = torch.stack((-turn[..., 1::2], turn[..., ::2]), dim=-1).flatten(-2)
            turn = (turn.float() * cos + half.float() * sin).to(x.dtype)
        else:
            half = torch.cat((-turn[..., R // 2 :], turn[..., : R // 2]), dim=-1)
            turn = turn * cos + half * sin
        return torch.cat((turn, rest), dim=-1) if rest.shape[-1] else turn

    return turned(q), turned(k)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_heads, S, stride_b, stride_n, stride_s, rot_stride_b, rot_stride_s,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One program per tile of heads, counted through all tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // N
    batch = (token // S).to(tl.int64)
    position = (token % S).to(tl.int64)
    inside = row < num_heads
    x_ptr += batch * stride_b + (row % N).to(tl.int64) * stride_n + position * stride_s
    y_ptr += row.to(tl.int64) * D
    turn = batch * rot_stride_b + position * rot_stride_s

    pair = tl.arange(0, BLOCK)[None, :]
    mask = inside & (pair < R // 2)
    if INTERLEAVED:
        at_a, at_b, rot_b = 2 * pair, 2 * pair + 1, pair
    else:
        at_a, at_b, rot_b = pair, pair + R // 2, pair + R // 2
    a = tl.load(x_ptr + at_a, mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at_b, mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + turn + pair, mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + turn + rot_b, mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + turn + pair, mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + turn + rot_b, mask, other=0.0).to(tl.float32)
    if BACK:
        sin_a, sin_b = -sin_b, -sin_a
    tl.store(y_ptr + at_a, a * cos_a - b * sin_a, mask)
    tl.store(y_ptr + at_b, b * cos_b + a * sin_b, mask)
    if R < D:
        at = R + tl.arange(0, BLOCK_REST)[None, :]
        rest = inside & (at < D)
        tl.store(y_ptr + at, tl.load(x_ptr + at, rest, other=0.0).to(tl.float32), rest)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, interleaved: bool, back: bool
) -> torch.Tensor:
    (B, N, S, D), R = x.shape, cos.shape[-1]
    assert B * S * N < 2**31, "heads are counted in 32 bits"
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(B, S, N, D, dtype=dtype, device=x.device)
    tuning = TUNING["backward" if back else "forward"]
    if y.numel():
        _turn[(triton.cdiv(B * S * N, tuning["ROWS"]),)](
            x, cos, sin, y, B * S * N, S, *x.stride()[:3], cos.stride(0) if cos.shape[0] == B else 0, cos.stride(1),
            N=N, D=D, R=R, INTERLEAVED=interleaved, BACK=back, BLOCK=triton.next_power_of_2(R // 2),
            BLOCK_REST=triton.next_power_of_2(max(1, D - R)), **tuning,
        )  # fmt: skip
    return y.transpose(1, 2)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.dtype = interleaved, x.dtype
        dtype = x.dtype if interleaved else torch.promote_types(x.dtype, cos.dtype)
        return _turned(x, cos, sin, dtype, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, ctx.dtype, ctx.interleaved, back=True), None, None, None
