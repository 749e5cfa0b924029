"""From router logits to (weights, ids), in one kernel, and back.

    softmax       s = softmax(l); ids = top-k of s (+ bias); w = s[ids],         Qwen, OLMoE, Mixtral; ERNIE
                  optionally ÷ max(Σw, min_sum)
    topk_softmax  ids = top-k of l, w = softmax(l[ids])                          GPT-OSS, Granite
    sigmoid       s = σ(l); ids = top-k of s + bias, within the best groups;     DeepSeek V3, GLM, Nemotron
                  w = s[ids], optionally ÷ (Σw + 1e-20), then × scale

One program handles a few tokens: it reads their logits once and picks the K best one after the other; equal scores go
to the lower expert. Given `ids`, the choice is taken from there and only the weights are computed (replay in a
recompute). The backward reads the logits again and writes their gradient in one pass; the choice itself has no
gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched


@dataclass(frozen=True)
class Routing:
    """How logits become weights and ids. kind: softmax, topk_softmax or sigmoid; the rest as in the formulas above."""

    kind: str
    top_k: int
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    min_sum: float = 0.0


def route(
    logits_TE: torch.Tensor,
    routing: Routing,
    bias_E: torch.Tensor | None = None,
    ids_TK: torch.Tensor | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] in weight_dtype, ids [T, K] int64) of router logits [T, E].

    bias_E: added to the scores for the choice only. ids_TK: take this choice instead of the best K. Math in
    float32. On the Triton path the number of groups and of experts per group must be powers of two (or one group).
    """
    if use_triton(logits_TE):
        return _Route.apply(logits_TE, bias_E, ids_TK, routing, weight_dtype)
    return route_reference(logits_TE, routing, bias_E, ids_TK, weight_dtype)


def route_reference(
    logits_TE: torch.Tensor,
    routing: Routing,
    bias_E: torch.Tensor | None = None,
    ids_TK: torch.Tensor | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `route`, op for op as Transformers' routers do it."""
    logits = logits_TE.float()
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "topk_softmax": lambda x: x}[routing.kind](
        logits
    )
    if ids_TK is None:
        ids_TK = torch.topk(_choice_scores(scores.detach(), routing, bias_E), routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids_TK)
    if routing.kind == "topk_softmax":
        weights = weights.softmax(-1)
    elif routing.normalize:
        total = weights.sum(-1, keepdim=True)
        if routing.min_sum:
            total = total.clamp(min=routing.min_sum)
        weights = weights / (total + (1e-20 if routing.kind == "sigmoid" else 0.0))
    return (weights * routing.scale).to(weight_dtype), ids_TK


def _choice_scores(scores: torch.Tensor, routing: Routing, bias_E: torch.Tensor | None) -> torch.Tensor:
    if bias_E is not None:
        scores = scores + bias_E
    if routing.num_groups > 1:
        grouped = scores.view(scores.shape[0], routing.num_groups, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = torch.topk(group_scores, routing.top_groups, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
    return scores


def kernel_supports(routing: Routing, num_experts: int) -> bool:
    """Whether the Triton path can run this routing: groups are reshaped in registers, which needs powers of two."""
    power_of_two = num_experts & (num_experts - 1) == 0 and routing.num_groups & (routing.num_groups - 1) == 0
    return routing.num_groups == 1 or power_of_two


_ROWS = 4


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE, bias_E, ids_TK, routing: Routing, weight_dtype: torch.dtype):
        num_tokens, num_experts = logits_TE.shape
        logits_TE = logits_TE.contiguous()
        given = ids_TK is not None
        weights = logits_TE.new_empty(num_tokens, routing.top_k, dtype=weight_dtype)
        if not given:
            ids_TK = torch.empty(num_tokens, routing.top_k, dtype=torch.int64, device=logits_TE.device)
        _route_kernel[(triton.cdiv(num_tokens, _ROWS),)](
            logits_TE,
            bias_E,
            weights,
            ids_TK,
            num_tokens,
            num_experts,
            routing.scale,
            routing.min_sum,
            KIND=routing.kind,
            K=routing.top_k,
            KP=triton.next_power_of_2(routing.top_k),
            NORMALIZE=routing.normalize,
            GROUPS=routing.num_groups,
            TOP_GROUPS=routing.top_groups,
            HAS_BIAS=bias_E is not None,
            GIVEN=given,
            ROWS=_ROWS,
            EP=triton.next_power_of_2(num_experts),
        )
        ctx.routing = routing
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.mark_non_differentiable(ids_TK)
        return weights, ids_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights, _):
        logits_TE, ids_TK = ctx.saved_tensors
        routing = ctx.routing
        num_tokens, num_experts = logits_TE.shape
        dlogits = torch.empty_like(logits_TE)
        _route_backward_kernel[(triton.cdiv(num_tokens, _ROWS),)](
            logits_TE,
            ids_TK,
            dweights.contiguous(),
            dlogits,
            num_tokens,
            num_experts,
            routing.scale,
            routing.min_sum,
            KIND=routing.kind,
            K=routing.top_k,
            KP=triton.next_power_of_2(routing.top_k),
            NORMALIZE=routing.normalize,
            ROWS=_ROWS,
            EP=triton.next_power_of_2(num_experts),
        )
        return dlogits, None, None, None, None


@triton.jit
def _scores(logits, KIND: tl.constexpr):
    """Scores [ROWS, EP] in float32; padding columns hold -inf logits."""
    if KIND == "softmax":
        e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return e / tl.sum(e, axis=1)[:, None]
    elif KIND == "sigmoid":
        return tl.sigmoid(logits)
    else:
        return logits


