"""Numbers in 8 bits with a scale for each block, stochastic rounding, and the random numbers for it.

    x = scale L(q) / L(Q),  scale = largest |x| of the block,  L(q) the float whose first bits are q

Moments have a sign, four bits of exponent and three of mantissa, squares one bit of mantissa more in the sign's place.
So a code is a number's own first bits, shifted, with no root and no table, and keeps what is 2e-6 of its block's
largest; a square that is not 0 never becomes 0. Blockwise as in Dettmers et al., https://arxiv.org/abs/2110.02861.

Rounding is stochastic: a change of a moment in one step is smaller than the distance of two codes. Random numbers are a
hash of stream, step and the element's place in the whole tensor (Wellons' lowbias32): the same in every run, on every
replica. Every kernel's part that has a PyTorch twin names it.
"""

import torch

from expertmesh.backends import tl, triton

MASK = 2**32 - 1
LEAST = 1.2e-38  # the smallest scale whose inverse float32 can hold
TINY = 2.0**-112  # under which four bits of an exponent are float32's last ones, and its subnormals ours
tl_LEAST = tl.constexpr(LEAST)
tl_TINY = tl.constexpr(TINY)
SIGNED, SQUARES = (20, 1.875), (19, 1.9375)  # bits of float32 that a code has not, and the largest number of its kind


def quantize(x: torch.Tensor, size: int, signed: bool, words: torch.Tensor | None = None) -> tuple:
    """(codes of x's shape in uint8, scales [..., N / size] in float32) of x [..., N] in blocks along N.

    words: random numbers, 16 bits of each element if signed, else 19; without, codes are the nearest ones. Nearest
    codes of what codes stand for are these codes, and their scales these scales, bit for bit.
    """
    shift, top = SIGNED if signed else SQUARES
    blocks = x.float().unflatten(-1, (x.shape[-1] // size, size))
    scales = blocks.abs().amax(-1)
    inverse = torch.where(scales >= LEAST, 0.9999998 / scales, 0.0)  # a little less: no code is above the largest
    share = (blocks * inverse[..., None]).flatten(-2) * (top * TINY)
    up = 2 ** (shift - 1) if words is None else words.int() << (4 if signed else 0)
    bits = share.view(torch.int32) + up
    positive = (bits >> 19).clamp(min=(x > 0).int())
    return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80) if signed else positive).to(torch.uint8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """What `quantize` made codes and scales of, in float32."""
    shift, top = SIGNED if signed else SQUARES
    q = codes.unflatten(-1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1])).int()
    bits = ((q & 0x7F) << shift) | ((q & 0x80) << 24) if signed else q << shift
    return (bits.view(torch.float32) * (1 / (top * TINY)) * scales[..., None]).flatten(-2)


def round_stochastic(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Float32 to the bfloat16 below or above, whose mean over random words [0, 2**16) is x."""
    bits = x.contiguous().view(torch.int32) + words.int()
    return (bits & -(2**16)).view(torch.float32).bfloat16()


def split(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 to the nearest bfloat16 and an int8 of 8 more bits of it, the last one stochastic by words [0, 2**8)."""
    bits = (x.contiguous().view(torch.int32) + words.int()) & -(2**8)
    weight = ((bits + 2**15) & -(2**16)).view(torch.float32).bfloat16()
    return weight, rest_of(weight, bits.view(torch.float32))


def rest_of(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What `join` adds to a bfloat16 weight to come to float32 x, of which it is the nearest."""
    bits, of_weight = (y.float().contiguous().view(torch.int32) for y in (x, weight))
    return ((bits - of_weight) >> 8).clamp(-128, 127).to(torch.int8)


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 number of 24 bits that `split` took apart."""
    return (weight.float().contiguous().view(torch.int32) + (remainder.int() << 8)).view(torch.float32)


def random_words(stream: int, step: torch.Tensor, first: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random numbers of 32 bits, as int64, for each element of `like`, the first one at place `first` of a tensor.

    Of the second the high bits are the good ones. stream: tells tensors apart. step: a scalar, for which the host does
    not wait.
    """
    place = torch.arange(first, first + like.numel(), device=like.device).view(like.shape)
    key = _scramble(_scramble(_scramble(torch.as_tensor(stream, device=like.device)) + step.long()) + (place >> 32))
    one = _scramble((place & MASK) ^ key)
    return one, (one * 0x2C1B3C6D) & MASK


def _scramble(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ ((x & MASK) >> shift)) * factor) & MASK
    return x ^ (x >> 16)


@triton.jit
def encode(x, scales, random, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`quantize` of x [BLOCK], whose scales [BLOCK // SIZE] are known."""
    inverse = tl.where(scales >= tl_LEAST, 0.9999998 / tl.maximum(scales, tl_LEAST), 0.0)
    share = times(x, inverse, SIZE)
    if SIGNED:
        bits = (share * (1.875 * tl_TINY)).to(tl.uint32, bitcast=True) + (random << 4)
        return (((bits << 4) | (bits & 0x80000000)) >> 24).to(tl.uint8)  # bits between sign and code are 0
    else:
        bits = (share * (1.9375 * tl_TINY)).to(tl.uint32, bitcast=True) + random
        return tl.maximum(bits >> 19, tl.minimum(x.to(tl.uint32, bitcast=True), 1)).to(tl.uint8)


@triton.jit
def decode(codes, scales, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`dequantize` of codes [BLOCK] by scales [BLOCK // SIZE]."""
    if SIGNED:  # the sign comes five times, and once it is wanted
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.875 * tl_TINY)), scales, SIZE)
    else:
        bits = codes.to(tl.uint32) << 19
        return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.9375 * tl_TINY)), scales, SIZE)


@triton.jit
def times(x, scales, SIZE: tl.constexpr):
    """x [BLOCK] times the number of its block."""
    return tl.reshape(tl.reshape(x, [scales.shape[0], SIZE]) * scales[:, None], [x.shape[0]])


@triton.jit
def largest(x, SIZE: tl.constexpr):
    """The largest |x| of each block [BLOCK // SIZE] of x [BLOCK]."""
    return tl.max(tl.reshape(tl.abs(x), [x.shape[0] // SIZE, SIZE]), axis=1)


@triton.jit
def scramble(x):
    """A hash of 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def words(stream, step, first, at):
    """`random_words` of the elements `at` [BLOCK] behind place `first`."""
    key = scramble(scramble(scramble(stream.to(tl.uint32)) + step.to(tl.uint32)) + (first >> 32).to(tl.uint32))
    one = scramble((first.to(tl.uint32) + at.to(tl.uint32)) ^ key)
    return one, one * 0x2C1B3C6D


@triton.jit
def joined(weight, remainder):
    """`join`"""
    return (weight.to(tl.float32).to(tl.int32, bitcast=True) + (remainder.to(tl.int32) << 8)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def rounded(x, random):
    """`round_stochastic`"""
    bits = x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def parted(x, random):
    """`split`"""
    bits = x.to(tl.int32, bitcast=True) + (random & 0xFF).to(tl.int32)
    high = (bits + 32768) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), ((bits >> 8) - (high << 8)).to(tl.int8)
