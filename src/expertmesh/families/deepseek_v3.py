"""DeepSeek V3 (R1, V3.1, Kimi K2; GLM-4.7-Flash runs the same code): which of its modules are fused.

decoder layer   residual add + post-attention norm in one kernel                             layers/decoder.py
  block         residual and shared experts are added where the experts' rows are summed     moe/block.py
  attention     MLA: RoPE of queries and keys, and keys put together, in one kernel          here
  router        sigmoid, groups, top-k, normalisation and scale in one kernel                moe/block.py
  experts       SwiGLU, gate and up concatenated, no bias                                    moe/experts.py
  dense MLP     SwiGLU (first layers, shared experts)                                        layers/mlp.py
head            loss from hidden states, no logits                                           layers/head.py
modules for multi-token prediction                                                           mtp.py

The attention stays the one that the user chose. On the way of "sdpa" queries and keys are 192 wide and values 128: on
Hopper and newer cuDNN takes that as it is, before Hopper PyTorch's memory-efficient kernel; never a matrix of S x S.
"""

from typing import Any

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import eager_attention_forward

from expertmesh.kernels.mla_rope import mla_rope, rotated
from expertmesh.layers.attention import FastAttention
from expertmesh.layers.lora import linears


class FastLatentAttention(FastAttention):
    """Must equal `DeepseekV3Attention.forward` of Transformers."""

    stands_for = ("forward", "expand_kv", "apply_rotary_pos_emb_interleave")
    eager = staticmethod(eager_attention_forward)

    def heads(
        self, hidden_states: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], past: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, seq = hidden_states.shape[:-1]
        first = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        q, latents = linears(hidden_states, first, self.kv_a_proj_with_mqa)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.view(batch, seq, -1, self.qk_head_dim)
        widths = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, k_rope = latents.split(widths, dim=-1)
        latent = self.kv_a_layernorm(latent)

        cached = None
        if past is not None:  # it keeps latents and rotated positions, as stock does
            turned = rotated(k_rope[:, None], *turn)
            cached = past.update(latent[:, None], turned, self.layer_idx, kwargs=kwargs)
        if cached is None or cached[0].shape[2] == seq:  # all keys are of these tokens
            kv = self.kv_b_proj(latent).view(batch, seq, -1, self.qk_nope_head_dim + self.v_head_dim)
            query, key, value = mla_rope(q, kv, k_rope, *turn)
        else:
            query = rotated(q.transpose(1, 2), *turn)
            key, value = self.expand_kv(*cached)
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        return None if attention.config.rope_interleave else "its RoPE turns halves, not pairs (rope_interleave=False)"
