"""Nemotron 3 (Nano 30B-A3B, Super, Ultra), and the Mamba2 mixer that it shares with other hybrid models.

decoder layer   in backward the norm adds the residual connection's gradient                     layers/hybrid.py
mixer of a layer, one of
  Mamba2        convolution, scan and gated norm in Triton; packed documents kept apart          layers/mamba2.py
  attention     no RoPE, no q/k-norm; packed documents by variable length                       layers/attention.py
  experts       relu^2, not gated; in Super and Ultra in a latent width, which is all that travels between ranks
  block         residual and shared expert are added where the experts' rows are summed, or where these are projected
                back from the latent width                                                       layers/hybrid.py
  router        sigmoid, correction bias, limited groups in one kernel                           moe/router.py
  MLP           relu^2 in one kernel (dense and shared experts)                                  layers/mlp.py
norms           float32 weight                                                                   layers/norm.py
head            loss from hidden states, no logits                                               layers/head.py
mtp             loaded, trained, saved                                                           mtp.py
"""

from typing import Any

from expertmesh.families.rules import fingerprint
from expertmesh.layers.mamba2 import FastMamba2Mixer


class FastGatedMamba2Mixer(FastMamba2Mixer):
    """The twin also stands for the norm inside: `NemotronHRMSNormGated` of Transformers, and all its namesakes."""

    @staticmethod
    def why_not(mixer: Any) -> str | None:
        norm: Any = type(mixer.norm)
        if fingerprint(norm) != "64ad4957826b":
            return f"its norm {norm.__name__} runs code of its own"
        return FastMamba2Mixer.why_not(mixer)
