"""Fast twins of Transformers' routers: the same logits, then one kernel for weights and ids.

Each returns what the HF router returns, (router_logits [T, E], weights [T, K], ids [T, K]), in the same dtypes. On
the CPU the kernel's place is taken by its PyTorch reference.

A router run again in the backward can flip near-ties: the recomputed layer then sends tokens to other experts than the
forward did, which breaks activation checkpointing ("recomputed tensors have different metadata") or, worse, the
gradients. So the choice of experts is recorded when a checkpointed layer first runs and replayed when it is recomputed.
`keep_routing` goes in as the `context_fn` of `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; a fused model
does that by itself when `activation_checkpointing_enable()` is called.

To add a router, write a class here; families/table.py says which HF code it equals. Its formula is a `Routing` of
kernels/router.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from expertmesh.backends import opaque
from expertmesh.kernels.router import Routing, kernel_supports, route
from expertmesh.kernels.router_logits import router_logits
from expertmesh.twins import Fast

Decision = TypeVar("Decision")

_region: ContextVar["Region | None"] = ContextVar("routing_region", default=None)


class Region:
    """One run, first or repeated, of a checkpointed function; the runs of one call share the list of choices."""

    def __init__(self, choices: list[Any], replay: bool) -> None:
        self.choices, self.replay, self.position = choices, replay, 0
        self._tokens: list[Token] = []

    def __enter__(self) -> None:
        self.position = 0
        self._tokens.append(_region.set(self))

    def __exit__(self, *_: object) -> None:
        _region.reset(self._tokens.pop())

    def known(self) -> Any:
        """In a recompute the forward's next choice; else None, and it is to be put among the `choices`."""
        if not self.replay:
            return None
        self.position += 1
        return self.choices[self.position - 1]


def keep_routing() -> tuple[Region, Region]:
    """(forward context, recompute context) for one call of `torch.utils.checkpoint.checkpoint`."""
    choices: list[Any] = []
    return Region(choices, replay=False), Region(choices, replay=True)


def kept(decide: Callable[[], Decision]) -> Decision:
    """`decide()`; in a recompute what it returned in the forward, without calling it again."""
    region = _region.get()
    known = None if region is None else region.known()
    if known is None:
        known = decide()
        if region is not None:
            region.choices.append(known)
    return known


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The routers of a model as (name, module), in the order of the layers.

    They are the modules of which transformers records `router_logits`; a model that declares none has no routers.
    """
    targets: list[OutputRecorder] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            for target in recorded if isinstance(recorded, list) else [recorded]:
                targets.append(target if isinstance(target, OutputRecorder) else OutputRecorder(target))
    for name, module in model.named_modules():
        for target in targets:
            of_class = isinstance(target.target_class, type) and isinstance(module, target.target_class)
            if of_class and (target.layer_name is None or f".{target.layer_name}." in f".{name}."):
                yield name, module
                break


def _first_time(
    logits_TE: torch.Tensor, routing: Routing, weight_dtype: torch.dtype, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return logits_TE, *route(logits_TE, routing, bias_E, None, weight_dtype)


@opaque(_first_time)  # it reads a context variable, which no graph can
def routed(
    logits_TE: torch.Tensor, routing: Routing, weight_dtype: torch.dtype, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router returns, of its logits: (logits, weights, ids); in a recompute with the ids of the forward."""
    region = _region.get()
    known_TK = None if region is None else region.known()
    weight_TK, ids_TK = route(logits_TE, routing, bias_E, known_TK, weight_dtype)
    if region is not None and known_TK is None:
        region.choices.append(ids_TK)
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
    return Routing(
        "sigmoid",
        router.top_k,
        router.norm_topk_prob,
        router.routed_scaling_factor,
        router.num_group,
        router.topk_group,
    )


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
