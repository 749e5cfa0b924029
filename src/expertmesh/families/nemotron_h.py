"""Nemotron 3 (Nano 30B-A3B, Super, Ultra), and the Mamba2 mixer that it shares with other hybrid models.

A layer has one norm, one mixer (Mamba2, attention, experts or MLP), and a residual connection around both, whose
gradient the norm's backward adds.
"""

from typing import Any

import torch
from torch import nn

from expertmesh.backends import opaque
from expertmesh.families.rules import fingerprint
from expertmesh.layers.decoder import FastRMSNorm, add_block
from expertmesh.layers.mamba2 import FastMamba2Mixer
from expertmesh.moe.block import FastSharedMoEBlock, add_scaled, stock_block
from expertmesh.twins import Fast, cache_of, untouched


class FastGatedMamba2Mixer(FastMamba2Mixer):
    """The twin also stands for the norm inside: `NemotronHRMSNormGated` of Transformers, and all its namesakes."""

    @staticmethod
    def why_not(mixer: Any) -> str | None:
        norm: Any = type(mixer.norm)
        if fingerprint(norm) != "64ad4957826b":
            return f"its norm {norm.__name__} runs code of its own"
        return FastMamba2Mixer.why_not(mixer)


class FastNemotronHBlock(Fast):
    """Must equal `NemotronHBlock.forward` of Transformers."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm = self.norm
        if args or not untouched(norm, kind=FastRMSNorm) or norm.weight.dtype != hidden_states.dtype:  # stock converts
            return super().forward(hidden_states, *args, **kwargs)
        normed, residual = norm.of_sum(hidden_states)
        if self.block_type == "linear_attention":
            for name in ("position_ids", "use_cache"):
                kwargs.pop(name, None)
            return residual + self.mixer(normed, cache_of(kwargs), **kwargs)
        if self.block_type == "full_attention":
            return residual + self.mixer(hidden_states=normed, **kwargs)[0]
        return add_block(self.mixer, normed, residual)


class FastNemotronHMoEBlock(FastSharedMoEBlock):
    """Must equal `NemotronHMoE.forward`, whose experts may work in a latent width, as in Super and Ultra.

    Then the residual waits for the projection back from that width, and is added by its matrix product.
    """

    @opaque(stock_block)
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        if residual is None or self.config.moe_latent_size is None:
            return super().forward(hidden_states, residual, scale)
        shared_TH = self.shared_experts(hidden_states).flatten(0, -2)
        total_TH = add_scaled(residual.flatten(0, -2), shared_TH, scale)
        x_TH = hidden_states.flatten(0, -2)
        _, weight_TK, ids_TK = self.gate(x_TH)
        y_TL = self.experts(self.fc1_latent_proj(x_TH), ids_TK, weight_TK)
        proj = self.fc2_latent_proj
        plain = type(proj) is nn.Linear and proj.bias is None and untouched(proj)
        if plain and total_TH.dtype == y_TL.dtype == proj.weight.dtype:
            out_TH = total_TH.addmm_(y_TL, proj.weight.t(), alpha=scale)  # nobody else keeps the total
        else:
            out_TH = add_scaled(total_TH, proj(y_TL), scale)
        return torch.ops.aten._unsafe_view(out_TH, residual.shape)  # no view, of which FSDP warns
