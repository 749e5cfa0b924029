"""Fast twins of Transformers' RMSNorm classes; three conventions of how the weight multiplies (kernels/rms_norm.py)."""

import torch
from torch import nn

from expertmesh.kernels.rms_norm import Scale, add_rms_norm, rms_norm
from expertmesh.twins import Fast, untouched


class FastRMSNorm(Fast):
    """`weight * x_hat.to(dtype)`: Llama, Qwen, DeepSeek, Mixtral …"""

    scale: Scale = "rounded"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, scale=self.scale)

    def with_residual(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(s), s) of s = x + residual, or x: `s` goes around what the norm feeds."""
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon, scale=self.scale)


class FastFloat32RMSNorm(FastRMSNorm):
    """`(weight * x_hat).to(dtype)` in float32: GPT-OSS, Nemotron."""

    scale: Scale = "float32"


class FastOnePlusRMSNorm(FastRMSNorm):
    """`((1 + weight) * x_hat).to(dtype)` in float32: Qwen3-Next, Qwen3.5."""

    stands_for = ("forward", "_norm")
    scale: Scale = "one_plus"

    variance_epsilon = property(lambda self: self.eps)


def can_merge(*norms: nn.Module) -> bool:
    """Whether a layer may compute these norms, by their `scale`, itself instead of calling them: RMSNorms nobody
    hooked.
    """
    return all([isinstance(norm, FastRMSNorm) for norm in norms]) and untouched(*norms)
