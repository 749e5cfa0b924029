"""AdamW on all tensors in one pass over memory: one launch, behind a small one for what a tensor's elements share.

    p -= lr decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g g
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, in the order in which `torch.optim.AdamW(fused=True)` computes
it: in float32, each result rounded once. g is the gradient times a scale that stays on the device, so that clipping
costs no pass of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels import tensor_lists
from expertmesh.kernels.launch import launched
from expertmesh.kernels.tensor_lists import base, chunk_of, elements, store

OPTIONS = {"BLOCK": 1024, "num_warps": 4}
SHARED = 10  # float32 numbers that the elements of a tensor share


class Update(NamedTuple):
    """What one parameter's step takes: dense tensors of one shape, the count of steps (float32 scalar) beside them, and
    its group's options under PyTorch's names: lr (a float or scalar), betas, eps, weight_decay, maximize.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    options: Mapping[str, Any]


def adamw_(updates: Sequence[Update], scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None) -> None:
    """One step in place, without a sync. Gradients are only read, and used `scale` times as large.

    scale, found_inf: float32 scalars on a device; where found_inf is not 0 nothing changes, no count of steps either.
    """
    together, others = tensor_lists.launches(update[:4] for update in updates)
    for (device, *_, aligned), members in together.items():
        with torch.cuda.device_of(updates[members[0]].weight):
            on_device = [None if x is None else x.to(device, non_blocking=True) for x in (scale, found_inf)]
            _launch([updates[i] for i in members], device, aligned, *on_device)
    adamw_reference_([updates[i] for i in others], scale, found_inf)


def adamw_reference_(
    updates: Sequence[Update], scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> None:
    """The specification of `adamw_`: PyTorch's fused AdamW, in float32 or wider."""
    for *tensors, step, options in updates:
        weight, lr = tensors[0], options["lr"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        used = [x.to(wide).contiguous() for x in tensors]
        if scale is not None:
            used[1] = used[1] * scale.to(weight.device, non_blocking=True)
        if isinstance(lr, torch.Tensor) and not lr.is_cpu:
            lr = lr.to(weight.device, torch.float32)
        found = None if found_inf is None else (found_inf != 0).to(weight.device, torch.float32)
        step += 1
        beta1, beta2 = options["betas"]
        rest = {name: options[name] for name in ("weight_decay", "eps", "maximize")}
        p, g, m, v = ([x] for x in used)
        torch._fused_adamw_(
            p, g, m, v, [], [step], lr=lr, beta1=beta1, beta2=beta2, amsgrad=False, found_inf=found, **rest
        )
        if found is not None:
            step -= found
        for i in (0, 2, 3):
            tensors[i].copy_(used[i])  # nothing to do where it is the same memory


def _launch(
    updates: list[Update], device: torch.device, aligned: bool, scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:  # fmt: skip
    groups = {id(update.options): update.options for update in updates}
    number = {key: i for i, key in enumerate(groups)}
    counts = [update.weight.numel() for update in updates]
    rows = [[*(x.data_ptr() for x in update[:5]), number[id(update.options)]] for update in updates]
    of_chunk, table, options = tensor_lists.on_device(counts, rows, device, [_numbers(g) for g in groups.values()])
    for row, group in zip(options, groups.values(), strict=True):
        if isinstance(group["lr"], torch.Tensor) and not group["lr"].is_cpu:
            row[0].copy_(group["lr"], non_blocking=True)
    shared = torch.empty(len(updates), SHARED, dtype=torch.float32, device=device)
    _prepare_kernel[(len(updates),)](table, options, updates[0].step, scale, found_inf, shared, num_warps=1)
    if len(of_chunk):
        constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, **OPTIONS}
        _adamw_kernel[(len(of_chunk),)](of_chunk, table, shared, *updates[0][:4], **constants)


def _numbers(group: Mapping[str, Any]) -> list[float]:
    lr, betas = group["lr"], [float(beta) for beta in group["betas"]]
    lr = float(lr) if not isinstance(lr, torch.Tensor) or lr.is_cpu else math.nan  # another device's: put in there
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    return [lr, *betas, *logs, group["eps"], group["weight_decay"], -1.0 if group["maximize"] else 1.0]


@launched
def _prepare_kernel(table, numbers, like, scale, found_inf, shared):
    """Counts the step of one tensor and writes what its elements share, computed in float64."""
    row = table + tl.program_id(0) * 9
    of_group = numbers + tl.load(row + 8) * 8
    to = shared + tl.program_id(0) * 10
    lr, beta1, beta2 = tl.load(of_group), tl.load(of_group + 1), tl.load(of_group + 2)
    counter = tl.load(row + 7).to(like.dtype)
    step = tl.load(counter) + 1.0
    skip = 0.0
    if found_inf is not None:
        skip = tl.where(tl.load(found_inf) != 0.0, 1.0, 0.0)
    tl.store(counter, step - skip)
    factor = tl.load(of_group + 7).to(tl.float32)
    if scale is not None:
        factor *= tl.load(scale)
    tl.store(to, lr / (1.0 - tl.exp(step.to(tl.float64) * tl.load(of_group + 3))))
    tl.store(to + 1, 1.0 / tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * tl.load(of_group + 4))))
    tl.store(to + 2, lr * tl.load(of_group + 6))
    tl.store(to + 3, beta1)
    tl.store(to + 4, 1.0 - beta1)
    tl.store(to + 5, beta2)
    tl.store(to + 6, 1.0 - beta2)
    tl.store(to + 7, tl.load(of_group + 5))
    tl.store(to + 8, factor)
    tl.store(to + 9, skip)


