"""Nemotron 3 (Nano 30B-A3B, Super, Ultra), and the Mamba2 mixer that it shares with other hybrid models.

decoder layer   in backward the norm adds the residual connection's gradient                     here
mixer of a layer, one of
  Mamba2        convolution, scan and gated norm in Triton; packed documents kept apart          here
  attention     no RoPE, no q/k-norm; packed documents by variable length                       every family
  experts       relu^2, not gated; in Super and Ultra in a latent width, which is all that travels between ranks
  block         residual and shared expert are added where the experts' rows are summed, or where these are projected
                back from the latent width                                                       here
  router        sigmoid, correction bias, limited groups in one kernel                          generic
  MLP           relu^2 in one kernel (dense and shared experts)                                 here
norms           float32 weight                                                                  generic
head            loss from hidden states, no logits                                              every family
mtp             loaded, trained, saved                                                          families/mtp.py
"""

from typing import Any

from expertmesh.families.rules import Rule, fingerprint
from expertmesh.layers.hybrid import FastNemotronHBlock, FastNemotronHMoEBlock
from expertmesh.layers.mamba2 import FastMamba2Mixer, why_not_mamba2
from expertmesh.layers.mlp import FastReLU2MLP, why_not_relu2

#: `NemotronHRMSNormGated` of Transformers, and all its namesakes
GATED_NORM = "64ad4957826b"


def _why_not(mixer: Any) -> str | None:
    norm: Any = type(mixer.norm)
    if fingerprint(norm) != GATED_NORM:
        return f"its norm {norm.__name__} runs code of its own"
    return why_not_mamba2(mixer)


RULES = (
    Rule(
        "mamba2",
        FastMamba2Mixer,
        like=("nemotron_h.NemotronHMamba2Mixer", "granitemoehybrid.GraniteMoeHybridMambaLayer"),
        code=("9a702f2272e8",),
        also=("apply_mask_to_padding_states", "causal_conv1d_fn", "mamba2_chunk_scan"),
        why_not=_why_not,
    ),
    Rule("add_norm", FastNemotronHBlock, like=("nemotron_h.NemotronHBlock",), code=("38a8c88270bc",)),
    Rule("add_norm", FastNemotronHMoEBlock, like=("nemotron_h.NemotronHMoE",), code=("583798ea34f9",), probed=False),
    Rule("swiglu", FastReLU2MLP, like=("nemotron_h.NemotronHMLP",), code=("d4bf579a3de9",), why_not=why_not_relu2),
)
