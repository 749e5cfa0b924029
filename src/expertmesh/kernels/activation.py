"""What stands between an expert's up- and down-projection, forward and backward.

`h_SJ` is the up-projection's output of S rows: J = 2I columns for gated experts (gate and up, one after the other or
interleaved), J = I otherwise. The activation makes `a_SI`. Three kinds are known to the Triton kernels:

    silu      a = silu(gate) * up                                      Qwen, DeepSeek, Mixtral, GLM …
    clamped   a = g·σ(αg) · (u + 1),  g = min(gate, L), u = clamp(up, -L, L)    GPT-OSS
    relu2     a = relu(h)²                                             Nemotron

Any other is `custom`: the HF module's own function is called, and differentiated by autograd on a recomputation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton


@dataclass(frozen=True)
class Activation:
    """How an experts module turns h [S, J] into a [S, I].

    kind: silu, clamped, relu2 or custom. gated: J = 2I, else J = I. interleaved: gate and up columns alternate.
    alpha, limit: constants of `clamped`. fn: the module's function, used by `custom` only.
    """

    kind: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")
    fn: Callable[[torch.Tensor], torch.Tensor] | None = None

    def split(self, h_SJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up columns of a gated h, as views [S, I]."""
        if self.interleaved:
            return h_SJ[..., ::2], h_SJ[..., 1::2]
        gate, up = h_SJ.chunk(2, dim=-1)
        return gate, up

    def forward(self, h_SJ: torch.Tensor) -> torch.Tensor:
        """a [S, I] of h [S, J]; equals the HF module's `_apply_gate` (gated) or `act_fn`."""
        if self.kind == "silu":
            gate, up = self.split(h_SJ)
            return F.silu(gate) * up
        if self.kind == "clamped":
            gate, up = self.split(h_SJ)
            gate = gate.clamp(max=self.limit)
            return (up.clamp(-self.limit, self.limit) + 1) * (gate * torch.sigmoid(gate * self.alpha))
        if self.kind == "relu2":
            return torch.square(F.relu(h_SJ))
        assert self.fn is not None
        return self.fn(h_SJ)

    def backward(self, h_SJ: torch.Tensor, da_SI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [S, I], dh [S, J]) from h and the gradient of a, by autograd on a recomputation of `forward`."""
        with torch.enable_grad():
            h_SJ = h_SJ.detach().requires_grad_()
            a_SI = self.forward(h_SJ)
        (dh_SJ,) = torch.autograd.grad(a_SI, h_SJ, da_SI)
        return a_SI.detach(), dh_SJ


@triton.jit
def activate(gate, up, KIND: tl.constexpr, alpha, limit):
    """a = activation(gate, up) in float32; `up` is unused by relu2."""
    if KIND == "silu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "clamped":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        return (u + 1.0) * (g * tl.sigmoid(g * alpha))
    else:
        r = tl.maximum(gate, 0.0)
        return r * r


@triton.jit
def activate_backward(gate, up, da, KIND: tl.constexpr, alpha, limit):
    """(a, dgate, dup) in float32."""
    if KIND == "silu":
        s = tl.sigmoid(gate)
        silu = gate * s
        return silu * up, da * up * (s + silu * (1.0 - s)), da * silu
    elif KIND == "clamped":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        s = tl.sigmoid(g * alpha)
        glu = g * s
        dgate = da * (u + 1.0) * (s + alpha * glu * (1.0 - s))
        dgate = tl.where(gate <= limit, dgate, 0.0)
        dup = tl.where((up >= -limit) & (up <= limit), da * glu, 0.0)
        return (u + 1.0) * glu, dgate, dup
    else:
        r = tl.maximum(gate, 0.0)
        return r * r, da * 2.0 * r, da
