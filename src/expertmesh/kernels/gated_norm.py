"""Gated RMSNorm by groups, what stands behind Mamba2's scan; gate and norm are one kernel forward and one backward.

    v = x * silu(gate)          y = v / sqrt(mean over the group of v^2 + eps) * weight

All in float32, rounded once. Backward makes v and the root again from x and gate, and sums the weight's gradient by a
fixed number of programs into rows of their own, as `rms_norm` does.

Letters: T tokens, W width, G groups of W / G.
"""

import torch
import torch.nn.functional as F

from expertmesh.backends import tl, triton
from expertmesh.kernels.launch import launched, processors
from expertmesh.kernels.rms_norm import add_pairs, last_contiguous, row_tile, sum_partials

#: elements per program, elements per thread, and persistent programs per multiprocessor
TUNING = {
    "forward": {"elements": 2048, "per_thread": 16},
    "backward": {"elements": 1024, "per_thread": 8, "programs": 4},
}


def gated_norm_reference(
    x: torch.Tensor, gate: torch.Tensor, weight_W: torch.Tensor, eps: float, groups: int
) -> torch.Tensor:
    """The specification: `NemotronHRMSNormGated.forward`; x and gate [..., W] → [..., W] in x's dtype."""
    v = (x.float() * F.silu(gate.float())).unflatten(-1, (groups, -1))
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_W.float() * v.flatten(-2)).to(x.dtype)


@triton.jit
def _load(x_ptr, gate_ptr, rows, T, stride_x, stride_gate, cols, mask):
    mask = (rows < T) & mask
    x = tl.load(x_ptr + rows * stride_x + cols, mask, other=0.0)
    return x, tl.load(gate_ptr + rows * stride_gate + cols, mask, other=0.0)


@launched
def _forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, T, W, width, stride_x, stride_gate, eps,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    in_group = tl.arange(0, BLOCK_H)[None, :] < width
    cols = tl.program_id(1) * width + tl.arange(0, BLOCK_H)[None, :]
    x, gate = _load(x_ptr, gate_ptr, rows, T, stride_x, stride_gate, cols, in_group)
    gate = gate.to(tl.float32)
    v = x.to(tl.float32) * gate * tl.sigmoid(gate)
    v *= tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / width + eps)
    weight = tl.load(weight_ptr + cols, in_group, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * W + cols, v * weight, (rows < T) & in_group)


@launched
def _backward(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, T, W, width,
    stride_x, stride_gate, stride_dy, stride_dgate, eps, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Persistent: program (p, group) takes row blocks p, p + P, ... of its group, the next rows on their way; it sums
    weight gradients into its columns of row p of dweight [P, W].
    """
    in_group = tl.arange(0, BLOCK_H)[None, :] < width
    cols = tl.program_id(1) * width + tl.arange(0, BLOCK_H)[None, :]
    weight = tl.load(weight_ptr + cols, in_group, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    next_x, next_gate = _load(x_ptr, gate_ptr, rows, T, stride_x, stride_gate, cols, in_group)
    next_dy = tl.load(dy_ptr + rows * stride_dy + cols, (rows < T) & in_group, other=0.0)
    step = tl.num_programs(0) * BLOCK_T
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    while first_row < T:
        rows = first_row + tl.arange(0, BLOCK_T)[:, None]
        x, gate, dy = next_x.to(tl.float32), next_gate.to(tl.float32), next_dy.to(tl.float32)
        next_x, next_gate = _load(x_ptr, gate_ptr, rows + step, T, stride_x, stride_gate, cols, in_group)
        next_dy = tl.load(dy_ptr + (rows + step) * stride_dy + cols, (rows + step < T) & in_group, other=0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        v = x * silu
        dv = dy * weight
        square, product = tl.reduce((v * v, dv * v), 1, add_pairs, keep_dims=True)
        rstd = tl.rsqrt(square / width + eps)
        v_hat = v * rstd
        dv = rstd * (dv - v_hat * (product * rstd / width))
        mask = (rows < T) & in_group
        tl.store(dx_ptr + rows * W + cols, dv * silu, mask)
        tl.store(dgate_ptr + rows * stride_dgate + cols, dv * x * (sigmoid + silu * (1.0 - sigmoid)), mask)
        dweight += dy * v_hat
        first_row += step
    tl.store(dweight_ptr + tl.program_id(0) * W + cols, tl.sum(dweight, axis=0, keep_dims=True), in_group)


def gated_norm_forward(
    x: torch.Tensor, gate: torch.Tensor, weight_W: torch.Tensor, eps: float, groups: int
) -> torch.Tensor:
    """y as in the reference, contiguous. x, gate: [..., W], slices of something wider or not."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_TW, gate_TW = last_contiguous(x), last_contiguous(gate)
    (T, W), width = x_TW.shape, x.shape[-1] // groups
    tile = row_tile(width, TUNING["forward"])
    if y.numel():
        _forward[(triton.cdiv(T, tile["BLOCK_T"]), groups)](
            x_TW, gate_TW, weight_W.contiguous(), y, T, W, width, x_TW.stride(0), gate_TW.stride(0), eps, **tile
        )
    return y


def gated_norm_backward(
    x: torch.Tensor, gate: torch.Tensor, weight_W: torch.Tensor, eps: float, groups: int, dy: torch.Tensor,
    dgate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Writes dgate (which may be a slice of a wider gradient) and returns (dx, dweight)."""
    dx, dweight = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(weight_W)
    x_TW, gate_TW, dy_TW, dgate_TW = (last_contiguous(t) for t in (x, gate, dy, dgate))
    assert dgate_TW.data_ptr() == dgate.data_ptr(), "a copy would be written"
    (T, W), width = x_TW.shape, x.shape[-1] // groups
    if not T:
        return dx, dweight
    tile = row_tile(width, TUNING["backward"])
    programs = max(1, processors(x.device) * TUNING["backward"]["programs"] // groups)
    programs = min(programs, triton.cdiv(T, tile["BLOCK_T"]))
    partial = torch.empty(programs, W, dtype=torch.float32, device=x.device)
    strides = (t.stride(0) for t in (x_TW, gate_TW, dy_TW, dgate_TW))
    _backward[(programs, groups)](
        x_TW, gate_TW, weight_W.contiguous(), dy_TW, dx, dgate_TW, partial, T, W, width, *strides, eps, **tile
    )
    sum_partials(partial, programs, dweight)
    return dx, dweight
