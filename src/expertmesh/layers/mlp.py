"""Fast twins of dense and shared-expert MLPs: their activation, silu(gate) * up or relu(x)^2, in one kernel."""

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation, SiLUActivation

from expertmesh.kernels.activation import relu2, swiglu
from expertmesh.twins import Fast, untouched


class FastSwiGLU(Fast):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if why_not_swiglu(self) is not None:  # its activation was replaced or hooked after fusing: call it
            return super().forward(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def why_not_swiglu(mlp: nn.Module) -> str | None:
    """Why this gated MLP must stay stock, or None."""
    if isinstance(mlp.act_fn, (SiLUActivation, nn.SiLU)) and untouched(mlp.act_fn):
        return None
    return f"its activation is {type(mlp.act_fn).__name__}, not SiLU that nobody hooked"


class FastReLU2MLP(Fast):
    """down_proj(relu(up_proj(x))^2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if why_not_relu2(self) is not None:
            return super().forward(x)
        return self.down_proj(relu2(self.up_proj(x)))


def why_not_relu2(mlp: nn.Module) -> str | None:
    """Why this MLP without gate must stay stock, or None."""
    if isinstance(mlp.act_fn, ReLUSquaredActivation) and untouched(mlp.act_fn):
        return None
    return f"its activation is {type(mlp.act_fn).__name__}, not relu^2 that nobody hooked"
