"""The AdamW kernel of 8-bit states in variants, timed in one run: which instructions its speed hangs on.

    python benchmarks/adamw_variants.py [--states 8bit 24bit]

Flags: S roots by rsqrt; D, E shorter decoding and encoding; T truncated stores; F betas in the scales; R another word
for the weight; EIGHT bytes that a thread moves at once; STAGES of loads ahead. Prints ms of AdamW alone, ms and share of
the copy rate with clipping (the measure of small_kernels.py), and the share of codes that differ from today's kernel.
"""

import argparse
from typing import Any

import torch
import triton
import triton.language as tl

from expertmesh.kernels import adamw
from expertmesh.kernels.block_quant import joined, largest, parted, rounded, times, tl_LEAST, tl_TINY, words
from expertmesh.kernels.launch import Kernel
from expertmesh.kernels.tensor_lists import base, chunk_of, moving_base, store
from expertmesh.memory.adamw import AdamW

NONE = dict(S=0, D=0, E=0, T=0, F=0, R=0, EIGHT=8, STAGES=1, BLOCK=1024, num_warps=4)
BITS = NONE | dict(S=1, D=1, E=1, T=1)
FOLD = BITS | dict(F=1)
VARIANTS: dict[str, dict[str, int]] = {
    "as it is, 2048 x 8": NONE | dict(BLOCK=2048, num_warps=8),
    "as it is, 256 x 1": NONE | dict(BLOCK=256, num_warps=1),
    "as it is, 512 x 2": NONE | dict(BLOCK=512, num_warps=2),
    "short": BITS,
    "short, 256 x 1": BITS | dict(BLOCK=256, num_warps=1),
    "folded": FOLD,
    "folded, 256 x 1": FOLD | dict(BLOCK=256, num_warps=1),
    "folded, 512 x 2": FOLD | dict(BLOCK=512, num_warps=2),
    "folded, 512 x 1": FOLD | dict(BLOCK=512, num_warps=1),
    "folded, 2048 x 8": FOLD | dict(BLOCK=2048, num_warps=8),
    "folded, 2048 x 4, 16 bytes": FOLD | dict(BLOCK=2048, EIGHT=16),
    "folded, 512 x 1, 16 bytes": FOLD | dict(BLOCK=512, num_warps=1, EIGHT=16),
    "folded, 512 x 4 (4 each)": FOLD | dict(BLOCK=512),
    "folded, 2 stages": FOLD | dict(STAGES=2),
    "folded, 3 stages": FOLD | dict(STAGES=3),
    "folded, 256 x 1, 3 stages": FOLD | dict(BLOCK=256, num_warps=1, STAGES=3),
    "folded, no minimum": FOLD | dict(E=2, BLOCK=256, num_warps=1),
    "folded, other random bits": FOLD | dict(E=3, R=1),
    "folded, other random bits, 256 x 1": FOLD | dict(E=3, R=1, BLOCK=256, num_warps=1),
}


@triton.jit
def pointers(base, at, ALIGNED: tl.constexpr, EIGHT: tl.constexpr):
    if ALIGNED:
        return tl.multiple_of(base + at, EIGHT if base.dtype.element_ty.primitive_bitwidth == 8 else 16)
    else:
        return base + at


@triton.jit
def decode(codes, scales, SIZE: tl.constexpr, SIGNED: tl.constexpr, D: tl.constexpr):
    if SIGNED:
        if D:
            bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496
            return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.875 * tl_TINY)), scales, SIZE)
        else:
            q = codes.to(tl.uint32)
            bits = ((q & 0x7F) << 20) | ((q & 0x80) << 24)
            return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.875 * tl_TINY)), scales, SIZE)
    else:
        q = codes.to(tl.uint32)
        return times((q << 19).to(tl.float32, bitcast=True) * (1.0 / (1.9375 * tl_TINY)), scales, SIZE)


