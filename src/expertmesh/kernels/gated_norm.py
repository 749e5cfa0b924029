"""Gated RMSNorm by groups, what stands behind Mamba2's scan: gate and norm by the kernels of rms_norm.py.

    v = x * silu(gate)          y = v / sqrt(mean over the group of v^2 + eps) * weight

All in float32, rounded once. Backward makes v and the root again from x and gate, and sums the weight's gradient by a
fixed number of programs into rows of their own, as `rms_norm` does.

Letters: T tokens, W width, G groups of W / G.
"""

import torch
import torch.nn.functional as F

from expertmesh.backends import triton
from expertmesh.kernels.launch import processors
from expertmesh.kernels.rms_norm import last_contiguous, norm_backward, norm_forward, row_tile, sum_partials

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


def gated_norm_forward(
    x: torch.Tensor, gate: torch.Tensor, weight_W: torch.Tensor, eps: float, groups: int
) -> torch.Tensor:
    """y as in the reference, contiguous. x, gate: [..., W], slices of something wider or not."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_TW, gate_TW = last_contiguous(x), last_contiguous(gate)
    T, width = len(x_TW), x.shape[-1] // groups
    tile = row_tile(width, TUNING["forward"])
    if y.numel():
        norm_forward[(triton.cdiv(T, tile["BLOCK_T"]), groups)](
            x_TW, gate_TW, weight_W.contiguous(), y, y, T, width, x_TW.stride(0), gate_TW.stride(0), eps,
            HAS_RESIDUAL=False, HAS_GATE=True, GROUPS=groups, SCALE="float32", **tile,
        )  # fmt: skip
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
    norm_backward[(programs, groups)](
        x_TW, gate_TW, weight_W.contiguous(), dy_TW, dx, dgate_TW, partial, T, width, *strides, eps,
        HAS_DSUM=False, HAS_GATE=True, GROUPS=groups, WEIGHT_GRAD=True, SCALE="float32", **tile,
    )  # fmt: skip
    sum_partials(partial, programs, dweight)
    return dx, dweight
