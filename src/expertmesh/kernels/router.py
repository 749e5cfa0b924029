"""The router: logits in float32, and one kernel each from logits to (weights, ids) and back.

    logits [T, E] = float(x) float(w)^T                     `router_logits`, bfloat16 x, bfloat16 or float32 w

Products of two bfloat16 numbers are exact in float32. A bfloat16 GEMM that accumulates and writes float32 therefore
equals the float32 GEMM of Transformers, with less time and memory. A float32 number is the sum of three bfloat16
numbers, so a float32 weight becomes three matrices, concatenated in one GEMM. In the backward the float32 gradient of
the logits becomes three for a float32 weight gradient. Otherwise it becomes two (16 bits), as the result is bfloat16
and keeps 8.

    softmax       s = softmax(l); ids = top-k of s (+ bias); w = s[ids],         Qwen, OLMoE, Mixtral; ERNIE
                  optionally ÷ max(Σw, min_sum)
    topk_softmax  ids = top-k of l, w = softmax(l[ids])                          GPT-OSS, Granite
    sigmoid       s = σ(l); ids = top-k of s + bias, within the best groups;     DeepSeek V3, GLM, Nemotron
                  w = s[ids], optionally ÷ (Σw + 1e-20), then × scale

A program handles a few tokens and picks their K best experts one by one; ties go to the lower expert id. Given `ids`
(from a recompute), it computes only the weights. The backward reads the logits again. The choice has no gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from expertmesh.backends import on_gpu, tl, triton, triton_or_reference, warn_once
from expertmesh.kernels.launch import fast_jit


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, E], equal to `F.linear(x.float(), weight.float())`, which also is the fallback."""
    plain = type(weight_EH) in (torch.Tensor, torch.nn.Parameter) and x_TH.dtype == torch.bfloat16
    plain = plain and weight_EH.dtype in (torch.bfloat16, torch.float32)
    if plain and on_gpu(x_TH) and not torch.is_autocast_enabled("cuda") and not torch.compiler.is_compiling():
        return RouterLogits.apply(x_TH, weight_EH)
    if x_TH.is_cuda and x_TH.dtype == torch.bfloat16:
        warn_once("router logits use a slower float32 GEMM: autocast is on, or the weight is not a plain tensor.")
    return F.linear(x_TH.float(), weight_EH.float())


def _mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if on_gpu(a) else a.float() @ b.float()


def _split_bfloat16(x: torch.Tensor, max_parts: int) -> list[torch.Tensor]:
    """Return up to `max_parts` bfloat16 tensors of 8 bits each whose sum approximates x; one if x is bfloat16."""
    parts = [x.to(torch.bfloat16)]
    while x.dtype == torch.float32 and len(parts) < max_parts:
        x = x - parts[-1]
        parts.append(x.to(torch.bfloat16))
    return parts


class RouterLogits(torch.autograd.Function):
    """Autograd function: x [T, H] in bfloat16, weight [E, H] in bfloat16 or float32 → float32 [T, E]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        parts = _split_bfloat16(weight, 3)
        logits = _mm_float32(x, torch.cat(parts).t())
        return logits if len(parts) == 1 else logits.view(len(x), len(parts), -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad
        parts = _split_bfloat16(dlogits, 3 if weight.dtype == torch.float32 and needs_dweight else 2)
        dx = dweight = None
        if needs_dx:  # without low · low, which is below the rounding of dx
            high, *low = _split_bfloat16(weight, 2)
            dx = torch.cat([*parts[:2], *(parts[0] for _ in low)], dim=1) @ torch.cat([high, high, *low])
        if needs_dweight:
            dweight = _mm_float32(torch.cat(parts, dim=1).t(), x).view(len(parts), *weight.shape).sum(0)
            dweight = dweight.to(weight.dtype)
        return dx, dweight


@dataclass(frozen=True)
class Routing:
    """Formula (kind: softmax, topk_softmax or sigmoid) and its options; topk_softmax ignores normalize and min_sum."""

    kind: str
    top_k: int
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    min_sum: float = 0.0


def route_reference(
    logits_TE: torch.Tensor,
    routing: Routing,
    bias_E: torch.Tensor | None = None,
    ids_TK: torch.Tensor | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weights [T, K] in weight_dtype, ids [T, K] int64) for router logits [T, E]. The specification: the same
    operations as in Transformers' routers, in float32.

    bias_E: added to the scores for the choice only. ids_TK: experts to use instead of the best K. See also
    `kernel_supports`.
    """
    logits = logits_TE.float()
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "topk_softmax": lambda x: x}[routing.kind](
        logits
    )
    if ids_TK is None:
        choice = scores.detach() if bias_E is None else scores.detach() + bias_E
        if routing.num_groups > 1:
            grouped = choice.view(choice.shape[0], routing.num_groups, -1)
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            best = torch.topk(group_scores, routing.top_groups, dim=-1).indices
            allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        ids_TK = torch.topk(choice, routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids_TK)
    if routing.kind == "topk_softmax":
        weights = weights.softmax(-1)
    elif routing.normalize:
        total = weights.sum(-1, keepdim=True)
        if routing.min_sum:
            total = total.clamp(min=routing.min_sum)
        weights = weights / (total + (1e-20 if routing.kind == "sigmoid" else 0.0))
    return (weights * routing.scale).to(weight_dtype), ids_TK


