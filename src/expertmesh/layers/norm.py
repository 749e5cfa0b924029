"""Fast twins of Transformers' RMSNorm classes; three conventions of how the weight multiplies (kernels/rms_norm.py)."""

import torch
from torch import nn

from expertmesh.kernels.rms_norm import Scale, add_rms_norm, rms_norm
from expertmesh.twins import Fast, untouched


class FastRMSNorm(Fast):
    """`weight * x_hat.to(dtype)`: Llama, Qwen, DeepSeek, Mixtral …"""

    scale: Scale = "rounded"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.get_eps(), scale=self.scale)

    def with_residual(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(s), s) of s = x + residual, or x: `s` goes around what the norm feeds."""
        return add_rms_norm(x, residual, self.weight, self.get_eps(), scale=self.scale)

    def get_eps(self) -> float:
        """What is added to the mean square."""
        return self.variance_epsilon


class FastFloat32RMSNorm(FastRMSNorm):
    """`(weight * x_hat).to(dtype)` in float32: GPT-OSS, Nemotron."""

    scale: Scale = "float32"


class FastOnePlusRMSNorm(FastRMSNorm):
    """`((1 + weight) * x_hat).to(dtype)` in float32: Qwen3-Next, Qwen3.5."""

    stands_for = ("forward", "_norm")
    scale: Scale = "one_plus"

    def get_eps(self) -> float:
        """These classes have it under another name."""
        return self.eps


def can_merge(norm: nn.Module) -> bool:
    """Whether a layer may compute this norm, by its `scale`, itself instead of calling it: an RMSNorm nobody hooked."""
    return isinstance(norm, FastRMSNorm) and untouched(norm)
