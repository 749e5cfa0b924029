"""GPT-OSS (20B, 120B).

decoder layer   residual add + post-attention norm in one kernel                layers/decoder.py
  block         residual add behind the experts in their last kernel            moe/block.py
  attention     sinks, full and sliding by turns: our kernels                   layers/sinks.py
                RoPE in one pass                                                here
  router        top-k, then softmax                                             moe/block.py
  experts       transposed, gate and up interleaved, biases, clamped SwiGLU     moe/experts.py
norms           float32                                                         layers/decoder.py
head            loss from hidden states, no logits                              layers/head.py
"""

from typing import Any

import torch

from expertmesh.kernels.rope import rotary
from expertmesh.layers import sinks
from expertmesh.layers.rope import FastRoPE


class FastSinkAttention(FastRoPE):
    """`GptOssAttention` with its own RoPE in one kernel; its attention is `attend_with_sinks`."""

    probed = True
    stands_for = ("forward", "apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward")

    @classmethod
    def turn(
        cls, stock: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert unsqueeze_dim == 1, "heads before positions"
        return rotary(q, k, cos, sin, half=True)

    @staticmethod
    def why_not(attention: Any) -> str | None:
        chosen = attention.config._attn_implementation
        return None if chosen == sinks.NAME else f"attn_implementation={chosen!r} was asked for"
