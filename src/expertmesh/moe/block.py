"""Fast versions of Transformers' Mixture-of-Experts blocks and of their routers.

The kernel that sums the experts' rows also adds the residual; a shared expert's output is added to the residual first.
A router computes the same logits as the HF router. One kernel then computes the weights and ids. A router returns
(router_logits [T, E], weights [T, K], ids [T, K]) in the dtypes of the HF router. To add a router, write a class here
that uses a `Routing` of kernels/router.py, and list in families/table.py which HF code it equals.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from expertmesh.backends import graph_break
from expertmesh.kernels.recompute import region
from expertmesh.kernels.router import Routing, kernel_supports, route, router_logits
from expertmesh.moe.experts import NAME, Dispatch, is_experts
from expertmesh.moe.lora import FastParamWrapper
from expertmesh.twins import Fast, has_hooks, is_unmodified


def stock_block(
    block: Any, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Return residual + scale · the output of Transformers' forward, which torch.compile can trace into a graph."""
    out = type(block).__stock__.forward(block, hidden_states)
    return out if residual is None else add_scaled(residual, out, scale)


class FastMoEBlock(Fast):
    """Must equal `Qwen3MoeSparseMoeBlock.forward` of Transformers. With a residual, return residual + scale · output.
    torch.compile does not trace the block: one graph break is cheaper than one for each call inside.
    """

    probed = False
    router_name = "gate"
    _shared_output: Any = None  # method: hidden states → output of a shared expert, added to the experts' sum, or None

    @graph_break(stock_block)
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        if residual is None:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        inner = experts = self.experts
        hooked, options = False, {}
        while isinstance(inner, FastParamWrapper):  # hooks on PEFT's wrappers must get unchanged inputs and outputs
            hooked, inner = hooked or has_hooks(inner), inner.base_layer
        dispatch = vars(inner).get("forward")
        if isinstance(dispatch, Dispatch):
            options["exchange"] = None if dispatch.slices else dispatch.transport(dispatch, x_TH, ahead=True)
            takes_residual = not hooked and not has_hooks(inner)
        else:  # fuse the add only if our kernels run directly: no foreign wrapper, no other ranks, no hooks
            ours = is_experts(inner) and is_unmodified(inner) and inner.config._experts_implementation == NAME
            takes_residual = ours and not hooked
        _, weight_TK, ids_TK = getattr(self, self.router_name)(x_TH)
        shared = None if self._shared_output is None else self._shared_output(hidden_states)
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
    """Must equal `GraniteMoeMoE.forward` and `GptOssMLP.forward`, whose routers are named `router`. GPT-OSS's block
    returns (output, routing weights), but only the sum when it gets a residual.
    """

    router_name = "router"


class FastSharedMoEBlock(FastMoEBlock):
    """Must equal `DeepseekV3MoE.forward` and `Ernie4_5_MoeSparseMoeBlock.forward`. Shared experts may be None."""

    def _shared_output(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(hidden_states)


class FastSharedMLPMoEBlock(FastMoEBlock):
    """Must equal `HunYuanMoEV1Moe.forward`, whose shared expert has another name."""

    def _shared_output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.shared_mlp(hidden_states)


class FastGatedSharedMoEBlock(FastMoEBlock):
    """Must equal `Qwen2MoeSparseMoeBlock.forward`: the shared expert has a gate."""

    def _shared_output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)


