"""Fast twins of dense and shared-expert MLPs: their activation, silu(gate) * up or relu(x)^2, in one kernel."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation, SiLUActivation

from expertmesh.kernels.activation import relu2, swiglu
from expertmesh.layers.lora import linears
from expertmesh.twins import Fast, untouched


class FastSwiGLU(Fast):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not(self) is not None:  # its activation was replaced or hooked after fusing: call it
            return super().forward(x)
        return self.down_proj(swiglu(*linears(x, self.gate_proj, self.up_proj)))

    @staticmethod
    def why_not(mlp: Any) -> str | None:
        if isinstance(mlp.act_fn, (SiLUActivation, nn.SiLU)) and untouched(mlp.act_fn):
            return None
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU that nobody hooked"


class FastReLU2MLP(Fast):
    """down_proj(relu(up_proj(x))^2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not(self) is not None:
            return super().forward(x)
        return self.down_proj(relu2(self.up_proj(x)))

    @staticmethod
    def why_not(mlp: Any) -> str | None:
        if isinstance(mlp.act_fn, ReLUSquaredActivation) and untouched(mlp.act_fn):
            return None
        return f"its activation is {type(mlp.act_fn).__name__}, not relu^2 that nobody hooked"
