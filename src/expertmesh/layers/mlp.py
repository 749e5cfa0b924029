"""Fast twin of the dense and shared-expert MLP: silu(gate) * up in one kernel."""

import torch
from torch import nn
from transformers.activations import SiLUActivation

from expertmesh.kernels.swiglu import swiglu
from expertmesh.layers.fast import Fast


class FastSwiGLU(Fast):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def why_not_swiglu(mlp: nn.Module) -> str | None:
    """Why this gated MLP must stay stock, or None."""
    if isinstance(mlp.act_fn, (SiLUActivation, nn.SiLU)):
        return None
    return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
