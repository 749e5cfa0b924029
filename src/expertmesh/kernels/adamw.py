"""AdamW on all tensors in one pass over memory, in two launches: a small one computes the scalars of each tensor.

    p -= lr decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g g
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, with the operations in the order of
`torch.optim.AdamW(fused=True)`: in float32, each result rounded once. g is the gradient times a scale on the device, so
clipping needs no pass of its own. Moments may have 8 bits (block_quant.py); a program then processes whole blocks.
Weights may be rounded stochastically, or have a more precise master copy.
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
#: for 8-bit moments. BLOCK is a multiple of the quantization block. An iteration has many instructions, so loads of
#: later iterations are pipelined with them, which gains 15 to 20 % of the copy rate on an H200.
BLOCK_OPTIONS = {"STAGES": 3, "BLOCK": 1024, "num_warps": 4}
NUM_SCALARS = 10  # float32 scalars per tensor that `_prepare_kernel` computes
Scalar = torch.Tensor | None  # float32 and 0-dimensional


class Update(NamedTuple):
    """Inputs of one parameter's step: dense tensors of one shape, the step count (a float32 scalar tensor), and its
    parameter group's options under PyTorch's names: lr (a float or scalar tensor), betas, eps, weight_decay, maximize.

    master: the float32 master weight of a bfloat16 weight, or an int8 tensor of 8 more bits of the weight.
    scales: block scales of exp_avg and exp_avg_sq, which are then codes of `block_quant.quantize`. In this case a
    bfloat16 weight without a master is rounded stochastically. stream, first: arguments of `block_quant.random_words`.
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
        """Elements per quantization block of the moments, or 0 if these are floats."""
        return self.exp_avg.shape[-1] // self.scales[0].shape[-1] if self.scales else 0


def adamw_(updates: Sequence[Update], scale: Scalar = None, found_inf: Scalar = None) -> None:
    """Step all parameters in place, without a sync. Gradients are multiplied by `scale`, but not written.

    scale, found_inf: float32 scalar tensors. If found_inf is not 0, nothing changes, not even the step counts.
    """
    for size in dict.fromkeys(update.size for update in updates):
        batch = [update for update in updates if update.size == size]
        groups, others = tensor_lists.group_by_launch([x for x in (*u[:4], u.master) if x is not None] for u in batch)
        for (device, *_, aligned), members in groups.items():
            with torch.cuda.device_of(batch[members[0]].weight):
                on_device = [None if x is None else x.to(device, non_blocking=True) for x in (scale, found_inf)]
                _launch([batch[i] for i in members], size, device, aligned, *on_device)
        adamw_reference_([batch[i] for i in others], scale, found_inf)


