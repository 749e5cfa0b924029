"""Weights of experts in 4 bits: two codes a byte, and a scale for each block of weights along the inner axis.

    w = VALUES[code] · scale          rounded once, from float32

NF4 (QLoRA, arXiv:2305.14314, appendix E): the values are quantiles of a normal distribution, the scale is the largest
magnitude of 64 weights, in bfloat16. MXFP4 (OCP Microscaling Formats 1.0): the values are the floats of 2 bits of
exponent and 1 of mantissa, the scale is a power of two for 32 weights, of which the exponent, plus 127, is kept.

Codes [E, out, in / 2], the first of two in the lower half; scales [E, out, in / size]: the layout of GPT-OSS's files.
"""

from functools import cache
from typing import NamedTuple

import torch

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched

WORDS = 1024  # of 8 codes, that a program decodes


class Format(NamedTuple):
    """What the 16 codes stand for; how many weights have one scale; the dtype of scales, uint8 for exponents."""

    values: tuple[float, ...]
    size: int
    scale: torch.dtype


_E2M1 = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS = {
    "nf4": Format(_NF4, 64, torch.bfloat16),
    "mxfp4": Format((*_E2M1, *(-value for value in _E2M1)), 32, torch.uint8),
}


def empty(format: str, shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) for weights [E, out, in], not written yet. Raises ValueError if `in` is not whole blocks."""
    (*outer, inner), size = shape, FORMATS[format].size
    if inner % size:
        raise ValueError(
            f"Experts with rows of {inner} weights cannot be packed in {format}, which takes blocks of {size}: load "
            f"the model without quantization."
        )
    codes = torch.empty(*outer, inner // 2, dtype=torch.uint8, device=device)
    return codes, torch.empty(*outer, inner // size, dtype=FORMATS[format].scale, device=device)


@torch.no_grad()
def encode(weight_EOI: torch.Tensor, format: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Write codes and scales that are nearest to weights [E, out, in], whose `in` may be strided.

    What codes of MXFP4 stand for is encoded without a loss: of the two exponents that could hold the largest of a
    block, the one with the smaller squared error is taken.
    """
    values = _values(format, weight_EOI.device)
    floats = values[:8] if format == "mxfp4" else values
    between = (floats[1:] + floats[:-1]) / 2
    for expert, weight_OI in enumerate(weight_EOI):  # all at once would be several times as large as the weights
        blocks = weight_OI.float().unflatten(-1, (-1, FORMATS[format].size))
        largest = blocks.abs().amax(-1, keepdim=True)
        if format == "nf4":
            scale = largest.bfloat16()
            code = torch.bucketize(blocks / scale.float().clamp_min(1e-38), between)
        else:
            low = largest.clamp_min(2.0**-125).log2().floor() - 2
            exponents = torch.stack([low, low + 1])
            both = torch.bucketize(blocks.abs() * torch.exp2(-exponents), between)
            errors = (floats[both] * torch.exp2(exponents) - blocks.abs()).square().sum(-1, keepdim=True)
            second = errors[1] < errors[0]
            code = torch.where(second, both[1], both[0]) + 8 * (blocks < 0)
            scale = low + 127 + second
        codes[expert] = (code[..., ::2] + 16 * code[..., 1::2]).flatten(-2).to(torch.uint8)
        scales[expert] = scale[..., 0]


def decode(codes: torch.Tensor, scales: torch.Tensor, format: str, out: torch.Tensor) -> torch.Tensor:
    """`out` [..., in], contiguous, of any float dtype, filled with what codes and scales stand for."""
    if not use_triton(codes):
        return decode_reference(codes, scales, format, out)
    assert codes.is_contiguous() and scales.is_contiguous() and out.is_contiguous()
    words, size = codes.numel() // 4, FORMATS[format].size // 8
    values = _values(format, codes.device)
    _decode_kernel[(triton.cdiv(words, WORDS),)](
        codes.view(torch.int32), scales, values, out, words, EXPONENTS=format == "mxfp4", SIZE=size, WORDS=WORDS
    )
    return out


def decode_reference(codes: torch.Tensor, scales: torch.Tensor, format: str, out: torch.Tensor) -> torch.Tensor:
    """The specification of `decode`."""
    values = _values(format, codes.device)
    for to, bytes_, scale in zip(out, codes, scales, strict=True):  # an expert at a time, for memory's sake
        pairs = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(-2)
        blocks = values[pairs.int()].unflatten(-1, (scale.shape[-1], -1))
        to.copy_((blocks * _factor(scale)[..., None]).flatten(-2))
    return out


def _factor(scale: torch.Tensor) -> torch.Tensor:
    """What codes of a block are multiplied by, in float32. By bits: no exp2 is exact everywhere."""
    if scale.dtype != torch.uint8:
        return scale.float()
    exponent = scale.int()
    bits = torch.where(exponent > 0, exponent << 23, 1 << 22)  # 2 ** -127 is a subnormal
    return torch.where(exponent == 255, torch.nan, bits.view(torch.float32))


@cache
def _values(format: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(FORMATS[format].values, device=device)


@launched
def _decode_kernel(
    words, scales, values, out, num_words, EXPONENTS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr
):
    """A thread makes of 4 bytes of codes one piece of 16 bytes; SIZE: words that have one scale."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = at < num_words
    scale = tl.load(scales + at // SIZE, mask=inside, other=0)
    if EXPONENTS:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent > 0, exponent << 23, 1 << 22)
        factor = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        factor = scale.to(tl.float32)
    place = tl.arange(0, 8)
    code = (tl.load(words + at, mask=inside, other=0)[:, None] >> (4 * place)[None, :]) & 15
    weight = tl.load(values + code) * factor[:, None]
    tl.store(out + at[:, None] * 8 + place[None, :], weight.to(out.dtype.element_ty), mask=inside[:, None])
