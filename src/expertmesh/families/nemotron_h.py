"""Nemotron 3 (Nano 30B-A3B, Super, Ultra), and the Mamba2 mixer that it shares with other hybrid models.

decoder layer   one norm, one mixer of four kinds, one residual connection around both; the norm's
                backward also adds the gradient of that connection                               here
mixer of a layer, one of
  Mamba2        convolution, scan and gated norm in Triton; packed documents kept apart          layers/mamba2.py
  attention     no RoPE, no q/k-norm; packed documents by variable length                       layers/attention.py
  experts       relu^2, not gated; in Super and Ultra in a latent width, which is all that travels between ranks
  block         residual and shared expert are added where the experts' rows are summed, or where these are projected
                back from the latent width                                                       here
  router        sigmoid, correction bias, limited groups in one kernel                           moe/block.py
  MLP           relu^2 in one kernel (dense and shared experts)                                  layers/mlp.py
norms           float32 weight                                                                   layers/decoder.py
head            loss from hidden states, no logits                                               layers/head.py
mtp             loaded, trained, saved                                                           mtp.py
"""

from typing import Any

import torch
from torch import nn

from expertmesh.backends import opaque
from expertmesh.families.rules import fingerprint
from expertmesh.kernels.rms_norm import add_rms_norm
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
        eps = getattr(norm, norm.eps_name)
        normed, residual = add_rms_norm(hidden_states, None, norm.weight, eps, scale=norm.scale)
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
        out_TH = _add_projected(total_TH, y_TL, self.fc2_latent_proj, scale)
        return torch.ops.aten._unsafe_view(out_TH, residual.shape)  # no view, of which FSDP warns


def _add_projected(total_TH: torch.Tensor, y_TL: torch.Tensor, proj: Any, scale: float) -> torch.Tensor:
    """total + scale · proj(y); without a bias, adapter or hook the product adds into total, which nobody else keeps."""
    plain = type(proj) is nn.Linear and proj.bias is None and untouched(proj)
    if plain and total_TH.dtype == y_TL.dtype == proj.weight.dtype:
        return total_TH.addmm_(y_TL, proj.weight.t(), alpha=scale)
    return add_scaled(total_TH, proj(y_TL), scale)
