"""A router's logits in float32 from bfloat16 hidden states and weights, on tensor cores.

    logits [T, E] = float(x) float(w)^T

Products of two bfloat16 numbers are exact in float32, so a bfloat16 GEMM that sums and writes in float32 computes what
the float32 GEMM of Transformers does, at a fraction of its time, and x is not kept a second time in float32. In
backward the float32 gradient goes in as the sum of two bfloat16 numbers, side by side in one GEMM: 16 bits of it, of
which the result, bfloat16, keeps 8.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Float32 [T, E]; must equal `F.linear(x.float(), weight.float())`, which is what runs wherever the GEMM is not
    one of plain bfloat16 tensors on a GPU.
    """
    plain = type(weight_EH) in (torch.Tensor, torch.nn.Parameter) and x_TH.dtype == weight_EH.dtype == torch.bfloat16
    if plain and x_TH.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.compiler.is_compiling():
        return RouterLogits.apply(x_TH, weight_EH)
    return F.linear(x_TH.float(), weight_EH.float())


def _mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class RouterLogits(torch.autograd.Function):
    """x [T, H], weight [E, H], both bfloat16 → float32 [T, E]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _mm_float32(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        high = dlogits.to(torch.bfloat16)
        halves = torch.cat([high, (dlogits - high).to(torch.bfloat16)], dim=1)
        need_x, need_weight = ctx.needs_input_grad
        dx = halves @ torch.cat([weight, weight]) if need_x else None
        dweight = None
        if need_weight:
            dweight = _mm_float32(halves.t(), x).view(2, *weight.shape).sum(0).to(weight.dtype)
        return dx, dweight
