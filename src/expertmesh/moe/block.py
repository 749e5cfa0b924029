"""Fast twins of Mixture-of-Experts blocks: the residual add behind them happens where the experts' rows are summed.

What else is added to the experts' sum, a shared expert, is added to the residual before.
"""

from typing import Any

import torch

from expertmesh.backends import opaque
from expertmesh.moe.dispatch import Dispatch
from expertmesh.moe.experts import NAME, is_experts
from expertmesh.moe.lora import FastParamWrapper, inside_adapters
from expertmesh.twins import Fast, untouched, watched


def stock_block(
    block: Any, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """residual + scale · what Transformers' code gives, which a graph can hold."""
    out = type(block).__stock__.forward(block, hidden_states)
    return out if residual is None else add_scaled(residual, out, scale)


class FastMoEBlock(Fast):
    """Must equal `Qwen3MoeSparseMoeBlock.forward` of Transformers; given a residual, returns residual + scale · that.

    A compiled layer calls the block and does not look into it: one graph break instead of one for every call inside.
    """

    probed = False
    router_name = "gate"
    _shared: Any = None  # hidden states → the output of a shared expert or None; it is added to the experts' sum

    @opaque(stock_block)
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        if residual is None:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts, options = self.experts, {}
        inner, seen = inside_adapters(experts) if isinstance(experts, FastParamWrapper) else (experts, False)
        dispatch = vars(inner).get("forward")
        if isinstance(dispatch, Dispatch):
            options["exchange"] = dispatch.start(x_TH)
            takes_residual = not seen and not watched(inner)
        else:  # ours alone: no foreign wrapper, no other rank and no hook stands before it
            ours = is_experts(inner) and untouched(inner) and inner.config._experts_implementation == NAME
            takes_residual = ours and not seen
        _, weight_TK, ids_TK = getattr(self, self.router_name)(x_TH)
        shared = None if self._shared is None else self._shared(hidden_states)
        if shared is not None:
            residual = add_scaled(residual, shared, scale)
        if takes_residual and residual.dtype == x_TH.dtype:
            scaled_TK = weight_TK if scale == 1 else weight_TK.float() * scale
            return experts(x_TH, ids_TK, scaled_TK, residual=residual, **options)
        return add_scaled(residual, experts(x_TH, ids_TK, weight_TK, **options).view_as(residual), scale)

    @staticmethod
    def why_not(block: Any) -> str | None:
        noisy = getattr(block, "jitter_noise", 0) > 0
        return "its inputs get noise in training (router_jitter_noise)" if noisy else None


class FastRouterMoEBlock(FastMoEBlock):
    """Must equal `GraniteMoeMoE.forward` and `GptOssMLP.forward`, whose gates are called router.

    GPT-OSS's returns (output, routing weights), but the sum alone where it is given a residual.
    """

    router_name = "router"


class FastSharedMoEBlock(FastMoEBlock):
    """Must equal `DeepseekV3MoE.forward` and `Ernie4_5_MoeSparseMoeBlock.forward`, which may have no shared experts."""

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(hidden_states)


class FastSharedMLPMoEBlock(FastMoEBlock):
    """Must equal `HunYuanMoEV1Moe.forward`, whose shared expert has another name."""

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.shared_mlp(hidden_states)


class FastGatedSharedMoEBlock(FastMoEBlock):
    """Must equal `Qwen2MoeSparseMoeBlock.forward`: the shared expert has a gate."""

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)


def add_scaled(residual: torch.Tensor, out: torch.Tensor | tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    """residual + scale · out, the output of a block of experts; of several outputs the first."""
    out = out[0] if isinstance(out, tuple) else out
    return residual + (out if scale == 1 else out * scale)