def kernel_supports(routing: Routing, num_experts: int) -> bool:
    """Whether the kernel supports this routing: groups, reshaped in registers, need power-of-two number and size."""
    power_of_two = num_experts & (num_experts - 1) == 0 and routing.num_groups & (routing.num_groups - 1) == 0
    return routing.num_groups == 1 or power_of_two


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE, routing: Routing, bias_E, ids_TK, weight_dtype: torch.dtype):
        logits_TE, ids_given = logits_TE.contiguous(), ids_TK is not None
        weights = logits_TE.new_empty(len(logits_TE), routing.top_k, dtype=weight_dtype)
        if not ids_given:
            ids_TK = torch.empty_like(weights, dtype=torch.int64)
        _launch(routing, logits_TE, bias_E, ids_TK, weights, None, ids_given)
        ctx.routing = routing
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.mark_non_differentiable(ids_TK)
        return weights, ids_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights, _):
        logits_TE, ids_TK = ctx.saved_tensors
        dlogits = torch.empty_like(logits_TE)
        _launch(ctx.routing, logits_TE, None, ids_TK, dweights.contiguous(), dlogits, True)
        return dlogits, None, None, None, None


def _route_triton(logits_TE, routing: Routing, bias_E=None, ids_TK=None, weight_dtype=torch.float32) -> Any:
    return _Route.apply(logits_TE, routing, bias_E, ids_TK, weight_dtype)


route = triton_or_reference(_route_triton, route_reference)


def _launch(
    routing: Routing, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, ids_TK: torch.Tensor,
    weights_TK: torch.Tensor, dlogits_TE: torch.Tensor | None, ids_given: bool,
) -> None:  # fmt: skip
    assert routing.kind in ("softmax", "topk_softmax", "sigmoid"), routing.kind
    (num_tokens, num_experts), rows = logits_TE.shape, 4
    _route_kernel[(triton.cdiv(num_tokens, rows),)](
        logits_TE, bias_E, ids_TK, weights_TK, dlogits_TE, num_tokens, num_experts, routing.scale, routing.min_sum,
        KIND=routing.kind, K=routing.top_k, KP=triton.next_power_of_2(routing.top_k), NORMALIZE=routing.normalize,
        GROUPS=routing.num_groups, TOP_GROUPS=routing.top_groups, GIVEN=ids_given, ROWS=rows,
        EP=triton.next_power_of_2(num_experts),
    )  # fmt: skip


