"""A router's logits in float32 from bfloat16 hidden states, on tensor cores. Weights are bfloat16 or float32.

    logits [T, E] = float(x) float(w)^T

Products of two bfloat16 numbers are exact in float32, so a bfloat16 GEMM that sums and writes in float32 computes what
the float32 GEMM of Transformers does, at a fraction of its time, and x is not kept a second time in float32. A float32
number is the sum of three bfloat16 numbers, so such a weight goes in as three, side by side in one GEMM.

In backward the float32 gradient goes in as a sum, too: of three for a float32 gradient of the weight; else of two, 16
bits, of which the result, bfloat16, keeps 8.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from expertmesh.backends import on_gpu, tell_once


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Float32 [T, E]; must equal `F.linear(x.float(), weight.float())`, which is what runs wherever the GEMM is not
    one of plain tensors on a GPU, x bfloat16 and the weight bfloat16 or float32.
    """
    plain = type(weight_EH) in (torch.Tensor, torch.nn.Parameter) and x_TH.dtype == torch.bfloat16
    plain = plain and weight_EH.dtype in (torch.bfloat16, torch.float32)
    if plain and on_gpu(x_TH) and not torch.is_autocast_enabled("cuda") and not torch.compiler.is_compiling():
        return RouterLogits.apply(x_TH, weight_EH)
    if x_TH.is_cuda and x_TH.dtype == torch.bfloat16:
        tell_once("a router's logits are a product in float32: under autocast, or its weight is no plain tensor.")
    return F.linear(x_TH.float(), weight_EH.float())


def _mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if on_gpu(a) else a.float() @ b.float()


def _parts(x: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Bfloat16 tensors whose sum is x to 8 bits each; one if x is bfloat16."""
    parts = [x.to(torch.bfloat16)]
    while x.dtype == torch.float32 and len(parts) < most:
        x = x - parts[-1]
        parts.append(x.to(torch.bfloat16))
    return parts


class RouterLogits(torch.autograd.Function):
    """x [T, H] in bfloat16, weight [E, H] in bfloat16 or float32 → float32 [T, E]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        parts = _parts(weight, 3)
        logits = _mm_float32(x, torch.cat(parts).t())
        return logits if len(parts) == 1 else logits.view(len(x), len(parts), -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        parts = _parts(dlogits, 3 if weight.dtype == torch.float32 and need_weight else 2)
        dx = dweight = None
        if need_x:  # the product of the two lesser parts is lost in rounding
            high, *low = _parts(weight, 2)
            dx = torch.cat([*parts[:2], *(parts[0] for _ in low)], dim=1) @ torch.cat([high, high, *low])
        if need_weight:
            dweight = _mm_float32(torch.cat(parts, dim=1).t(), x).view(len(parts), *weight.shape).sum(0)
            dweight = dweight.to(weight.dtype)
        return dx, dweight
