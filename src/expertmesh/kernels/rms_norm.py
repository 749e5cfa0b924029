"""RMSNorm, alone, after a residual add, or grouped and after a gate (Mamba2): one forward and one backward kernel.

    s = x                                   or x + residual, rounded to the tensors' dtype, as stock does
                                            or x * silu(gate), in float32
    x_hat = s / sqrt(mean(s^2) + eps)       y = x_hat * weight

Each kernel reads its inputs once and writes its outputs once. Only the normed tensor is saved (with a gate: x and the
gate); 1/rms is recomputed. A fixed number of programs write partial sums of the weight's gradient to separate rows, so
it is deterministic.

Letters: T rows, H width that is normed, G groups per row, W = G·H width of a row.
"""

from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit, num_sms
from expertmesh.kernels.recompute import mark_recomputable

Scale = Literal["rounded", "float32", "one_plus"]
"""How the weight is applied; x_hat is always computed in float32.

rounded: `weight * x_hat.to(x.dtype)` (Llama, Qwen3, Mixtral, DeepSeek, OLMoE);
float32: `(weight.float() * x_hat).to(x.dtype)` (Nemotron-H, GPT-OSS);
one_plus: `((1 + weight.float()) * x_hat).to(x.dtype)` (Gemma, Qwen3-Next, Qwen3.5).
"""
SCALES = get_args(Scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: Scale = "rounded") -> torch.Tensor:
    """Return the RMSNorm of x over the last dimension, differentiable in `x` and `weight`.

    x: [..., H] in any float dtype; weight: [H]. Returns [..., H] in x's dtype (with "rounded": in the dtype that x and
    weight promote to, as in Transformers). Must equal the RMSNorm class of the models that use this scale.
    """
    return add_rms_norm(x, None, weight, eps, scale=scale, both=False)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, scale: Scale = "rounded",
    both: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return `(rms_norm(s), s)` of s = x + residual, or of s = x without a residual, in one kernel.

    x, residual: [..., H]; weight: [H]. The sum is rounded to the dtype that x and residual promote to and then normed.
    both: s may receive a gradient, as it does if it is the next residual. False is only for calls without a residual.
    """
    assert residual is None or x.shape == residual.shape
    assert weight.shape == x.shape[-1:], "weight must have the width of x"
    assert scale in SCALES, f"scale {scale!r} is not one of {SCALES}"
    if use_triton(x):
        y = _RMSNorm.apply(x, residual, weight, eps, scale, both)
        y, total = y if both else (y, x)
    else:
        total = x if residual is None else residual + x
        y = rms_norm_reference(total, weight, eps, scale=scale)
    mark_recomputable((y,), lambda total, weight: (rms_norm(total, weight, eps, scale=scale),), total, weight)
    return y, total


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: Scale = "rounded") -> torch.Tensor:
    """Reference of `rms_norm`: the operations of Transformers."""
    x_hat = x.float()
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    if scale == "rounded":
        return weight * x_hat.to(x.dtype)
    if scale == "float32":
        return (weight.float() * x_hat).to(x.dtype)
    return (x_hat * (1.0 + weight.float())).to(x.dtype)


def sum_partials(partial_PW: torch.Tensor, split: int, *outputs: torch.Tensor) -> None:
    """Sum the float32 rows [0, split) into outputs[0] [W] and, if given, the other rows into outputs[1], in one launch.

    One program sums a column in a fixed order and rounds once, to the output's dtype.
    """
    P, W = partial_PW.shape
    _sum_partials[(triton.cdiv(W, 16), len(outputs))](
        partial_PW, outputs[0], outputs[-1], P, split, W, BLOCK_P=64, BLOCK_W=16
    )


@fast_jit
def _sum_partials(partial_ptr, first_ptr, second_ptr, P, split, W, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    second = tl.program_id(1) == 1
    row = tl.where(second, split, 0)
    end = tl.where(second, P, split)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    while row < end:
        rows = row + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(partial_ptr + rows * W + cols[None, :], (rows < end) & (cols < W)[None, :], other=0.0)
        row += BLOCK_P
    sums = tl.sum(total, axis=0)
    if second:
        tl.store(second_ptr + cols, sums, cols < W)
    else:
        tl.store(first_ptr + cols, sums, cols < W)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return x if the stride of its last dimension is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., H] as [T, H] whose last dimension has stride 1: a view if possible, else a copy."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


#: elements per tile (of whole rows), elements per thread, and persistent programs per multiprocessor
TUNING = {
    "forward": {"elements": 2048, "per_thread": 16},
    "backward": {"elements": 2048, "per_thread": 16, "programs": 4},
}
GATED_TUNING = TUNING | {"backward": {"elements": 1024, "per_thread": 8, "programs": 4}}


def row_tile(H: int, tuning: dict[str, int]) -> dict[str, int]:
    """Return the launch options of a tile of whole rows of width H."""
    block_h = triton.next_power_of_2(H)
    block_t = max(1, tuning["elements"] // block_h)
    warps = min(32, max(1, block_t * block_h // (32 * tuning["per_thread"])))
    return {"BLOCK_T": block_t, "BLOCK_H": block_h, "num_warps": warps}


@fast_jit
def norm_forward(
    x_ptr, other_ptr, weight_ptr, y_ptr, sum_ptr, T, H, stride_x, stride_other, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, GROUPS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write y (and the sum) of rows of GROUPS groups of H columns, each normed by itself. other: residual or gate."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    cols = tl.arange(0, BLOCK_H)[None, :]
    in_group = cols < H
    if GROUPS > 1:
        cols += tl.program_id(1) * H
    mask = (rows < T) & in_group
    s = tl.load(x_ptr + rows * stride_x + cols, mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(other_ptr + rows * stride_other + cols, mask, other=0.0)
        s = (s.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * H + cols, s, mask)
    weight = tl.load(weight_ptr + cols, in_group, other=0.0).to(tl.float32)
    in_dtype = s.dtype
    s = s.to(tl.float32)
    if HAS_GATE:
        gate = tl.load(other_ptr + rows * stride_other + cols, mask, other=0.0).to(tl.float32)
        s *= gate * tl.sigmoid(gate)
    x_hat = s * tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / H + eps)
    if SCALE == "rounded":
        x_hat = x_hat.to(in_dtype).to(tl.float32)
    if SCALE == "one_plus":
        weight += 1.0
    tl.store(y_ptr + rows * (H * GROUPS) + cols, x_hat * weight, mask)


@triton.jit
def _add_pairs(a1, b1, a2, b2):
    """Combine function of a reduction of two sums at once."""
    return a1 + a2, b1 + b2


@fast_jit
def norm_backward(
    s_ptr, other_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, T, H,
    stride_s, stride_other, stride_dy, stride_dgate, eps,
    HAS_DSUM: tl.constexpr, HAS_GATE: tl.constexpr, GROUPS: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Persistent kernel: program p of P per group processes row blocks p, p + P, ... and sums their weight gradients in
    row p of dweight [P, GROUPS * H]. other: the gradient of the sum, or the gate.

    The next rows are loaded before the current ones are reduced, as the reductions would else wait for memory.
    """
    cols = tl.arange(0, BLOCK_H)[None, :]
    in_group = cols < H
    if GROUPS > 1:
        cols += tl.program_id(1) * H
    weight = tl.load(weight_ptr + cols, in_group, other=0.0).to(tl.float32)
    if SCALE == "one_plus":
        weight += 1.0
    dweight = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    step = tl.num_programs(0) * BLOCK_T
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    next_s = tl.load(s_ptr + rows * stride_s + cols, (rows < T) & in_group, other=0.0)
    if HAS_GATE:
        next_gate = tl.load(other_ptr + rows * stride_other + cols, (rows < T) & in_group, other=0.0)
    next_dy = tl.load(dy_ptr + rows * stride_dy + cols, (rows < T) & in_group, other=0.0)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    while first_row < T:  # Triton's interpreter fails at `for … in range` with NumPy >= 2.4
        rows = first_row + tl.arange(0, BLOCK_T)[:, None]
        mask = (rows < T) & in_group
        in_dtype = next_s.dtype
        s = next_s.to(tl.float32)
        dy = next_dy.to(tl.float32)
        next_mask = (rows + step < T) & in_group
        next_s = tl.load(s_ptr + (rows + step) * stride_s + cols, next_mask, other=0.0)
        if HAS_GATE:
            x, gate = s, next_gate.to(tl.float32)
            next_gate = tl.load(other_ptr + (rows + step) * stride_other + cols, next_mask, other=0.0)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            s = x * silu
        next_dy = tl.load(dy_ptr + (rows + step) * stride_dy + cols, next_mask, other=0.0)
        if HAS_DSUM:
            dsum = tl.load(other_ptr + rows * stride_other + cols, mask, other=0.0)
        dx_hat = dy * weight
        square, product = tl.reduce((s * s, dx_hat * s), 1, _add_pairs, keep_dims=True)
        rstd = tl.rsqrt(square / H + eps)
        x_hat = s * rstd
        dx = rstd * (dx_hat - x_hat * (product * rstd / H))
        if HAS_DSUM:
            dx += dsum.to(tl.float32)
        if HAS_GATE:
            tl.store(dgate_ptr + rows * stride_dgate + cols, dx * x * (sigmoid + silu * (1.0 - sigmoid)), mask)
            dx *= silu
        tl.store(dx_ptr + rows * (H * GROUPS) + cols, dx, mask)
        if WEIGHT_GRAD:
            if SCALE == "rounded":
                x_hat = x_hat.to(in_dtype).to(tl.float32)
            dweight += dy * x_hat
        first_row += step
    if WEIGHT_GRAD:
        row = dweight_ptr + tl.program_id(0) * (H * GROUPS)
        tl.store(row + cols, tl.sum(dweight, axis=0, keep_dims=True), in_group)


