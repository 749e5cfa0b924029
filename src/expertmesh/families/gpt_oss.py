"""GPT-OSS (20B, 120B): attention with sinks, full and sliding by turns."""

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
