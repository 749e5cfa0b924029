"""Numbers in 8 bits with a scale for each block, stochastic rounding, and the random numbers for it.

    x = scale (q / Q)^4,  scale = largest |x| of the block,  q = -127..127 (Q = 127) or, of squares, 0..255 (Q = 255)

The fourth power keeps what is small beside the block's largest: down to 1e-9 of it, and a square that is not 0 never
becomes 0. Two square roots find q, no table. Blockwise as in Dettmers et al., https://arxiv.org/abs/2110.02861;
a power in place of their table as in FlashOptim, https://arxiv.org/abs/2602.23349.

Rounding is stochastic, so that the mean of many steps is exact: a change of a moment in one step is smaller than the
distance of two codes, and rounded to the nearest it would never come. Random numbers are a hash of stream, step and
the element's place in the whole tensor (Wellons' lowbias32): the same in every run, on every replica, and on a GPU made
where they are needed. Every function here that has a PyTorch twin stands beside it.
"""

import torch

from expertmesh.backends import tl, triton

MASK = 2**32 - 1
LEAST = 1.2e-38  # the smallest scale whose inverse float32 can hold
NEAREST = 0.5  # in the place of random numbers
tl_LEAST = tl.constexpr(LEAST)


def quantize(x: torch.Tensor, size: int, signed: bool, random: torch.Tensor | float = NEAREST) -> tuple:
    """(codes of x's shape in int8 or uint8, scales [..., N / size] in float32) of x [..., N] in blocks along N.

    random: [0, 1) for each element; without, codes are the nearest ones. Nearest codes of what codes stand for are
    these codes, and their scales these scales, bit for bit.
    """
    top = 127 if signed else 255
    blocks = x.float().unflatten(-1, (x.shape[-1] // size, size))
    scales = blocks.abs().amax(-1)
    inverse = torch.where(scales >= LEAST, 1.0000002 / scales, 0.0)  # a little more: the largest must not fall short
    y = (blocks.abs() * inverse[..., None]).clamp(max=1.0).flatten(-2)
    q = (y.sqrt().sqrt() * top).floor().clamp(max=top - 1)
    low, high = _level(q, top), _level(q + 1, top)
    q += random * (high - low) < y - low
    q = torch.where(x < 0, -q, q) if signed else torch.where(x > 0, q.clamp(min=1), q)
    return q.to(torch.int8 if signed else torch.uint8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `quantize` made codes and scales of, in float32."""
    q = codes.unflatten(-1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1])).float()
    x = _level(q, 127 if codes.dtype == torch.int8 else 255) * scales[..., None]
    return torch.where(q < 0, -x, x).flatten(-2)


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

    stream: tells tensors apart. step: a scalar, for which the host does not wait.
    """
    place = torch.arange(first, first + like.numel(), device=like.device).view(like.shape)
    key = _scramble(_scramble(_scramble(torch.as_tensor(stream, device=like.device)) + step.long()) + (place >> 32))
    one = _scramble((place & MASK) ^ key)
    return one, ((one ^ (one >> 15)) * 0x2C1B3C6D) & MASK


def _scramble(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ ((x & MASK) >> shift)) * factor) & MASK
    return x ^ (x >> 16)


def _level(q: torch.Tensor, top: int) -> torch.Tensor:
    share = q * (1 / top)
    return (share * share) * (share * share)


@triton.jit
def encode(x, scales, random, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`quantize` of x [BLOCK], whose scales [BLOCK // SIZE] are known, with random words of 16 bits."""
    TOP: tl.constexpr = 127 if SIGNED else 255
    inverse = tl.where(scales >= tl_LEAST, 1.0000002 / tl.maximum(scales, tl_LEAST), 0.0)
    y = tl.minimum(times(tl.abs(x), inverse, SIZE), 1.0)
    q = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(y)) * TOP), TOP - 1.0)
    low, high = level(q, TOP), level(q + 1.0, TOP)
    q += tl.where(random.to(tl.float32) * 0.0000152587890625 * (high - low) < y - low, 1.0, 0.0)
    if SIGNED:
        return tl.where(x < 0.0, -q, q).to(tl.int32).to(tl.int8)
    else:
        return tl.where(x > 0.0, tl.maximum(q, 1.0), q).to(tl.int32).to(tl.uint8)


@triton.jit
def decode(codes, scales, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """`dequantize` of codes [BLOCK] by scales [BLOCK // SIZE]."""
    q = codes.to(tl.float32)
    x = level(q, 127 if SIGNED else 255)
    if SIGNED:
        x = tl.where(q < 0.0, -x, x)
    return times(x, scales, SIZE)


@triton.jit
def level(q, TOP: tl.constexpr):
    """(q / TOP)^4"""
    share = q * (1.0 / TOP)
    return (share * share) * (share * share)


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
    return one, (one ^ (one >> 15)) * 0x2C1B3C6D


@triton.jit
def joined(weight, remainder):
    """`join`"""
    return (weight.to(tl.float32).to(tl.int32, bitcast=True) + (remainder.to(tl.int32) << 8)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def rounded(x, random):
    """`round_stochastic`, still in float32."""
    return ((x.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parted(x, random):
    """`split`, the weight still in float32."""
    bits = (x.to(tl.int32, bitcast=True) + (random & 0xFF).to(tl.int32)) & -256
    weight = (bits + 32768) & -65536
    return weight.to(tl.float32, bitcast=True), ((bits - weight) >> 8).to(tl.int8)
