"""Fast twin of a Mixture-of-Experts block: the residual add behind it happens where the experts' rows are summed."""

from typing import Any

import torch

from expertmesh.layers import experts as fast_experts
from expertmesh.layers.fast import Fast, untouched


class FastMoEBlock(Fast):
    """Must equal `Qwen3MoeSparseMoeBlock.forward` of Transformers; given a residual, returns residual + that.

    A compiled layer calls the block and does not look into it: one graph break instead of one for every call inside.
    """

    @torch.compiler.disable
    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return super().forward(hidden_states)
        if not _takes_residual(self.experts):
            return residual + super().forward(hidden_states)
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        _, weight_TK, ids_TK = self.gate(x_TH)
        return self.experts(x_TH, ids_TK, weight_TK, residual=residual)


def _takes_residual(experts: Any) -> bool:
    """Whether a call goes straight to our `experts_forward`: past no adapter, no other rank and no hook."""
    if "is_concatenated" not in vars(experts) or not untouched(experts):
        return False
    return experts.config._experts_implementation == fast_experts.NAME
