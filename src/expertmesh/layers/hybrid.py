"""Fast twin of Nemotron-H's decoder layer: one norm, one mixer of four kinds, one residual connection around both.

In backward the norm adds the gradient of the residual connection while it writes its own; experts that work in the
model's own width add the residual in their last kernel.
"""

from typing import Any

import torch

from expertmesh.kernels.rms_norm import keep_rms_norm
from expertmesh.layers.decoder import add_block
from expertmesh.layers.fast import Fast
from expertmesh.layers.norm import can_merge


class FastNemotronHBlock(Fast):
    """Must equal `NemotronHBlock.forward` of Transformers."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm = self.norm
        if args or not can_merge(norm) or norm.weight.dtype != hidden_states.dtype:  # which stock then converts
            return super().forward(hidden_states, *args, **kwargs)
        normed, residual = keep_rms_norm(hidden_states, norm.weight, norm.get_eps(), scale=norm.scale)
        if self.block_type == "linear_attention":
            for name in ("position_ids", "use_cache"):
                kwargs.pop(name, None)
            return residual + self.mixer(normed, cache_params=kwargs.pop("past_key_values", None), **kwargs)
        if self.block_type == "full_attention":
            return residual + self.mixer(hidden_states=normed, **kwargs)[0]
        return add_block(self.mixer, normed, residual)


def why_not_latent(block: Any) -> str | None:
    """Why this block of experts cannot add a residual itself, or None."""
    return None if block.config.moe_latent_size is None else "its experts work in a latent width"
