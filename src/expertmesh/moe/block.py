"""Fast twins of Transformers' Mixture-of-Experts blocks and of the routers in them.

The residual add behind a block happens where the experts' rows are summed; a shared expert's output is added to the
residual before. A router makes the same logits, then one kernel weights and ids. It returns what the HF router returns,
(router_logits [T, E], weights [T, K], ids [T, K]), in the same dtypes. To add a router, write a class here, of
which the formula is a `Routing` of kernels/router.py; families/table.py says which HF code it equals.
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

    @graph_break(stock_block)
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        if residual is None:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        inner = experts = self.experts
        seen, options = False, {}
        while isinstance(inner, FastParamWrapper):  # around the experts; a hook on one needs what goes in and comes out
            seen, inner = seen or has_hooks(inner), inner.base_layer
        dispatch = vars(inner).get("forward")
        if isinstance(dispatch, Dispatch):
            options["exchange"] = None if dispatch.slices else dispatch.transport(dispatch, x_TH, ahead=True)
            takes_residual = not seen and not has_hooks(inner)
        else:  # ours alone: no foreign wrapper, no other rank and no hook stands before it
            ours = is_experts(inner) and is_unmodified(inner) and inner.config._experts_implementation == NAME
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
    """Must equal `GraniteMoeMoE.forward` and `GptOssMLP.forward`, whose gates are called router; GPT-OSS's returns
    (output, routing weights), but the sum alone where it is given a residual.
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


# opaque, as it reads a context variable, which no graph can
@graph_break(
    lambda logits_TE, routing, dtype, bias_E=None: (logits_TE, *route(logits_TE, routing, bias_E, None, dtype))
)
def routed(
    logits_TE: torch.Tensor, routing: Routing, weight_dtype: torch.dtype, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router returns, of its logits: (logits, weights, ids); in a recompute with the ids of the forward."""
    here = region.get()
    known_TK = None if here is None else here.next_choice()
    weight_TK, ids_TK = route(logits_TE, routing, bias_E, known_TK, weight_dtype)
    if here is not None and known_TK is None:
        here.choices.append(ids_TK)
    return logits_TE, weight_TK, ids_TK


class FastSoftmaxRouter(Fast):
    """Softmax over all experts, then top-k, normalised if `norm_topk_prob` says so; weights in the logits' dtype."""

    always_normalize = False
    float32_weights = False

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        routing = Routing("softmax", self.top_k, self.always_normalize or self.norm_topk_prob)
        return routed(logits_TE, routing, torch.float32 if self.float32_weights else logits_TE.dtype)


class FastNormalizedSoftmaxRouter(FastSoftmaxRouter):
    """The same, always normalised (Qwen3.5, Qwen3-VL)."""

    always_normalize = True


class FastMixtralRouter(FastNormalizedSoftmaxRouter):
    """The same, with float32 weights (Mixtral, MiniMax)."""

    float32_weights = True


class FastTopKSoftmaxRouter(Fast):
    """Top-k of the logits, softmax over the chosen (GPT-OSS)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states, self.weight, self.bias)
        return routed(logits_TE, Routing("topk_softmax", self.top_k), logits_TE.dtype)


class FastGraniteRouter(Fast):
    """Top-k of float32 logits, softmax over the chosen, weights in the hidden states' dtype (Granite)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = F.linear(hidden_states, self.weight).float()
        return routed(logits_TE, Routing("topk_softmax", self.top_k), hidden_states.dtype)


class FastErnieRouter(Fast):
    """Softmax in float32, biased choice, weights divided by at least `norm_min` (ERNIE 4.5)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits_TE = F.linear(hidden_states.float(), self.weight.float())
        bias_E = self.moe_statics(logits_TE.new_zeros(())).detach()  # called: its parameter may be sharded
        routing = Routing("softmax", self.top_k, normalize=True, min_sum=self.norm_min)
        return routed(logits_TE, routing, hidden_states.dtype, bias_E)


class FastHunYuanRouter(Fast):
    """Logits of a Linear, in float32 if that is; softmax, top-k, normalised (HunYuan)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.wg(hidden_states.float() if self.wg.weight.dtype == torch.float32 else hidden_states)
        return routed(logits_TE, Routing("softmax", self.top_k, normalize=True), logits_TE.dtype)


class FastSigmoidRouter(Fast):
    """Sigmoid scores, biased and group-limited choice, float32 throughout (DeepSeek V3, GLM, Nemotron)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = router_logits(hidden_states.view(-1, self.hidden_dim), self.weight)
        return routed(logits_TE, sigmoid_routing(self), torch.float32, self.e_score_correction_bias)

    @staticmethod
    def why_not(router: Any) -> str | None:
        if kernel_supports(sigmoid_routing(router), router.num_experts):
            return None
        return f"{router.num_experts} experts in {router.num_group} groups: the kernel needs powers of two"


def sigmoid_routing(router: Any) -> Routing:
    """The `Routing` that a DeepSeek-V3-like router module describes."""
    groups = router.num_group, router.topk_group
    return Routing("sigmoid", router.top_k, router.norm_topk_prob, router.routed_scaling_factor, *groups)


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The routers of a model as (name, module), in the order of the layers.

    They are the modules of which transformers records `router_logits`; a model that declares none has no routers.
    """
    kinds: list[tuple[type, str]] = []
    for module in model.modules():
        recorded = module.can_record_outputs.get("router_logits", []) if isinstance(module, PreTrainedModel) else []
        for one in recorded if isinstance(recorded, list) else [recorded]:
            target = one if isinstance(one, OutputRecorder) else OutputRecorder(one)
            if isinstance(target.target_class, type):
                kinds.append((target.target_class, f".{target.layer_name}." if target.layer_name else ""))
    for name, module in model.named_modules():
        if any(isinstance(module, kind) and place in f".{name}." for kind, place in kinds):
            yield name, module


@contextmanager
def aux_loss_share(model: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Weight the router's auxiliary loss by this microbatch's share of the batch's labelled tokens.

    Transformers adds `coef * aux` to each microbatch's loss whole, though the loss proper is a sum over microbatches
    and ranks divided by `num_items_in_batch`: the auxiliary part grows with world size and gradient accumulation.
    """
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    coef = getattr(model, "router_aux_loss_coef", None)
    if labels is None or num_items is None or coef is None:
        yield
        return
    shifted = inputs.get("shift_labels")
    counted = labels[..., 1:] if shifted is None else shifted
    if torch.is_tensor(num_items):
        num_items = num_items.to(counted.device)
    share = ((counted != -100).sum() / num_items).nan_to_num(nan=1.0, posinf=torch.inf)  # 0 of 0: stock's
    model.router_aux_loss_coef = coef * share
    try:
        yield
    finally:
        model.router_aux_loss_coef = coef
