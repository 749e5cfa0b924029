"""Several linear maps of one input: the gradients that they send back to it are added inside their GEMMs.

Autograd adds the input gradients of q-, k- and v-projection, or of gate and up, in passes of their own over [T, H].
Here each product after the first accumulates onto what is there.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from expertmesh.layers.fast import untouched


def project(x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
    """linear(x) for each; x: [..., H]. If one is more than a bare weight (a bias, an adapter, a quantised or sharded
    weight, hooks), or under autocast, the modules are called."""
    if torch.is_autocast_enabled(x.device.type) or not all(_is_bare(linear, x) for linear in linears):
        return tuple(linear(x) for linear in linears)
    return _Project.apply(x, *(linear.weight for linear in linears))


def _is_bare(linear: nn.Module, x: torch.Tensor) -> bool:
    if type(linear) is not nn.Linear or linear.bias is not None or not untouched(linear):
        return False
    return type(linear.weight.data) is torch.Tensor and linear.weight.dtype == x.dtype


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_TH = x.reshape(-1, x.shape[-1])
        dx_TH: torch.Tensor | None = None
        dweights: list[torch.Tensor | None] = [None] * len(weights)
        for i, (weight, dy) in enumerate(zip(weights, dys, strict=True)):
            if dy is None:
                continue
            dy_TN = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[0]:
                dx_TH = dy_TN @ weight if dx_TH is None else dx_TH.addmm_(dy_TN, weight)
            if ctx.needs_input_grad[1 + i]:
                dweights[i] = dy_TN.t() @ x_TH
        return None if dx_TH is None else dx_TH.view(x.shape), *dweights
