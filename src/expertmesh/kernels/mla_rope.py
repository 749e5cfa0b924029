"""RoPE of queries and keys, and concatenation of keys, of multi-head latent attention (MLA) in one pass.

    query = [q_nope; rope(q_rope)]                              for each head
    key   = [k_nope; rope(k_rope)]        value = v             k_rope is shared by all heads

q [.., N, P+R] and kv = [k_nope; v] [.., N, P+V] are outputs of the projections. k_rope [.., R] is the positional
part of the latent. Queries and keys are read and written once; values are not copied. As rotation is linear, backward
needs only cos and sin. It sums k_rope's gradient over the heads in registers, in a fixed order. Kernels compute in
float32 and round once.

Letters: B batch, S sequence, N heads, P width without RoPE, R = 2·HALF width with RoPE, V value width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.recompute import mark_recomputable
from expertmesh.kernels.rms_norm import unit_stride
from expertmesh.kernels.rope import rotation_strides


def mla_rope(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (query [B, N, S, P+R], key [B, N, S, P+R], value [B, N, S, V]). Differentiable in q, kv and k_rope.

    q: [B, S, N, P+R] and kv: [B, S, N, P+V], any strides; k_rope: [B, S, R]; cos, sin: [B or 1, S, R] (no gradient).
    query and key are transposed views of new [B, S, N, P+R] tensors, value is a view of kv. Must equal what
    DeepseekV3Attention passes to its attention function with `rope_interleave`: pairs (0, 1), (2, 3), … are rotated by
    the first half of cos and sin, and the output has the first elements of all pairs before the second ones.
    """
    B, S, N, D = q.shape
    R = k_rope.shape[-1]
    assert kv.shape[:3] == (B, S, N) and kv.shape[-1] > D - R and k_rope.shape == (B, S, R) and R % 2 == 0
    assert cos.shape == sin.shape and cos.shape in ((B, S, R), (1, S, R))
    if use_triton(q):
        query, key, value = (x.transpose(1, 2) for x in _MLARope.apply(q, kv, k_rope, cos, sin))
    else:
        query, key, value = mla_rope_reference(q, kv, k_rope, cos, sin)

    def recompute_key(kv: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor]:
        return (mla_rope(kv.new_zeros(B, S, N, D), kv, *rest)[1],)

    mark_recomputable((key,), recompute_key, kv, k_rope, cos, sin)  # not query: autograd does not save q
    return query, key, value