def adamw_reference_(updates: Sequence[Update], scale: Scalar = None, found_inf: Scalar = None) -> None:
    """Reference of `adamw_`: PyTorch's fused AdamW, in float32 or wider."""
    for update in updates:
        weight, step, options = update.weight, update.step, update.options
        lr = options["lr"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        inputs = [x.to(wide).contiguous() for x in _as_floats(update)]
        if scale is not None:
            inputs[1] = inputs[1] * scale.to(weight.device, non_blocking=True)
        if _is_on_device(lr):
            lr = lr.to(weight.device, torch.float32)
        skip = None if found_inf is None else (found_inf != 0).to(weight.device, torch.float32)
        step += 1
        beta1, beta2 = options["betas"]
        rest = {name: options[name] for name in ("weight_decay", "eps", "maximize")}
        p, g, m, v = ([x] for x in inputs)
        torch._fused_adamw_(
            p, g, m, v, [], [step], lr=lr, beta1=beta1, beta2=beta2, amsgrad=False, found_inf=skip, **rest
        )
        for target, new in _saved(update, *p, *m, *v):  # copy_ of a tensor to itself does nothing
            target.copy_(new if skip is None else torch.where(skip != 0, target, new))
        if skip is not None:
            step -= skip


def _as_floats(update: Update) -> list[torch.Tensor]:
    """Return weight (the master if there is one), gradient and both moments, dequantized."""
    weight, grad, *moments = update[:4]
    if update.master is not None:
        is_remainder = update.master.dtype == torch.int8
        weight = block_quant.join(weight, update.master) if is_remainder else update.master
    if update.scales:
        moments = [block_quant.dequantize(*each) for each in zip(moments, update.scales, (True, False), strict=True)]
    return [weight, grad, *moments]


def _saved(update: Update, weight: torch.Tensor, *moments: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tensor, value to store in it) for weight and state, from the float32 weight and moments after the step."""
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
    group_index = {key: i for i, key in enumerate(groups)}
    counts, rows = [update.weight.numel() for update in updates], []
    for u in updates:
        tensors = u.grad, u.weight, u.exp_avg, u.exp_avg_sq, u.step, u.master, *(u.scales or (None, None))
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        rows.append((*addresses, group_index[id(u.options)], u.stream, u.first))
    tensor_of_chunk, table, chunks = tensor_lists.chunk_table(counts, rows, device)
    options = _group_options(list(groups.values()), device)
    scalars = torch.empty(len(updates), NUM_SCALARS, dtype=torch.float32, device=device)
    _prepare_kernel[(len(updates),)](table, options, updates[0].step, scale, found_inf, scalars, num_warps=1)
    if chunks:
        constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, "SIZE": size}
        constants |= BLOCK_OPTIONS if size else OPTIONS
        like = *updates[0][:5], updates[0].master
        _adamw_kernel[(chunks,)](tensor_of_chunk, table, scalars, *like, **constants)


def _group_options(groups: list[Mapping[str, Any]], device: torch.device) -> torch.Tensor:
    """Return [groups, 8] float64 on `device`. Learning rates that are device tensors are copied without a sync."""
    numbers: list[float] = []
    for group in groups:
        betas = [float(beta) for beta in group["betas"]]
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        lr = math.nan if _is_on_device(group["lr"]) else float(group["lr"])
        numbers += [lr, *betas, *logs, group["eps"], group["weight_decay"], -1.0 if group["maximize"] else 1.0]
    options = tensor_lists.cached_on_device(tuple(numbers), torch.float64, device).view(len(groups), -1)
    rates = {i: group["lr"] for i, group in enumerate(groups) if _is_on_device(group["lr"])}
    options = options.clone() if rates else options
    for i, lr in rates.items():
        options[i, 0].copy_(lr, non_blocking=True)
    return options


def _is_on_device(lr: Any) -> bool:
    """Whether a learning rate is a tensor that is not on the CPU."""
    return isinstance(lr, torch.Tensor) and not lr.is_cpu


@fast_jit
def _prepare_kernel(table, settings, like, scale, found_inf, scalars):
    """Increment the step count of one tensor and write its scalars, computed in float64."""
    row = table + tl.program_id(0) * 14
    group = settings + tl.load(row + 11) * 8
    to = scalars + tl.program_id(0) * 10
    lr, beta1, beta2 = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    counter = tl.load(row + 7).to(like.dtype)
    step = tl.load(counter) + 1.0
    skip = 0.0
    if found_inf is not None:
        skip = tl.where(tl.load(found_inf) != 0.0, 1.0, 0.0)
    tl.store(counter, step - skip)
    factor = tl.load(group + 7).to(tl.float32)
    if scale is not None:
        factor *= tl.load(scale)
    tl.store(to, lr / (1.0 - tl.exp(step.to(tl.float64) * tl.load(group + 3))))
    tl.store(to + 1, 1.0 / tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * tl.load(group + 4))))
    tl.store(to + 2, lr * tl.load(group + 6))
    tl.store(to + 3, beta1)
    tl.store(to + 4, 1.0 - beta1)
    tl.store(to + 5, beta2)
    tl.store(to + 6, 1.0 - beta2)
    tl.store(to + 7, tl.load(group + 5))
    tl.store(to + 8, factor)
    tl.store(to + 9, skip)


@fast_jit
def _adamw_kernel(
    tensor_of_chunk, table, scalars, weight_like, grad_like, avg_like, square_like, step_like, master_like,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, count = chunk_of(tensor_of_chunk, table, 14, CHUNK)
    scalars += tensor * 10
    if tl.load(scalars + 9) == 0.0:
        weight, grad = base(tl.load(row + 4), start, weight_like), moving_base(tensor_of_chunk, row, start, grad_like)
        avg, square = base(tl.load(row + 5), start, avg_like), base(tl.load(row + 6), start, square_like)
        master = weight
        if master_like is not None:
            master = base(tl.load(row + 8), start, master_like)
        bases = weight, grad, avg, square, master
        step_size, correction, decay = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
        betas = tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
        hyper = step_size, correction, decay, betas, tl.load(scalars + 7), tl.load(scalars + 8)
        lane, block, scales, seed = tl.arange(0, BLOCK), None, None, None
        whole = count // BLOCK * BLOCK  # unmasked loads and stores vectorize
        if SIZE:
            block = tl.arange(0, BLOCK // SIZE)
            scales = base(tl.load(row + 9), start // SIZE, scalars), base(tl.load(row + 10), start // SIZE, scalars)
            step = tl.load(tl.load(row + 7).to(step_like.dtype))  # already incremented
            seed = tl.load(row + 12), step, tl.load(row + 13) + start
        for begin in tl.range(0, whole, BLOCK, num_stages=STAGES):
            _update(bases, scales, seed, hyper, begin, lane, block, None, ALIGNED, SIZE)
        if whole < count:
            _update(bases, scales, seed, hyper, whole, lane, block, count, ALIGNED, SIZE)


@triton.jit
def _update(bases, scales, seed, hyper, begin, lane, block, count, ALIGNED: tl.constexpr, SIZE: tl.constexpr):
    """Step elements begin + lane [BLOCK] of a chunk. A `count` masks elements past it. SIZE: the moments are 8-bit, in
    quantization blocks [BLOCK // SIZE] of SIZE elements."""
    at, mask, scale_mask = begin + lane, None, None
    if SIZE:
        scale_index = begin // SIZE + block
        random = words(seed[0], seed[1], seed[2], at)
        avg_scale_at, square_scale_at = scales[0] + scale_index, scales[1] + scale_index
    if count is not None:
        mask = at < count
        if SIZE:
            scale_mask = scale_index < count // SIZE
    weight_at, grad_at = elements(bases[0], at, ALIGNED), elements(bases[1], at, ALIGNED)
    avg_at, square_at = elements(bases[2], at, ALIGNED), elements(bases[3], at, ALIGNED)
    master_at = elements(bases[4], at, ALIGNED)  # the weight itself if there is no master
    if SIZE:
        weight = _load(weight_at, mask)
        if master_at.dtype != weight_at.dtype:
            weight = joined(weight, tl.load(master_at, mask=mask, eviction_policy="evict_first"))
        avg = tl.load(avg_at, mask=mask, eviction_policy="evict_first")
        square = tl.load(square_at, mask=mask, eviction_policy="evict_first")
        avg = decode(avg, tl.load(avg_scale_at, mask=scale_mask), SIZE, True)
        square = decode(square, tl.load(square_scale_at, mask=scale_mask), SIZE, False)
        weight, avg, square = _step(weight, _load(grad_at, mask), avg, square, hyper, False)
        if master_at.dtype != weight_at.dtype:
            weight, rest = parted(weight, random[0])
            store(master_at, rest, mask)
        elif weight_at.dtype.element_ty == tl.bfloat16:
            weight = rounded(weight, random[0])
        store(weight_at, weight, mask)
        scale = largest(avg, SIZE)
        tl.store(avg_scale_at, scale, mask=scale_mask)
        store(avg_at, encode(avg, scale, random[0] >> 16, SIZE, True), mask)
        scale = largest(square, SIZE)
        tl.store(square_scale_at, scale, mask=scale_mask)
        store(square_at, encode(square, scale, random[1] >> 13, SIZE, False), mask)
    else:
        weight, avg, square = _step(
            _load(master_at, mask), _load(grad_at, mask), _load(avg_at, mask), _load(square_at, mask), hyper, True
        )
        store(weight_at, weight, mask)
        store(avg_at, avg, mask)
        store(square_at, square, mask)
        if master_at.dtype != weight_at.dtype:
            store(master_at, weight, mask)


@triton.jit
def _load(pointers, mask):
    """Load as float32. evict_first: nothing is read twice."""
    return tl.load(pointers, mask=mask, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _step(weight, grad, avg, square, hyper, EXACT: tl.constexpr):
    step_size, correction, decay, betas, eps, scale = hyper
    grad *= scale
    weight -= decay * weight
    avg = betas[0] * avg + betas[1] * grad
    square = betas[2] * square + betas[3] * grad * grad
    if EXACT:
        return weight - step_size * avg / (tl.sqrt_rn(square) * correction + eps), avg, square
    else:  # exact to 22 bits with a third of the instructions, which bound the kernel for 8-bit moments
        inverse = tl.rsqrt(square * tl.rsqrt(square + 1e-37) * correction + eps)
        return weight - step_size * avg * inverse * inverse, avg, square
