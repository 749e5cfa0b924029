"""GPT-OSS (20B, 120B).

decoder layer   residual add + post-attention norm in one kernel                      generic
  block         residual add behind the experts in their last kernel                  generic
attention       sinks, full and sliding by turns: our kernels, RoPE in one pass       here
router          top-k, then softmax                                                   generic
experts         transposed, gate and up interleaved, biases, clamped SwiGLU           generic
norms           float32                                                               generic
head            loss from hidden states, no logits                                    every family
"""

import sys
from typing import Any

from torch import nn

from expertmesh.families.rules import Rule
from expertmesh.layers.sinks import FastSinkAttention, why_not_sinks

RULES = (
    Rule(
        "sink_attention",
        FastSinkAttention,
        like=("gpt_oss.GptOssAttention",),
        code=("fd662928bacc",),
        also=("apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward"),
        why_not=why_not_sinks,
    ),
)


def has_sinks(model_class: Any) -> bool:
    """Whether this Transformers class has the causal attention with sinks that `RULES` replace."""
    if model_class.config_class.model_type == "gpt_oss":  # however a later release writes it
        return True
    found = vars(sys.modules[model_class.__module__]).values()
    classes = [
        x for x in found if isinstance(x, type) and issubclass(x, nn.Module) and x.__name__.endswith("Attention")
    ]
    return any(rule.matches(cls) for rule in RULES for cls in classes)