def mla_rope_reference(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `mla_rope`: the operations of DeepseekV3Attention."""
    nope = q.shape[-1] - k_rope.shape[-1]
    key_nope, value = kv.transpose(1, 2).split([nope, kv.shape[-1] - nope], dim=-1)
    key_rope = rotated(k_rope[:, None], cos, sin).to(kv.dtype)
    key = torch.cat([key_nope, key_rope.expand(-1, q.shape[2], -1, -1)], dim=-1)
    return rotated(q.transpose(1, 2), cos, sin), key, value


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [B, N, S, D] with the last R elements of each row rotated by cos and sin [B or 1, S, R]."""
    R = cos.shape[-1]
    cos, sin = cos[:, None, :, : R // 2], sin[:, None, :, : R // 2]
    nope, rope = x.split([x.shape[-1] - R, R], dim=-1)
    first, second = rope[..., 0::2], rope[..., 1::2]
    return torch.cat([nope, first * cos - second * sin, second * cos + first * sin], dim=-1)


#: heads of a token per tile. A program of the forward processes one tile, of the backward all tiles of a token.
HEADS = 16


@triton.jit
def _load(ptr, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of WIDTH elements from ptr [ROWS, 1]."""
    cols = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + cols, mask & (cols < WIDTH), other=0.0)


@triton.jit
def _store(ptr, x, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(ptr + cols, x, mask & (cols < WIDTH))


@triton.jit
def _rotate(source, target, cos, sin, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the pairs of the rows at source [ROWS, 1] and store them as two halves at target."""
    x = _load(source, mask, 2 * HALF, 2 * BLOCK).to(tl.float32)
    first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    _store(target, first * cos - second * sin, mask, HALF, BLOCK)
    _store(target + HALF, second * cos + first * sin, mask, HALF, BLOCK)


@triton.jit
def _rotate_back(target, first, second, cos, sin, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Store the gradients of the pairs, given those of the rotated halves: the inverse rotation."""
    pairs = tl.interleave(first * cos + second * sin, second * cos - first * sin)
    _store(target, pairs, mask, 2 * HALF, 2 * BLOCK)


@triton.jit
def _load_halves(ptr, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    return _load(ptr, mask, HALF, BLOCK).to(tl.float32), _load(ptr + HALF, mask, HALF, BLOCK).to(tl.float32)


@fast_jit
def _mla_rope_kernel(
    q_ptr, kv_ptr, other_ptr, cos_ptr, sin_ptr, q_out_ptr, kv_out_ptr, dk_rope_ptr, S,
    q_stride_b, q_stride_s, q_stride_n, kv_stride_b, kv_stride_s, kv_stride_n, other_stride_b, other_stride_s,
    other_stride_n, rot_stride_b, rot_stride_s,
    N: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Forward, one program per token and tile of heads: query and key from q, kv and k_rope, passed as other.

    With BACK, one program per token: dq, dkv and dk_rope from the gradients of query, key and value, passed as q, kv
    and other. It loops over the tiles of heads and sums dk_rope over them.
    """
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    s = token - b * S
    all_rows = tl.zeros((1, 1), tl.int32) == 0
    cos = _load(cos_ptr + b * rot_stride_b + s * rot_stride_s, all_rows, HALF, BLOCK_HALF).to(tl.float32)
    sin = _load(sin_ptr + b * rot_stride_b + s * rot_stride_s, all_rows, HALF, BLOCK_HALF).to(tl.float32)
    sum1 = tl.zeros((HEADS, BLOCK_HALF), tl.float32)
    sum2 = tl.zeros((HEADS, BLOCK_HALF), tl.float32)
    for tile in tl.static_range((N + HEADS - 1) // HEADS if BACK else 1):
        first_head = tile * HEADS if BACK else tl.program_id(1) * HEADS
        head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = head < N
        q = q_ptr + b * q_stride_b + s * q_stride_s + head * q_stride_n
        q_out = q_out_ptr + (token * N + head) * (P + 2 * HALF)
        _store(q_out, _load(q, mask, P, BLOCK_P), mask, P, BLOCK_P)
        if BACK:
            first, second = _load_halves(q + P, mask, HALF, BLOCK_HALF)
            _rotate_back(q_out + P, first, second, cos, sin, mask, HALF, BLOCK_HALF)
        else:
            _rotate(q + P, q_out + P, cos, sin, mask, HALF, BLOCK_HALF)
        kv = kv_ptr + b * kv_stride_b + s * kv_stride_s + head * kv_stride_n
        other = other_ptr + b * other_stride_b + s * other_stride_s
        kv_out = kv_out_ptr + (token * N + head) * (P + (V if BACK else 2 * HALF))
        _store(kv_out, _load(kv, mask, P, BLOCK_P), mask, P, BLOCK_P)
        if BACK:
            _store(kv_out + P, _load(other + head * other_stride_n, mask, V, BLOCK_V), mask, V, BLOCK_V)
            first, second = _load_halves(kv + P, mask, HALF, BLOCK_HALF)
            sum1 += first
            sum2 += second
        else:
            _rotate(other + tl.zeros_like(head), kv_out + P, cos, sin, mask, HALF, BLOCK_HALF)
    if BACK:
        first, second = tl.sum(sum1, axis=0, keep_dims=True), tl.sum(sum2, axis=0, keep_dims=True)
        _rotate_back(dk_rope_ptr + token * (2 * HALF), first, second, cos, sin, all_rows, HALF, BLOCK_HALF)


def _launch(
    inputs: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, outs: list[Any], V: int, back: bool
) -> None:
    """inputs: q, kv and k_rope, or with `back` the gradients of query, key and value. outs: written, see its kernel."""
    (B, S, N, D), R = inputs[0].shape, cos.shape[-1]
    _mla_rope_kernel[(B * S, 1 if back else triton.cdiv(N, HEADS))](
        *inputs, cos, sin, *outs, S, *(stride for x in inputs for stride in x.stride()[:3]), *rotation_strides(cos),
        N=N, P=D - R, HALF=R // 2, V=V, BLOCK_P=triton.next_power_of_2(D - R), BLOCK_V=triton.next_power_of_2(V),
        BLOCK_HALF=triton.next_power_of_2(R // 2), HEADS=HEADS, BACK=back, num_warps=4,
    )  # fmt: skip


class _MLARope(torch.autograd.Function):
    """q, kv, k_rope, cos, sin → query and key as new [B, S, N, P+R] tensors, value as a view of kv."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        q, kv, k_rope = unit_stride(q), unit_stride(kv), unit_stride(k_rope)
        cos, sin = cos.contiguous(), sin.contiguous()
        query = torch.empty(q.shape, dtype=torch.promote_types(q.dtype, cos.dtype), device=q.device)
        key = torch.empty(q.shape, dtype=kv.dtype, device=q.device)
        value = kv[..., q.shape[-1] - cos.shape[-1] :]
        _launch([q, kv, k_rope], cos, sin, [query, key, None], value.shape[-1], back=False)
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, kv.dtype, k_rope.dtype
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (B, S, N, D), R, V = grads[0].shape, cos.shape[-1], grads[2].shape[-1]
        shapes = (B, S, N, D), (B, S, N, D - R + V), (B, S, R)
        outs = [
            torch.empty(shape, dtype=dtype, device=cos.device) for shape, dtype in zip(shapes, ctx.dtypes, strict=True)
        ]
        _launch([unit_stride(grad) for grad in grads], cos, sin, outs, V, back=True)
        return *outs, None, None
