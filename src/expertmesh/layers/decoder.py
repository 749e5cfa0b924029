"""Fast twin of a pre-norm decoder layer: the residual add after attention and the norm behind it are one kernel.

The second residual add happens in the experts' last kernel, where the block allows it (moe.py). In backward each norm
adds the gradient of the residual connection around it while it writes its own.
"""

from typing import Any

import torch

from expertmesh.kernels.rms_norm import add_rms_norm, keep_rms_norm
from expertmesh.layers.fast import Fast, untouched
from expertmesh.layers.moe import FastMoEBlock
from expertmesh.layers.norm import can_merge


class FastDecoderLayer(Fast):
    """Must equal `Qwen3MoeDecoderLayer.forward` of Transformers."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        kwargs.update(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
        )
        norm = self.post_attention_layernorm
        if not can_merge(norm):  # somebody replaced or hooked the norm after fusing: call it
            return super().forward(hidden_states, **kwargs)
        first = self.input_layernorm
        if can_merge(first):
            normed, hidden_states = keep_rms_norm(hidden_states, first.weight, first.variance_epsilon)
        else:
            normed = first(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=normed, **kwargs)
        normed, residual = add_rms_norm(attn_output, hidden_states, norm.weight, norm.variance_epsilon)
        if isinstance(self.mlp, FastMoEBlock) and untouched(self.mlp):
            return self.mlp(normed, residual)
        return residual + self.mlp(normed)


def why_not_add_norm(layer: Any) -> str | None:
    """Why this decoder layer must stay stock, or None."""
    return None if can_merge(layer.post_attention_layernorm) else "the norm behind its attention is not a fused RMSNorm"
