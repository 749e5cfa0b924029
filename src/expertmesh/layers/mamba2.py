"""Fast twin of the Mamba2 mixer. One function (kernels/mamba2.py) does everything between its two projections.

In packed rows neither the convolution nor the state may cross a document boundary. The base model passes the starts of
documents as a keyword argument through the layers, so a recomputed layer gets it too. With a cache (generation)
Transformers' code runs.
"""

from typing import Any

import torch
from transformers.models.nemotron_h.modeling_nemotron_h import apply_mask_to_padding_states

from expertmesh.backends import warn_once
from expertmesh.kernels.mamba2 import Mamba2Options, Mamba2Weights, mamba2
from expertmesh.twins import Fast, fingerprint, is_unmodified, pop_cache


class FastMamba2Mixer(Fast):
    """Must equal `NemotronHMamba2Mixer.forward` of Transformers for each document. The gated norm in it must have the
    code of `NemotronHRMSNormGated`."""

    stands_for = ("forward", "apply_mask_to_padding_states", "causal_conv1d_fn", "mamba2_chunk_scan")

    def forward(
        self, hidden_states: torch.Tensor, cache: Any = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        cache = cache if cache is not None else pop_cache(kwargs)
        start_BS = kwargs.pop("document_starts", None)
        if modified := not is_unmodified(self.conv1d, self.norm, self.act):
            warn_once(f"{type(self).__name__} runs Transformers' code: a submodule has hooks or was replaced.")
        if cache is not None or modified:
            if start_BS is not None:
                kwargs["seq_idx"] = start_BS  # for these rows Transformers raises without mamba-ssm
            return super().forward(hidden_states, cache, attention_mask, **kwargs)
        dtype = hidden_states.dtype
        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        conv, decay = self.conv1d, -torch.exp(self.A_log.float())
        weights = Mamba2Weights(conv.weight.squeeze(1), conv.bias, decay, self.D, self.dt_bias, self.norm.weight)
        options = Mamba2Options(self.head_dim, self.n_groups, self.time_step_limit, self.norm.variance_epsilon)
        y = mamba2(self.in_proj(hidden_states), weights, options, start_BS, attention_mask)
        return self.out_proj(y.to(dtype))

    @staticmethod
    def why_not(mixer: Any) -> str | None:
        norm: Any = type(mixer.norm)
        if fingerprint(norm) != "64ad4957826b":
            return f"its norm {norm.__name__} runs code of its own"
        sizes = mixer.head_dim, mixer.ssm_state_size
        if any(size < 16 or size & (size - 1) for size in sizes):
            return f"its head and state widths {sizes} are not powers of two of at least 16"
        if mixer.activation != "silu" or mixer.conv_kernel_size != 4:
            over, act = mixer.conv_kernel_size, mixer.activation
            return f"its convolution over {over} tokens with {act} is not one over 4 with silu"
        if mixer.norm.group_size * mixer.n_groups != mixer.intermediate_size:
            return "its norm and its scan have different numbers of groups"
        return None