@triton.jit
def encode(x, scales, random, SIZE: tl.constexpr, SIGNED: tl.constexpr, E: tl.constexpr):
    inverse = tl.where(scales >= tl_LEAST, 0.9999998 / tl.maximum(scales, tl_LEAST), 0.0)
    share = times(x, inverse, SIZE)
    if SIGNED:
        if E:
            bits = (share * (1.875 * tl_TINY)).to(tl.uint32, bitcast=True) + (
                random >> 12 if E == 3 else (random >> 12) & 0xFFFF0
            )
            return (((bits << 4) | (bits & 0x80000000)) >> 24).to(tl.uint8)
        else:
            bits = (share * (1.875 * tl_TINY)).to(tl.uint32, bitcast=True) + ((random >> 16) << 4)
            return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0xFFFFFF80)).to(tl.uint8)
    else:
        bits = (share * (1.9375 * tl_TINY)).to(tl.uint32, bitcast=True) + (random >> 13)
        if E >= 2:
            return (tl.maximum(bits << 5, tl.minimum(x.to(tl.uint32, bitcast=True), 0x1000000)) >> 24).to(tl.uint8)
        else:
            return tl.maximum(bits >> 19, tl.minimum(x.to(tl.uint32, bitcast=True), 1)).to(tl.uint8)


@triton.jit
def step_(weight, grad, avg, square, numbers, S: tl.constexpr, F: tl.constexpr):
    step_size, correction, decay, betas, eps, scale = numbers
    grad *= scale
    weight -= decay * weight
    if F:
        avg = avg + betas[1] * grad
        square = square + betas[3] * grad * grad
    else:
        avg = betas[0] * avg + betas[1] * grad
        square = betas[2] * square + betas[3] * grad * grad
    if S:
        root = square * tl.rsqrt(square + 1e-37)
        r = tl.rsqrt(root * correction + eps)
        return weight - step_size * avg * r * r, avg, square
    else:
        root = tl.sqrt(square)
        return weight - step_size * avg / (root * correction + eps), avg, square


