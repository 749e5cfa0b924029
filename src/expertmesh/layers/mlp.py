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

    activations: tuple[type, ...] = (SiLUActivation, nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not(self) is not None:  # its activation was replaced or hooked after fusing: call it
            return super().forward(x)
        return self.down_proj(self._activated(x))

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(*linears(x, self.gate_proj, self.up_proj))

    @classmethod
    def why_not(cls, mlp: Any) -> str | None:
        if untouched(mlp.act_fn) and isinstance(mlp.act_fn, cls.activations):
            return None
        return f"its activation is {type(mlp.act_fn).__name__}, not {cls.activations[0].__name__} that nobody hooked"


class FastReLU2MLP(FastSwiGLU):
    """down_proj(relu(up_proj(x))^2)."""

    activations = (ReLUSquaredActivation,)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return relu2(self.up_proj(x))
