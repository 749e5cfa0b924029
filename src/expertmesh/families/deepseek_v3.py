"""DeepSeek V3 (R1, V3.1, Kimi K2; GLM-4.7-Flash runs the same code): which of its modules are fused.

decoder layer   residual add + post-attention norm in one kernel                             generic
  block         residual and shared experts are added where the experts' rows are summed     generic
  attention     MLA: RoPE of queries and keys, and keys put together, in one kernel          here
  router        sigmoid, groups, top-k, normalisation and scale in one kernel                generic
  experts       SwiGLU, gate and up concatenated, no bias                                    generic
  dense MLP     SwiGLU (first layers, shared experts)                                        generic
head            loss from hidden states, no logits                                           every family
modules for multi-token prediction                                                           mtp
"""

from expertmesh.families.rules import Rule
from expertmesh.layers.mla import FastLatentAttention, why_not_mla

RULES = (
    Rule(
        "mla_rope",
        FastLatentAttention,
        like=("deepseek_v3.DeepseekV3Attention", "glm4_moe_lite.Glm4MoeLiteAttention"),
        code=("58dcfce7b057",),
        also=("expand_kv", "apply_rotary_pos_emb_interleave"),
        why_not=why_not_mla,
    ),
)