@triton.jit
def _keep_best_groups(choice, ROWS: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Set the scores outside the TOP_GROUPS best groups to -inf. A group's score is the sum of its two best."""
    grouped = tl.reshape(choice, (ROWS, GROUPS, EP // GROUPS))
    member = tl.arange(0, EP // GROUPS)[None, None, :]
    best = tl.max(grouped, axis=2)
    first = tl.argmax(grouped, axis=2)
    second = tl.max(tl.where(member == first[:, :, None], float("-inf"), grouped), axis=2)
    group_score = best + second
    group = tl.arange(0, GROUPS)[None, :]
    is_best = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best_group = tl.argmax(group_score, axis=1)[:, None]
        is_best = tl.where(group == best_group, 1, is_best)
        group_score = tl.where(group == best_group, float("-inf"), group_score)
    grouped = tl.where(is_best[:, :, None] == 1, grouped, float("-inf"))
    return tl.reshape(grouped, (ROWS, EP))


@fast_jit
def _route_kernel(
    logits, bias, ids, weights, dlogits, num_tokens, num_experts, scale, min_sum,
    KIND: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Write weights and, unless GIVEN, ids. With dlogits, run the backward: `weights` then holds their gradient."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    slot = tl.arange(0, KP)
    row = token.to(tl.int64)[:, None]
    is_token = (token < num_tokens)[:, None]
    is_expert = (expert < num_experts)[None, :]
    is_slot = (slot < K)[None, :]
    at_weights = weights + row * K + slot[None, :]
    score = tl.load(logits + row * num_experts + expert[None, :], mask=is_token & is_expert, other=0.0).to(tl.float32)
    score = tl.where(is_expert, score, float("-inf"))
    if KIND == "softmax":
        score = tl.exp(score - tl.max(score, axis=1)[:, None])
        score /= tl.sum(score, axis=1)[:, None]
    elif KIND == "sigmoid":
        score = tl.sigmoid(score)
    choice = score
    if bias is not None:
        choice += tl.load(bias + expert, mask=expert < num_experts, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(is_expert, choice, float("-inf"))
    if GROUPS > 1:
        choice = _keep_best_groups(choice, ROWS, EP, GROUPS, TOP_GROUPS)

    picked = tl.zeros((ROWS, KP), tl.float32)
    for k in tl.static_range(K):
        if GIVEN:
            pick = tl.load(ids + token.to(tl.int64) * K + k, mask=token < num_tokens, other=0).to(tl.int32)
        else:
            pick = tl.argmax(choice, axis=1)
            choice = tl.where(expert[None, :] == pick[:, None], float("-inf"), choice)
            tl.store(ids + token.to(tl.int64) * K + k, pick.to(tl.int64), mask=token < num_tokens)
        value = tl.sum(tl.where(expert[None, :] == pick[:, None], score, 0.0), axis=1)
        picked = tl.where(slot[None, :] == k, value[:, None], picked)
    picked_sum = tl.sum(picked, axis=1)[:, None]
    total = tl.maximum(picked_sum, min_sum) + 1e-20
    weight = picked
    if KIND == "topk_softmax":
        top = tl.max(tl.where(is_slot, picked, float("-inf")), axis=1)[:, None]
        weight = tl.where(is_slot, tl.exp(picked - top), 0.0)
        weight /= tl.sum(weight, axis=1)[:, None]
    elif NORMALIZE:
        weight /= total

    if dlogits is None:
        tl.store(at_weights, (weight * scale).to(weights.dtype.element_ty), mask=is_token & is_slot)
    else:
        dvalue = tl.load(at_weights, mask=is_token & is_slot, other=0.0).to(tl.float32) * scale
        if KIND == "topk_softmax":
            dvalue = weight * (dvalue - tl.sum(dvalue * weight, axis=1)[:, None])
        elif NORMALIZE:
            dtotal = tl.sum(dvalue * picked, axis=1)[:, None] / total
            dvalue = (dvalue - tl.where(picked_sum >= min_sum, dtotal, 0.0)) / total
        dscore = tl.zeros((ROWS, EP), tl.float32)
        for k in tl.static_range(K):
            pick = tl.load(ids + token.to(tl.int64) * K + k, mask=token < num_tokens, other=0).to(tl.int32)
            dpick = tl.sum(tl.where(slot[None, :] == k, dvalue, 0.0), axis=1)
            dscore += tl.where(expert[None, :] == pick[:, None], dpick[:, None], 0.0)
        if KIND == "softmax":
            dscore = score * (dscore - tl.sum(dscore * score, axis=1)[:, None])
        elif KIND == "sigmoid":
            dscore *= score * (1.0 - score)
        at = dlogits + row * num_experts + expert[None, :]
        tl.store(at, dscore.to(dlogits.dtype.element_ty), mask=is_token & is_expert)