class _RMSNorm(torch.autograd.Function):
    """(x, residual or None, weight) → (y, sum), or y alone without `both`: an output that is None breaks Dynamo before
    PyTorch 2.12. Without a residual the sum is x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, scale: Scale,
        both: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        y, total = launch_forward(x, residual, weight, eps, scale)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.scale = eps, scale
        ctx.set_materialize_grads(False)
        return (y, total) if both else y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        (s, weight), (_, need_residual, need_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
        dx, dweight = dsum, None
        if dy is not None:
            dx, dweight = launch_backward(s, dsum, weight, dy, None, ctx.eps, ctx.scale, weight_grad=need_weight)
        return dx, dx if need_residual else None, dweight, None, None, None  # autograd casts to the inputs' dtypes


def launch_forward(
    x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, eps: float, scale: Scale, groups: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, sum), contiguous. Without a residual the sum is x. other: the residual or, with groups, the gate."""
    gated, groups, total, dtype = groups > 0, max(1, groups), x, x.dtype
    if other is not None and not gated:
        dtype = torch.promote_types(dtype, other.dtype)
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    if scale == "rounded":
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x_TW = as_rows(x)
    other_TW = x_TW if other is None else as_rows(other)
    T, H = len(x_TW), x.shape[-1] // groups
    tile = row_tile(H, (GATED_TUNING if gated else TUNING)["forward"])
    norm_forward[(triton.cdiv(T, tile["BLOCK_T"]), groups)](
        x_TW, other_TW, weight.contiguous(), y, y if total is x else total, T, H, x_TW.stride(0), other_TW.stride(0),
        eps, HAS_RESIDUAL=total is not x, HAS_GATE=gated, GROUPS=groups, SCALE=scale, **tile,
    )  # fmt: skip
    return y, total


