"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): every fusion applies, and a test holds that it does.

decoder layer   residual add + post-attention norm in one kernel                     layers/decoder.py
  block         residual add behind the experts in their last kernel                 moe/block.py
  attention     q/k-norm + RoPE in one kernel; the attention is the user's choice    here
  router        softmax, top-k and normalisation in one kernel                       moe/block.py
  experts       SwiGLU, gate and up concatenated, no bias                            moe/experts.py
  dense MLP     SwiGLU (layers named in `mlp_only_layers`)                           layers/mlp.py
head            loss from hidden states, no logits                                   layers/head.py
"""

from typing import Any

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

from expertmesh.kernels.rope import qk_norm_rope
from expertmesh.layers.attention import FastAttention
from expertmesh.layers.decoder import FastRMSNorm
from expertmesh.layers.lora import linears
from expertmesh.twins import untouched


class FastQKNormAttention(FastAttention):
    """Must equal `Qwen3MoeAttention.forward` of Transformers."""

    stands_for = ("forward", "apply_rotary_pos_emb", "rotate_half")
    eager = staticmethod(eager_attention_forward)

    def heads(
        self, hidden_states: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], past: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key = qk_norm_rope(
            query.view(heads),
            key.view(heads),
            self.q_norm.weight,
            self.k_norm.weight,
            *turn,
            self.q_norm.variance_epsilon,
        )
        value = value.view(heads).transpose(1, 2)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx, kwargs=kwargs)
        kwargs["sliding_window"] = self.sliding_window
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        if untouched(q_norm, k_norm, kind=FastRMSNorm) and q_norm.scale == k_norm.scale == "rounded":
            return None
        return "its q/k-norms are not fused RMSNorms of Llama's kind"
