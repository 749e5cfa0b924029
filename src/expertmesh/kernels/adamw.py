"""AdamW on all tensors in one pass over memory: one launch, behind a small one for what a tensor's elements share.

    p -= lr decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g g
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, in the order in which `torch.optim.AdamW(fused=True)` computes
it: in float32, each result rounded once. g is the gradient times a scale that stays on the device, so that clipping
costs no pass of its own. Moments may have 8 bits (block_quant.py), of which a program holds whole blocks, and weights
may be rounded stochastically, or kept more exactly beside the model's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels import block_quant, tensor_lists
from expertmesh.kernels.block_quant import decode, encode, joined, largest, parted, rounded, words
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.tensor_lists import base, chunk_of, elements, moving_base, store

OPTIONS = {"STAGES": 1, "BLOCK": 1024, "num_warps": 4}
#: with moments in 8 bits: BLOCK is a whole number of blocks, and what later passes need is read beside this one's many
#: instructions, which on an H200 is worth 15 to 20 % of the copy rate
BLOCK_OPTIONS = {"STAGES": 3, "BLOCK": 1024, "num_warps": 4}
SHARED = 10  # float32 numbers that the elements of a tensor share
Scalar = torch.Tensor | None  # float32, on a device


class Update(NamedTuple):
    """What one parameter's step takes: dense tensors of one shape, the count of steps (float32 scalar) beside them, and
    its group's options under PyTorch's names: lr (a float or scalar), betas, eps, weight_decay, maximize.

    master: what is stepped in a bfloat16 weight's place, in float32, or 8 bits that the weight lacks, in int8.
    scales: of exp_avg and exp_avg_sq, then codes as `quantize` makes them; a bfloat16 weight without a master is
    then rounded stochastically. stream, first: whose random numbers, and from which place on (`random_words`).
    """

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    options: Mapping[str, Any]
    master: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    stream: int = 0
    first: int = 0

    @property
    def size(self) -> int:
        """Elements of a block; 0: the moments are floats."""
        return self.exp_avg.shape[-1] // self.scales[0].shape[-1] if self.scales else 0


def adamw_(updates: Sequence[Update], scale: Scalar = None, found_inf: Scalar = None) -> None:
    """One step in place, without a sync. Gradients are only read, and used `scale` times as large.

    scale, found_inf: float32 scalars on a device; where found_inf is not 0 nothing changes, no count of steps either.
    """
    for size in dict.fromkeys(update.size for update in updates):
        alike = [update for update in updates if update.size == size]
        together, others = tensor_lists.launches([x for x in (*u[:4], u.master) if x is not None] for u in alike)
        for (device, *_, aligned), members in together.items():
            with torch.cuda.device_of(alike[members[0]].weight):
                on_device = [None if x is None else x.to(device, non_blocking=True) for x in (scale, found_inf)]
                _launch([alike[i] for i in members], size, device, aligned, *on_device)
        adamw_reference_([alike[i] for i in others], scale, found_inf)


def adamw_reference_(updates: Sequence[Update], scale: Scalar = None, found_inf: Scalar = None) -> None:
    """The specification of `adamw_`: PyTorch's fused AdamW, in float32 or wider."""
    for update in updates:
        weight, step, options = update.weight, update.step, update.options
        lr = options["lr"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        used = [x.to(wide).contiguous() for x in _floats(update)]
        if scale is not None:
            used[1] = used[1] * scale.to(weight.device, non_blocking=True)
        if _is_there(lr):
            lr = lr.to(weight.device, torch.float32)
        found = None if found_inf is None else (found_inf != 0).to(weight.device, torch.float32)
        step += 1
        beta1, beta2 = options["betas"]
        rest = {name: options[name] for name in ("weight_decay", "eps", "maximize")}
        p, g, m, v = ([x] for x in used)
        torch._fused_adamw_(
            p, g, m, v, [], [step], lr=lr, beta1=beta1, beta2=beta2, amsgrad=False, found_inf=found, **rest
        )
        for kept, new in _kept(update, *p, *m, *v):  # copying does nothing where it is the same memory
            kept.copy_(new if found is None else torch.where(found != 0, kept, new))
        if found is not None:
            step -= found


def _floats(update: Update) -> list[torch.Tensor]:
    """Weight, gradient and moments as numbers."""
    weight, grad, *moments = update[:4]
    if update.master is not None:
        is_rest = update.master.dtype == torch.int8
        weight = block_quant.join(weight, update.master) if is_rest else update.master
    if update.scales:
        moments = [block_quant.dequantize(*each) for each in zip(moments, update.scales, (True, False), strict=True)]
    return [weight, grad, *moments]


def _kept(update: Update, weight: torch.Tensor, *moments: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(what is kept, its new value) of weight and state, from these numbers after the step."""
    new, master = [weight, *moments], weight
    if update.scales:
        word, other = block_quant.random_words(update.stream, update.step, update.first, weight)
        avg, avg_scale = block_quant.quantize(moments[0], update.size, True, word >> 16)
        square, square_scale = block_quant.quantize(moments[1], update.size, False, other >> 13)
        if update.master is not None:
            weight, master = block_quant.split(weight, word & 0xFF)
        elif update.weight.dtype == torch.bfloat16:
            weight = block_quant.round_stochastic(weight, word & 0xFFFF)
        new = [weight, avg, square, avg_scale, square_scale]
    yield from zip((update.weight, update.exp_avg, update.exp_avg_sq, *(update.scales or ())), new, strict=True)
    if update.master is not None:
        yield update.master, master


def _launch(
    updates: list[Update], size: int, device: torch.device, aligned: bool, scale: Scalar, found_inf: Scalar
) -> None:
    groups = {id(update.options): update.options for update in updates}
    number = {key: i for i, key in enumerate(groups)}
    counts, rows = [update.weight.numel() for update in updates], []
    for u in updates:
        tensors = u.grad, u.weight, u.exp_avg, u.exp_avg_sq, u.step, u.master, *(u.scales or (None, None))
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        rows.append((*addresses, number[id(u.options)], u.stream, u.first))
    of_chunk, table, chunks = tensor_lists.walk(counts, rows, device)
    options = _options(list(groups.values()), device)
    shared = torch.empty(len(updates), SHARED, dtype=torch.float32, device=device)
    _prepare_kernel[(len(updates),)](table, options, updates[0].step, scale, found_inf, shared, num_warps=1)
    if chunks:
        constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, "SIZE": size}
        constants |= BLOCK_OPTIONS if size else OPTIONS
        like = *updates[0][:5], updates[0].master
        _adamw_kernel[(chunks,)](of_chunk, table, shared, *like, **constants)


def _options(groups: list[Mapping[str, Any]], device: torch.device) -> torch.Tensor:
    """[groups, 8] in float64, into which learning rates that are on a device are copied there."""
    numbers: list[float] = []
    for group in groups:
        betas = [float(beta) for beta in group["betas"]]
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        lr = math.nan if _is_there(group["lr"]) else float(group["lr"])
        numbers += [lr, *betas, *logs, group["eps"], group["weight_decay"], -1.0 if group["maximize"] else 1.0]
    options = tensor_lists.once(tuple(numbers), torch.float64, device).view(len(groups), -1)
    rates = {i: group["lr"] for i, group in enumerate(groups) if _is_there(group["lr"])}
    options = options.clone() if rates else options
    for i, lr in rates.items():
        options[i, 0].copy_(lr, non_blocking=True)
    return options


def _is_there(lr: Any) -> bool:
    """Whether a learning rate is on another device than the CPU's."""
    return isinstance(lr, torch.Tensor) and not lr.is_cpu


@fast_jit
def _prepare_kernel(table, numbers, like, scale, found_inf, shared):
    """Counts the step of one tensor and writes what its elements share, computed in float64."""
    row = table + tl.program_id(0) * 14
    of_group = numbers + tl.load(row + 11) * 8
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


@fast_jit
def _adamw_kernel(
    of_chunk, table, shared, weight_like, grad_like, avg_like, square_like, step_like, master_like,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, count = chunk_of(of_chunk, table, 14, CHUNK)
    shared += tensor * 10
    if tl.load(shared + 9) == 0.0:
        weight, grad = base(tl.load(row + 4), start, weight_like), moving_base(of_chunk, row, start, grad_like)
        avg, square = base(tl.load(row + 5), start, avg_like), base(tl.load(row + 6), start, square_like)
        master = weight
        if master_like is not None:
            master = base(tl.load(row + 8), start, master_like)
        bases = weight, grad, avg, square, master
        step_size, correction, decay = tl.load(shared), tl.load(shared + 1), tl.load(shared + 2)
        betas = tl.load(shared + 3), tl.load(shared + 4), tl.load(shared + 5), tl.load(shared + 6)
        numbers = step_size, correction, decay, betas, tl.load(shared + 7), tl.load(shared + 8)
        lane, block, scales, place = tl.arange(0, BLOCK), None, None, None
        whole = count // BLOCK * BLOCK  # without a mask loads and stores are wide
        if SIZE:
            block = tl.arange(0, BLOCK // SIZE)
            scales = base(tl.load(row + 9), start // SIZE, shared), base(tl.load(row + 10), start // SIZE, shared)
            step = tl.load(tl.load(row + 7).to(step_like.dtype))  # counted already
            place = tl.load(row + 12), step, tl.load(row + 13) + start
        for begin in tl.range(0, whole, BLOCK, num_stages=STAGES):
            _update(bases, scales, place, numbers, begin, lane, block, None, ALIGNED, SIZE)
        if whole < count:
            _update(bases, scales, place, numbers, whole, lane, block, count, ALIGNED, SIZE)


@triton.jit
def _update(bases, scales, place, numbers, begin, lane, block, count, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    """One step of the elements `lane` [BLOCK] of a chunk behind `begin`, up to `count` if there is one; SIZE: of codes,
    in whole blocks [BLOCK // SIZE]."""
    at, mask, of_mask = begin + lane, None, None
    if SIZE:
        of = begin // SIZE + block
        random = words(place[0], place[1], place[2], at)
        avg_scale_at, square_scale_at = scales[0] + of, scales[1] + of
    if count is not None:
        mask = at < count
        if SIZE:
            of_mask = of < count // SIZE
    weight_at, grad_at = elements(bases[0], at, ALIGNED), elements(bases[1], at, ALIGNED)
    avg_at, square_at = elements(bases[2], at, ALIGNED), elements(bases[3], at, ALIGNED)
    master_at = elements(bases[4], at, ALIGNED)  # the weight itself, where there is no other
    if SIZE:
        weight = _once(weight_at, mask)
        if master_at.dtype != weight_at.dtype:
            weight = joined(weight, tl.load(master_at, mask=mask, eviction_policy="evict_first"))
        avg = tl.load(avg_at, mask=mask, eviction_policy="evict_first")
        square = tl.load(square_at, mask=mask, eviction_policy="evict_first")
        avg = decode(avg, tl.load(avg_scale_at, mask=of_mask), SIZE, True)
        square = decode(square, tl.load(square_scale_at, mask=of_mask), SIZE, False)
        weight, avg, square = _step(weight, _once(grad_at, mask), avg, square, numbers, False)
        if master_at.dtype != weight_at.dtype:
            weight, rest = parted(weight, random[0])
            store(master_at, rest, mask)
        elif weight_at.dtype.element_ty == tl.bfloat16:
            weight = rounded(weight, random[0])
        store(weight_at, weight, mask)
        scale = largest(avg, SIZE)
        tl.store(avg_scale_at, scale, mask=of_mask)
        store(avg_at, encode(avg, scale, random[0] >> 16, SIZE, True), mask)
        scale = largest(square, SIZE)
        tl.store(square_scale_at, scale, mask=of_mask)
        store(square_at, encode(square, scale, random[1] >> 13, SIZE, False), mask)
    else:
        weight, avg, square = _step(
            _once(master_at, mask), _once(grad_at, mask), _once(avg_at, mask), _once(square_at, mask), numbers, True
        )
        store(weight_at, weight, mask)
        store(avg_at, avg, mask)
        store(square_at, square, mask)
        if master_at.dtype != weight_at.dtype:
            store(master_at, weight, mask)


@triton.jit
def _once(pointers, mask):
    """In float32. Nothing is read twice, so nothing need stay in the caches."""
    return tl.load(pointers, mask=mask, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _step(weight, grad, avg, square, numbers, EXACT: tl.constexpr):
    step_size, correction, decay, betas, eps, scale = numbers
    grad *= scale
    weight -= decay * weight
    avg = betas[0] * avg + betas[1] * grad
    square = betas[2] * square + betas[3] * grad * grad
    if EXACT:
        return weight - step_size * avg / (tl.sqrt_rn(square) * correction + eps), avg, square
    else:  # to 22 bits, by a third of the instructions, which show beside few bytes
        inverse = tl.rsqrt(square * tl.rsqrt(square + 1e-37) * correction + eps)
        return weight - step_size * avg * inverse * inverse, avg, square
