"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): every fusion applies, and a test holds that it does.

decoder layer   residual add + post-attention norm in one kernel                     here
  block         residual add behind the experts in their last kernel                 here
  attention     q/k-norm + RoPE in one kernel; the attention is the user's choice    here
  router        softmax, top-k and normalisation in one kernel                       generic
  experts       SwiGLU, gate and up concatenated, no bias                            generic
  dense MLP     SwiGLU (layers named in `mlp_only_layers`)                           generic
head            loss from hidden states, no logits                                   every family
"""

from expertmesh.families.rules import Rule
from expertmesh.layers.attention import FastQKNormAttention, why_not_qk_norm
from expertmesh.layers.decoder import FastDecoderLayer, why_not_add_norm
from expertmesh.layers.moe import FastMoEBlock

RULES = (
    Rule(
        "qk_norm_rope",
        FastQKNormAttention,
        like=("qwen3_moe.Qwen3MoeAttention",),
        code=("65d48b79fb0e",),
        also=("apply_rotary_pos_emb", "rotate_half"),
        why_not=why_not_qk_norm,
    ),
    Rule(
        "add_norm",
        FastDecoderLayer,
        like=("qwen3_moe.Qwen3MoeDecoderLayer",),
        code=("fc9069d4bd0e",),
        why_not=why_not_add_norm,
    ),
    Rule("add_norm", FastMoEBlock, like=("qwen3_moe.Qwen3MoeSparseMoeBlock",), code=("70fb069151b5",)),
)