def launch_backward(
    s: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, dy: torch.Tensor, dgate: torch.Tensor | None,
    eps: float, scale: Scale, groups: int = 1, weight_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return (dx, dweight). other: the gradient of the sum or, if `dgate` is given, the gate. The gate's gradient is
    written to dgate, which may be a slice of a wider tensor."""
    s_TW, dy_TW = as_rows(s), as_rows(dy)
    other_TW = dy_TW if other is None else as_rows(other)
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    gated, dgate_TW = dgate is not None, dx if dgate is None else as_rows(dgate)
    assert dgate is None or dgate_TW.data_ptr() == dgate.data_ptr(), "dgate has no view as [T, W]"
    (T, W), H = s_TW.shape, s.shape[-1] // groups
    tuning = (GATED_TUNING if gated else TUNING)["backward"]
    tile = row_tile(H, tuning)
    programs = max(1, num_sms(s.device) * tuning["programs"] // groups)
    programs = max(1, min(programs, triton.cdiv(T, tile["BLOCK_T"])))
    partial = torch.empty(programs if weight_grad else 0, W, dtype=torch.float32, device=s.device)
    norm_backward[(programs, groups)](
        s_TW, other_TW, weight.contiguous(), dy_TW, dx, dgate_TW, partial, T, H,
        s_TW.stride(0), other_TW.stride(0), dy_TW.stride(0), dgate_TW.stride(0) if gated else W, eps,
        HAS_DSUM=other is not None and not gated, HAS_GATE=gated, GROUPS=groups, WEIGHT_GRAD=weight_grad, SCALE=scale,
        **tile,
    )  # fmt: skip
    if not weight_grad:
        return dx, None
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    sum_partials(partial, programs, dweight)
    return dx, dweight