@triton.jit
def once(p, mask):
    return tl.load(p, mask=mask, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def blocks(
    bases,
    avg_scale_at,
    square_scale_at,
    at,
    mask,
    of_mask,
    random,
    numbers,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
    EIGHT: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
):
    weight_at, grad_at = pointers(bases[0], at, ALIGNED, EIGHT), pointers(bases[1], at, ALIGNED, EIGHT)
    avg_at, square_at = pointers(bases[2], at, ALIGNED, EIGHT), pointers(bases[3], at, ALIGNED, EIGHT)
    rest_at = pointers(bases[4], at, ALIGNED, EIGHT)
    weight = once(weight_at, mask)
    if rest_at.dtype != weight_at.dtype:
        weight = joined(weight, tl.load(rest_at, mask=mask, eviction_policy="evict_first"))
    avg = tl.load(avg_at, mask=mask, eviction_policy="evict_first")
    square = tl.load(square_at, mask=mask, eviction_policy="evict_first")
    betas = numbers[3]
    if F:
        avg = decode(avg, tl.load(avg_scale_at, mask=of_mask) * betas[0], SIZE, True, D)
        square = decode(square, tl.load(square_scale_at, mask=of_mask) * betas[2], SIZE, False, D)
    else:
        avg = decode(avg, tl.load(avg_scale_at, mask=of_mask), SIZE, True, D)
        square = decode(square, tl.load(square_scale_at, mask=of_mask), SIZE, False, D)
    weight, avg, square = step_(weight, once(grad_at, mask), avg, square, numbers, S, F)
    if rest_at.dtype != weight_at.dtype:
        if T:
            bits = weight.to(tl.int32, bitcast=True) + (random[0] & 0xFF).to(tl.int32)
            high = bits + 32768
            tl.store(rest_at, ((bits >> 8) - ((high >> 16) << 8)).to(tl.int8), mask=mask, eviction_policy="evict_first")
            tl.store(
                weight_at,
                (high >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True),
                mask=mask,
                eviction_policy="evict_first",
            )
        else:
            weight, rest = parted(weight, random[0])
            tl.store(rest_at, rest, mask=mask, eviction_policy="evict_first")
            store(weight_at, weight, mask)
    elif weight_at.dtype.element_ty == tl.bfloat16:
        if T:
            bits = weight.to(tl.uint32, bitcast=True) + ((random[0] * 0x297A2D39) >> 16 if R else random[0] & 0xFFFF)
            tl.store(
                weight_at,
                (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),
                mask=mask,
                eviction_policy="evict_first",
            )
        else:
            weight = rounded(weight, random[0])
            store(weight_at, weight, mask)
    else:
        store(weight_at, weight, mask)
    scale = largest(avg, SIZE)
    tl.store(avg_scale_at, scale, mask=of_mask)
    tl.store(avg_at, encode(avg, scale, random[0], SIZE, True, E), mask=mask, eviction_policy="evict_first")
    scale = largest(square, SIZE)
    tl.store(square_scale_at, scale, mask=of_mask)
    square = encode(square, scale, random[1], SIZE, False, E)
    tl.store(square_at, square, mask=mask, eviction_policy="evict_first")


@triton.jit
def kernel(
    of_chunk,
    table,
    shared,
    weight_like,
    grad_like,
    avg_like,
    square_like,
    step_like,
    master_like,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
    EIGHT: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    tensor, row, start, count = chunk_of(of_chunk, table, 14, CHUNK)
    shared += tensor * 10
    if tl.load(shared + 9) == 0.0:
        weight, grad = base(tl.load(row + 4), start, weight_like), moving_base(of_chunk, row, start, grad_like)
        avg, square = base(tl.load(row + 5), start, avg_like), base(tl.load(row + 6), start, square_like)
        master = weight
        if master_like is not None:
            master = base(tl.load(row + 9), start, master_like)
        bases = weight, grad, avg, square, master
        step_size, correction, decay = tl.load(shared), tl.load(shared + 1), tl.load(shared + 2)
        betas = tl.load(shared + 3), tl.load(shared + 4), tl.load(shared + 5), tl.load(shared + 6)
        numbers = step_size, correction, decay, betas, tl.load(shared + 7), tl.load(shared + 8)
        lane = tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK
        block = tl.arange(0, BLOCK // SIZE)
        avg_scale = base(tl.load(row + 10), start // SIZE, shared)
        square_scale = base(tl.load(row + 11), start // SIZE, shared)
        step = tl.load(tl.load(row + 7).to(step_like.dtype))
        stream, first = tl.load(row + 12), tl.load(row + 13) + start
        for begin in tl.range(0, whole, BLOCK, num_stages=STAGES):
            at, of = begin + lane, begin // SIZE + block
            random = words(stream, step, first, at)
            blocks(
                bases,
                avg_scale + of,
                square_scale + of,
                at,
                None,
                None,
                random,
                numbers,
                ALIGNED,
                SIZE,
                S,
                D,
                E,
                T,
                EIGHT,
                F,
                R,
            )
        if whole < count:
            at, of = whole + lane, whole // SIZE + block
            random, mask, of_mask = words(stream, step, first, at), at < count, of < count // SIZE
            scales = avg_scale + of, square_scale + of
            blocks(
                bases, scales[0], scales[1], at, mask, of_mask, random, numbers, ALIGNED, SIZE, S, D, E, T, EIGHT, F, R
            )


class Variant:
    """Stands in for `_adamw_kernel`."""

    def __init__(self, flags: dict[str, int]) -> None:
        self.kernel, self.flags = Kernel(kernel), flags

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.kernel[grid](*arguments, **constants | self.flags)


def milliseconds(function: Any, repeats: int = 30) -> float:
    """The median."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # the launches are there before the first one runs
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def run(states: str, elements: int) -> None:
    plain, first = adamw._adamw_kernel, None
    moved = 12 + 16 / 256 if states == "8bit" else 14 + 16 / 256
    for name, flags in {"today": None, **VARIANTS}.items():
        adamw._adamw_kernel = plain if flags is None else Variant(flags)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(elements // 2048, 2048, device="cuda").bfloat16())
        weight.grad = torch.randn_like(weight)
        try:
            optimizers = [AdamW([weight], lr=1e-5, max_grad_norm=bound, states=states) for bound in (None, 1.0)]
            for _ in range(3):
                optimizers[0].step()
            found = [optimizers[0].state[weight][f"{key}_8bit"].clone() for key in ("exp_avg", "exp_avg_sq")]
            found.append(weight.detach().clone())
            first = first or found
            differ = [f"{float((a != b).float().mean()):.1e}" for a, b in zip(found, first, strict=True)]
            alone, both = (milliseconds(optimizer.step) for optimizer in optimizers)
        except Exception as error:
            print(f"{states:6} {name:36} failed: {type(error).__name__} {str(error)[:200]}", flush=True)
            continue
        share = elements * moved / 4.25e9 / both
        print(
            f"{states:6} {name:36} alone {alone:.4f} ms, with clipping {both:.4f} ms, {share:.3f}, differ {differ}",
            flush=True,
        )
        del weight, optimizers, found
    adamw._adamw_kernel = plain


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--states", nargs="+", default=["8bit", "24bit"])
    options.add_argument("--elements", type=int, default=16 * 16384 * 2048)
    options = options.parse_args()
    for states in options.states:
        run(states, options.elements)


if __name__ == "__main__":
    main()