@launched
def _adamw_kernel(
    of_chunk, table, shared, weight_like, grad_like, avg_like, square_like,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, count = chunk_of(of_chunk, table, 9, CHUNK)
    shared += tensor * 10
    if tl.load(shared + 9) == 0.0:
        weight, grad = base(tl.load(row + 3), start, weight_like), base(tl.load(row + 4), start, grad_like)
        avg, square = base(tl.load(row + 5), start, avg_like), base(tl.load(row + 6), start, square_like)
        bases = weight, grad, avg, square
        step_size, correction, decay = tl.load(shared), tl.load(shared + 1), tl.load(shared + 2)
        betas = tl.load(shared + 3), tl.load(shared + 4), tl.load(shared + 5), tl.load(shared + 6)
        numbers = step_size, correction, decay, betas, tl.load(shared + 7), tl.load(shared + 8)
        lane = tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK  # without a mask loads and stores are wide
        for begin in range(0, whole, BLOCK):
            _update(bases, begin + lane, None, numbers, ALIGNED)
        if whole < count:
            _update(bases, whole + lane, whole + lane < count, numbers, ALIGNED)


@triton.jit
def _update(bases, at, mask, numbers, ALIGNED: tl.constexpr):
    """One step of the elements `at` [BLOCK] of a chunk."""
    step_size, correction, decay, betas, eps, scale = numbers
    weight_at, grad_at = elements(bases[0], at, ALIGNED), elements(bases[1], at, ALIGNED)
    avg_at, square_at = elements(bases[2], at, ALIGNED), elements(bases[3], at, ALIGNED)
    # nothing is read twice, so nothing need stay in the caches
    weight = tl.load(weight_at, mask=mask, eviction_policy="evict_first").to(tl.float32)
    grad = tl.load(grad_at, mask=mask, eviction_policy="evict_first").to(tl.float32) * scale
    avg = tl.load(avg_at, mask=mask, eviction_policy="evict_first").to(tl.float32)
    square = tl.load(square_at, mask=mask, eviction_policy="evict_first").to(tl.float32)
    weight -= decay * weight
    avg = betas[0] * avg + betas[1] * grad
    square = betas[2] * square + betas[3] * grad * grad
    weight -= step_size * avg / (tl.sqrt_rn(square) * correction + eps)
    store(weight_at, weight, mask)
    store(avg_at, avg, mask)
    store(square_at, square, mask)
