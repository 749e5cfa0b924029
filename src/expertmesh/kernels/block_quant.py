"""8-bit optimizer moments with one scale per block, stochastic rounding, and the random numbers for it.

    x = scale L(q) / L(Q),  scale = largest |x| of the block,  L(q) the float32 with leading bits q,  Q the largest code

Codes of first moments have 1 sign, 4 exponent and 3 mantissa bits; those of second moments (squares) a fourth mantissa
bit instead of the sign. Codes are shifted float32 bits, without a root or a table. They hold down to 2e-6 of a block's
largest value, and a nonzero square never becomes 0. Blockwise as in Dettmers et al., https://arxiv.org/abs/2110.02861.

Rounding is stochastic because one step changes a moment by less than the distance of two codes. Random numbers are a
hash (Wellons' lowbias32) of stream, step and index in the unsharded tensor, equal in every run and on every replica.
Docstrings of Triton functions name their PyTorch reference.
"""

import torch

from expertmesh.backends import tl, triton

MASK = 2**32 - 1
MIN_SCALE = 1.2e-38  # the smallest scale whose inverse is finite in float32
TINY = 2.0**-112  # below 2 * TINY float32 exponents fit into 4 bits, and float32 subnormals are the codes' subnormals
tl_MIN_SCALE = tl.constexpr(MIN_SCALE)
tl_TINY = tl.constexpr(TINY)
SIGNED, SQUARES = (20, 1.875), (19, 1.9375)  # low float32 bits that a code drops; significand of the largest code


def quantize(x: torch.Tensor, size: int, signed: bool, words: torch.Tensor | None = None) -> tuple:
    """Return (uint8 codes of x's shape, float32 scales [..., N / size]) for x [..., N], in blocks along N.

    words: random numbers for stochastic rounding, of 16 bits if signed, else 19. Without them codes are rounded to
    nearest; then quantizing the result of `dequantize` again gives the same codes and scales bit for bit.
    """
    shift, top = SIGNED if signed else SQUARES
    blocks = x.float().unflatten(-1, (x.shape[-1] // size, size))
    scales = blocks.abs().amax(-1)
    inverse = torch.where(scales >= MIN_SCALE, 0.9999998 / scales, 0.0)  # below 1 / scales: no code exceeds the largest
    scaled = (blocks * inverse[..., None]).flatten(-2) * (top * TINY)
    rounding = 2 ** (shift - 1) if words is None else words.int() << (4 if signed else 0)
    bits = scaled.view(torch.int32) + rounding
    positive = (bits >> 19).clamp(min=(x > 0).int())
    return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80) if signed else positive).to(torch.uint8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the float32 numbers that codes and scales from `quantize` represent."""
    shift, top = SIGNED if signed else SQUARES
    q = codes.unflatten(-1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1])).int()
    bits = ((q & 0x7F) << shift) | ((q & 0x80) << 24) if signed else q << shift
    return (bits.view(torch.float32) * (1 / (top * TINY)) * scales[..., None]).flatten(-2)


def round_stochastic(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Round float32 to the bfloat16 below or above; the mean over random words in [0, 2**16) is x."""
    bits = x.contiguous().view(torch.int32) + words.int()
    return (bits & -(2**16)).view(torch.float32).bfloat16()


def split(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 into the nearest bfloat16 and an int8 of 8 more bits, the last rounded by words in [0, 2**8)."""
    bits = (x.contiguous().view(torch.int32) + words.int()) & -(2**8)
    weight = ((bits + 2**15) & -(2**16)).view(torch.float32).bfloat16()
    return weight, rest_of(weight, bits.view(torch.float32))


def rest_of(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the int8 remainder with which `join` restores float32 x from the bfloat16 `weight` nearest to it."""
    bits, of_weight = (y.float().contiguous().view(torch.int32) for y in (x, weight))
    return ((bits - of_weight) >> 8).clamp(-128, 127).to(torch.int8)


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 number, of 24 bits, that `split` split."""
    return (weight.float().contiguous().view(torch.int32) + (remainder.int() << 8)).view(torch.float32)


def random_words(stream: int, step: torch.Tensor, first: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two 32-bit random numbers, as int64, for each element of `like`, which starts at index `first` of its
    tensor.

    Of the second number use the high bits. stream: differs between tensors. step: a scalar tensor, read without a sync.
    """
    index = torch.arange(first, first + like.numel(), device=like.device).view(like.shape)
    key = _scramble(_scramble(_scramble(torch.as_tensor(stream, device=like.device)) + step.long()) + (index >> 32))
    word = _scramble((index & MASK) ^ key)
    return word, (word * 0x2C1B3C6D) & MASK


def _scramble(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ ((x & MASK) >> shift)) * factor) & MASK
    return x ^ (x >> 16)


@triton.jit
def encode(x, scales, random, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`quantize` of x [BLOCK] with given scales [BLOCK // SIZE]."""
    inverse = tl.where(scales >= tl_MIN_SCALE, 0.9999998 / tl.maximum(scales, tl_MIN_SCALE), 0.0)
    scaled = times(x, inverse, SIZE)
    if SIGNED:
        bits = (scaled * (1.875 * tl_TINY)).to(tl.uint32, bitcast=True) + (random << 4)
        return (((bits << 4) | (bits & 0x80000000)) >> 24).to(tl.uint8)  # the bits between sign and code are 0
    else:
        bits = (scaled * (1.9375 * tl_TINY)).to(tl.uint32, bitcast=True) + random
        return tl.maximum(bits >> 19, tl.minimum(x.to(tl.uint32, bitcast=True), 1)).to(tl.uint8)


@triton.jit
def decode(codes, scales, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`dequantize` of codes [BLOCK] with scales [BLOCK // SIZE]."""
    if SIGNED:  # sign extension repeats the sign in five bits, the mask keeps one
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.875 * tl_TINY)), scales, SIZE)
    else:
        bits = codes.to(tl.uint32) << 19
        return times(bits.to(tl.float32, bitcast=True) * (1.0 / (1.9375 * tl_TINY)), scales, SIZE)


@triton.jit
def times(x, scales, SIZE: tl.constexpr):
    """Return x [BLOCK], each element multiplied by the scale of its block."""
    return tl.reshape(tl.reshape(x, [scales.shape[0], SIZE]) * scales[:, None], [x.shape[0]])


@triton.jit
def largest(x, SIZE: tl.constexpr):
    """Return the largest |x| of each block, [BLOCK // SIZE], for x [BLOCK]."""
    return tl.max(tl.reshape(tl.abs(x), [x.shape[0] // SIZE, SIZE]), axis=1)


@triton.jit
def scramble(x):
    """Return a 32-bit hash of x: `_scramble`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def words(stream, step, first, at):
    """`random_words` of the elements with indices first + at [BLOCK]."""
    key = scramble(scramble(scramble(stream.to(tl.uint32)) + step.to(tl.uint32)) + (first >> 32).to(tl.uint32))
    word = scramble((first.to(tl.uint32) + at.to(tl.uint32)) ^ key)
    return word, word * 0x2C1B3C6D


@triton.jit
def joined(weight, remainder):
    """`join`."""
    return (weight.to(tl.float32).to(tl.int32, bitcast=True) + (remainder.to(tl.int32) << 8)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def rounded(x, random):
    """`round_stochastic`."""
    bits = x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def parted(x, random):
    """`split`."""
    bits = x.to(tl.int32, bitcast=True) + (random & 0xFF).to(tl.int32)
    high = (bits + 32768) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), ((bits >> 8) - (high << 8)).to(tl.int8)
