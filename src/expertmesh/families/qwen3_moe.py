"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): every fusion applies, and a test holds that it does.

decoder layer   residual add + post-attention norm in one kernel                     generic
  block         residual add behind the experts in their last kernel                 generic
  attention     q/k-norm + RoPE in one kernel; the attention is the user's choice    here
  router        softmax, top-k and normalisation in one kernel                       generic
  experts       SwiGLU, gate and up concatenated, no bias                            generic
  dense MLP     SwiGLU (layers named in `mlp_only_layers`)                           generic
head            loss from hidden states, no logits                                   every family
"""

from expertmesh.families.rules import Rule
from expertmesh.layers.attention import FastQKNormAttention, why_not_qk_norm

RULES = (
    Rule(
        "qk_norm_rope",
        FastQKNormAttention,
        like=("qwen3_moe.Qwen3MoeAttention",),
        code=("ab01336ffc67",),
        also=("apply_rotary_pos_emb", "rotate_half"),
        why_not=why_not_qk_norm,
    ),
)