@triton.jit
def _keep_best_groups(choice, ROWS: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Set the choice scores of all but the TOP_GROUPS groups with the largest sum of two best scores to -inf."""
    grouped = tl.reshape(choice, (ROWS, GROUPS, EP // GROUPS))
    member = tl.arange(0, EP // GROUPS)[None, None, :]
    best = tl.max(grouped, axis=2)
    first = tl.argmax(grouped, axis=2)
    second = tl.max(tl.where(member == first[:, :, None], float("-inf"), grouped), axis=2)
    group_score = best + second
    group = tl.arange(0, GROUPS)[None, :]
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        winner = tl.argmax(group_score, axis=1)[:, None]
        kept = tl.where(group == winner, 1, kept)
        group_score = tl.where(group == winner, float("-inf"), group_score)
    grouped = tl.where(kept[:, :, None] == 1, grouped, float("-inf"))
    return tl.reshape(grouped, (ROWS, EP))


@launched
def _route_kernel(
    logits, bias, weights, ids, num_tokens, num_experts, scale, min_sum,
    KIND: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    slot = tl.arange(0, KP)
    row = token.to(tl.int64)[:, None]
    in_row = (token < num_tokens)[:, None]
    real = (expert < num_experts)[None, :]
    logit = tl.load(logits + row * num_experts + expert[None, :], mask=in_row & real, other=0.0).to(tl.float32)
    score = _scores(tl.where(real, logit, float("-inf")), KIND)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=expert < num_experts, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        choice = _keep_best_groups(choice, ROWS, EP, GROUPS, TOP_GROUPS)

    weight = tl.zeros((ROWS, KP), tl.float32)
    for k in tl.static_range(K):
        if GIVEN:
            pick = tl.load(ids + token.to(tl.int64) * K + k, mask=token < num_tokens, other=0).to(tl.int32)
        else:
            pick = tl.argmax(choice, axis=1)
            choice = tl.where(expert[None, :] == pick[:, None], float("-inf"), choice)
            tl.store(ids + token.to(tl.int64) * K + k, pick.to(tl.int64), mask=token < num_tokens)
        value = tl.sum(tl.where(expert[None, :] == pick[:, None], score, 0.0), axis=1)
        weight = tl.where(slot[None, :] == k, value[:, None], weight)
    used = (slot < K)[None, :]
    if KIND == "topk_softmax":
        top = tl.max(tl.where(used, weight, float("-inf")), axis=1)[:, None]
        weight = tl.where(used, tl.exp(weight - top), 0.0)
        weight /= tl.sum(weight, axis=1)[:, None]
    elif NORMALIZE:
        weight /= tl.maximum(tl.sum(weight, axis=1)[:, None], min_sum) + 1e-20
    tl.store(weights + row * K + slot[None, :], (weight * scale).to(weights.dtype.element_ty), mask=in_row & used)


@launched
def _route_backward_kernel(
    logits, ids, dweights, dlogits, num_tokens, num_experts, scale, min_sum,
    KIND: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    slot = tl.arange(0, KP)
    row = token.to(tl.int64)[:, None]
    in_row = (token < num_tokens)[:, None]
    real = (expert < num_experts)[None, :]
    logit = tl.load(logits + row * num_experts + expert[None, :], mask=in_row & real, other=0.0).to(tl.float32)
    score = _scores(tl.where(real, logit, float("-inf")), KIND)
    used = (slot < K)[None, :]
    dw = tl.load(dweights + row * K + slot[None, :], mask=in_row & used, other=0.0).to(tl.float32) * scale

    picked = tl.zeros((ROWS, KP), tl.float32)
    for k in tl.static_range(K):
        pick = tl.load(ids + token.to(tl.int64) * K + k, mask=token < num_tokens, other=0).to(tl.int32)
        value = tl.sum(tl.where(expert[None, :] == pick[:, None], score, 0.0), axis=1)
        picked = tl.where(slot[None, :] == k, value[:, None], picked)
    if KIND == "topk_softmax":
        top = tl.max(tl.where(used, picked, float("-inf")), axis=1)[:, None]
        weight = tl.where(used, tl.exp(picked - top), 0.0)
        weight /= tl.sum(weight, axis=1)[:, None]
        dvalue = weight * (dw - tl.sum(dw * weight, axis=1)[:, None])
    elif NORMALIZE:
        picked_sum = tl.sum(picked, axis=1)[:, None]
        total = tl.maximum(picked_sum, min_sum) + 1e-20
        dtotal = tl.where(picked_sum >= min_sum, tl.sum(dw * picked, axis=1)[:, None] / total, 0.0)
        dvalue = (dw - dtotal) / total
    else:
        dvalue = dw

    dscore = tl.zeros((ROWS, EP), tl.float32)
    for k in tl.static_range(K):
        pick = tl.load(ids + token.to(tl.int64) * K + k, mask=token < num_tokens, other=0).to(tl.int32)
        mine = tl.sum(tl.where(slot[None, :] == k, dvalue, 0.0), axis=1)
        dscore += tl.where(expert[None, :] == pick[:, None], mine[:, None], 0.0)
    if KIND == "softmax":
        dl = score * (dscore - tl.sum(dscore * score, axis=1)[:, None])
    elif KIND == "sigmoid":
        dl = dscore * score * (1.0 - score)
    else:
        dl = dscore
    tl.store(dlogits + row * num_experts + expert[None, :], dl.to(dlogits.dtype.element_ty), mask=in_row & real)