def add_scaled(residual: torch.Tensor, out: torch.Tensor | tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    """Return residual + scale · out. If a block returns a tuple, `out` is its first element."""
    out = out[0] if isinstance(out, tuple) else out
    return residual + (out if scale == 1 else out * scale)


# breaks the graph because torch.compile cannot read a context variable
@graph_break(
    lambda logits_TE, routing, dtype, bias_E=None: (logits_TE, *route(logits_TE, routing, bias_E, None, dtype))
)
def route_or_replay(
    logits_TE: torch.Tensor, routing: Routing, weight_dtype: torch.dtype, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a router's outputs (logits, weights, ids) for its logits. A recompute reuses the ids of the forward."""
    recorder = region.get()
    recorded_TK = None if recorder is None else recorder.next_choice()
    weight_TK, ids_TK = route(logits_TE, routing, bias_E, recorded_TK, weight_dtype)
    if recorder is not None and recorded_TK is None:
        recorder.choices.append(ids_TK)
    return logits_TE, weight_TK, ids_TK


class FastSoftmaxRouter(Fast):
    """Softmax over all experts, then top-k, normalised if `norm_topk_prob` is set. Weights have the logits' dtype."""

    always_normalize = False
    float32_weights = False

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        routing = Routing("softmax", self.top_k, self.always_normalize or self.norm_topk_prob)
        return route_or_replay(logits_TE, routing, torch.float32 if self.float32_weights else logits_TE.dtype)


class FastNormalizedSoftmaxRouter(FastSoftmaxRouter):
    """`FastSoftmaxRouter` that always normalises (Qwen3.5, Qwen3-VL)."""

    always_normalize = True


class FastMixtralRouter(FastNormalizedSoftmaxRouter):
    """`FastNormalizedSoftmaxRouter` with float32 weights (Mixtral, MiniMax)."""

    float32_weights = True


class FastTopKSoftmaxRouter(Fast):
    """Top-k of the logits, then softmax over the chosen experts (GPT-OSS)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states, self.weight, self.bias)
        return route_or_replay(logits_TE, Routing("topk_softmax", self.top_k), logits_TE.dtype)


class FastGraniteRouter(Fast):
    """Top-k of float32 logits, then softmax over the chosen. Weights have the hidden states' dtype (Granite)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states, self.weight).float()
        return route_or_replay(logits_TE, Routing("topk_softmax", self.top_k), hidden_states.dtype)


class FastErnieRouter(Fast):
    """Float32 softmax, top-k of the biased scores, weights divided by max(sum, `norm_min`) (ERNIE 4.5)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits_TE = F.linear(hidden_states.float(), self.weight.float())
        bias_E = self.moe_statics(logits_TE.new_zeros(())).detach()  # calling the module lets FSDP gather it
        routing = Routing("softmax", self.top_k, normalize=True, min_sum=self.norm_min)
        return route_or_replay(logits_TE, routing, hidden_states.dtype, bias_E)


class FastHunYuanRouter(Fast):
    """Softmax, then top-k, normalised. The logits are float32 if the gate's weight is (HunYuan)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.wg(hidden_states.float() if self.wg.weight.dtype == torch.float32 else hidden_states)
        return route_or_replay(logits_TE, Routing("softmax", self.top_k, normalize=True), logits_TE.dtype)


class FastSigmoidRouter(Fast):
    """Sigmoid scores, group-limited top-k of the biased scores, all in float32 (DeepSeek V3, GLM, Nemotron)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = router_logits(hidden_states.view(-1, self.hidden_dim), self.weight)
        return route_or_replay(logits_TE, sigmoid_routing(self), torch.float32, self.e_score_correction_bias)

    @staticmethod
    def why_not(router: Any) -> str | None:
        if kernel_supports(sigmoid_routing(router), router.num_experts):
            return None
        return f"{router.num_experts} experts in {router.num_group} groups: the kernel needs powers of two"


def sigmoid_routing(router: Any) -> Routing:
    """Return the `Routing` for the attributes of a DeepSeek-V3-like router module."""
    groups = router.num_group, router.topk_group
    return Routing("sigmoid", router.top_k, router.norm_topk_prob, router.routed_scaling_factor, *groups)


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the modules whose `router_logits` Transformers records, in the order of the layers."""
    kinds: list[tuple[type, str]] = []
    for module in model.modules():
        recorded = module.can_record_outputs.get("router_logits", []) if isinstance(module, PreTrainedModel) else []
        for entry in recorded if isinstance(recorded, list) else [recorded]:
            target = entry if isinstance(entry, OutputRecorder) else OutputRecorder(entry)
            if isinstance(target.target_class, type):
                kinds.append((target.target_class, f".{target.layer_name}." if target.layer_name else ""))
    for name, module in model.named_modules():
        if any(isinstance(module, kind) and part in f".{name}." for kind, part in kinds):
            yield name, module


@contextmanager
def aux_loss_share(model: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Context manager that weights the auxiliary loss by this micro-batch's share of the batch's labelled tokens.

    Transformers adds the full `coef * aux` to the loss of each micro-batch, but divides the main loss by
    `num_items_in_batch`. Without this, the auxiliary loss grows with world size and gradient accumulation.
    """
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    coef = getattr(model, "router_aux_loss_coef", None)
    if labels is None or num_items is None or coef is None:
        yield
        return
    shifted = inputs.get("shift_labels")
    targets = labels[..., 1:] if shifted is None else shifted
    if torch.is_tensor(num_items):
        num_items = num_items.to(targets.device)
    share = ((targets != -100).sum() / num_items).nan_to_num(nan=1.0, posinf=torch.inf)  # 0/0: as in Transformers
    model.router_aux_loss_coef = coef * share
    try:
        yield
    finally:
        model.router_aux_loss_coef = coef
