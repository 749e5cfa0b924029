"""PEFT's LoRA adapters on linear layers: one autograd function for all layers that read the same x.

    y_n = x · W_nᵀ + s · (x · A_nᵀ) · B_nᵀ        for n in (q, k, v), in (gate, up), or for a single layer

PEFT runs one operation at a time, in float32 if the adapters are. In a fused model its `lora.Linear` modules become
`FastLoraLinear` at the next forward. One GEMM computes u_n = x · A_nᵀ for all n, the base GEMM accumulates into
u_n · B_nᵀ, and the GEMMs of the input's gradient accumulate into each other. x and u are the saved tensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from expertmesh.backends import matmul_dtype, warn_once
from expertmesh.twins import Fast, has_hooks, is_traced, is_unmodified, twin


class Factors(NamedTuple):
    """An adapter, which adds scale · dropout(x) · Aᵀ · Bᵀ to a layer's output. A is [r, in], B is [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: nn.Module | None


class FastLoraLinear(Fast):
    """Must equal `lora.Linear.forward` of PEFT. A forward in bfloat16 rounds adapters to it, as autocast does."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        factors = None if args or kwargs else self.factors(x)
        return super().forward(x, *args, **kwargs) if factors is None else _run(x, [self], [factors])[0]

    def factors(self, x: torch.Tensor) -> Factors | None:
        """Return the factors of the active adapters, concatenated; None if PEFT's own forward must run."""
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lora_A]
        if not names or is_traced():
            return None
        drops = [drop for n in names if self.training and getattr(drop := self.lora_dropout[n], "p", 0) > 0]
        if (why := self._why_not(names, drops, x)) is not None:
            warn_once(f"PEFT's own, slower code runs adapters of some linear layers: {why}.")
            return None
        pairs = [(self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n]) for n in names]
        if len(pairs) > 1:
            pairs = [(torch.cat([a for a, _, _ in pairs]), torch.cat([b * scale for _, b, scale in pairs], 1), 1.0)]
        return Factors(*pairs[0], drops[0] if drops else None)

    def _why_not(self, names: list[str], drops: list[nn.Module], x: torch.Tensor) -> str | None:
        base, sides = self.base_layer, [part[n] for part in (self.lora_A, self.lora_B) for n in names]
        if any(n in self.lora_variant for n in names) or any(side.bias is not None for side in sides):
            return "they are DoRA or another variant, or have biases (lora_bias)"
        if type(base) is not nn.Linear or not is_unmodified(base, *sides, *(self.lora_dropout[n] for n in names)):
            return "a layer or an adapter is not a plain nn.Linear, or has a hook"
        weights = [base.weight] if base.bias is None else [base.weight, base.bias]  # faster than parameters()
        if any(weight.requires_grad for weight in weights):
            return "the base layer's weight or bias trains, too"
        if any(isinstance(weight, DTensor) for weight in (*weights, *(side.weight for side in sides))):
            return "a layer is sharded"
        if any(weight.dtype != (dtype := matmul_dtype(x)) for weight in weights):
            return f"the layer's weights are {weights[0].dtype}, and it computes in {dtype}"
        return "several are active, with dropout" if drops and len(names) > 1 else None


def lora_linears(x: torch.Tensor, *layers: Any) -> list[torch.Tensor]:
    """Return the outputs [.., out] of these layers for the same x [.., in], fused if all have adapters."""
    fast = all(isinstance(layer, FastLoraLinear) and not has_hooks(layer) for layer in layers)
    factors = [layer.factors(x) for layer in layers] if fast else [None]
    if any(f is None or f.dropout is not None for f in factors):  # each layer draws its own dropout mask
        return [layer(x) for layer in layers]
    return _run(x, layers, factors)


def fuse_adapted_linears(places: Sequence[tuple[nn.Module, str]]) -> None:
    """Make linear layers fast that PEFT has wrapped by now. places: (parent module, name) of each linear layer."""
    for parent, name in places:
        wrapper: Any = parent._modules.get(name)
        stock: Any = type(wrapper)
        if stock is not nn.Linear and stock.__name__ == "Linear" and hasattr(wrapper, "lora_variant"):
            wrapper.__class__ = twin(getattr(stock, "__stock__", stock), FastLoraLinear)


def _run(x: torch.Tensor, layers: Sequence[Any], factors: Sequence[Any]) -> list[torch.Tensor]:
    x, dropout, bases = x.to(matmul_dtype(x)), factors[0].dropout, [layer.base_layer for layer in layers]
    a_RK = torch.cat([f.a for f in factors]).to(x.dtype)
    tensors = [*[base.weight for base in bases], *[base.bias for base in bases], *[f.b.to(x.dtype) for f in factors]]
    dropped = None if dropout is None else dropout(x)
    return list(_LoraLinears.apply(x, dropped, a_RK, [f.scale for f in factors], *tensors))


class _LoraLinears(torch.autograd.Function):
    """x [.., in], dropout(x) or None, all A [R, in] → y_n [.., out]; `tensors`: all W, all biases or None, all B."""

    @staticmethod
    def forward(ctx: Any, x, dropped, a_RK, scales: list[float], *tensors):
        count = len(scales)
        weights, biases, factors = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        x_TK = x.reshape(-1, x.shape[-1])
        low_TK = x_TK if dropped is None else dropped.reshape(x_TK.shape)
        u_TR = low_TK @ a_RK.t()
        ctx.scales, ctx.drops, ctx.shape, outs = scales, dropped is not None, x.shape, []
        ctx.ranks = [b_NR.shape[1] for b_NR in factors]
        us = u_TR.split(ctx.ranks, 1)
        for weight, bias, b_NR, u, scale in zip(weights, biases, factors, us, scales, strict=True):
            start = x.new_empty(len(x_TK), len(weight)) if bias is None else bias
            y_TN = torch.addmm(start, u, b_NR.t(), beta=bias is not None, alpha=scale)
            outs.append(y_TN.addmm_(x_TK, weight.t()).view(*x.shape[:-1], len(weight)))
        ctx.save_for_backward(x_TK, low_TK, u_TR, a_RK, *weights, *factors)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys):
        x_TK, low_TK, u_TR, a_RK, *tensors = ctx.saved_tensors
        weights, factors, count = tensors[: len(dys)], tensors[len(dys) :], len(dys)
        need_x, need_dropped, need_a, _, *need = ctx.needs_input_grad
        du_TR, dfactors = torch.empty_like(u_TR), []
        dy_TN = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        for dy, b_NR, u, du, scale, needed in zip(
            dy_TN, factors, u_TR.split(ctx.ranks, 1), du_TR.split(ctx.ranks, 1), ctx.scales, need[-count:], strict=True
        ):
            torch.addmm(du, dy, b_NR, beta=0, alpha=scale, out=du)
            dfactors.append((dy.t() @ u).mul_(scale) if needed else None)
        da_RK = du_TR.t() @ low_TK if need_a else None
        dlow_TK: Any = du_TR @ a_RK if need_x or need_dropped else None
        dx_TK: Any = None if ctx.drops else dlow_TK
        for dy, weight in zip(dy_TN, weights, strict=True) if need_x else ():
            dx_TK = dy @ weight if dx_TK is None else dx_TK.addmm_(dy, weight)
        dx, dlow = dx_TK.view(ctx.shape) if need_x else None, dlow_TK.view(ctx.shape) if need_dropped else None
        return dx, dlow, da_RK, None, *[None] * (2 * count), *dfactors
