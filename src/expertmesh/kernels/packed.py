"""Frozen weights of experts that stay in 4 bits, and are decoded when a product needs them.

Two codes are a byte, and each block of weights along the inner axis has a scale:

    w = VALUES[code] · scale          rounded once, from float32

NF4 (QLoRA, arXiv:2305.14314, appendix E): the values are quantiles of a normal distribution, the scale is the largest
magnitude of 64 weights, in bfloat16. MXFP4 (OCP Microscaling Formats 1.0): the values are the floats of 2 bits of
exponent and 1 of mantissa, the scale is a power of two for 32 weights, of which the exponent, plus 127, is kept. It is
how GPT-OSS is published, and the layout here is that of its files.

Codes [E, out, in / 2], the first of two in the lower half; scales [E, out, in / size]. The PyTorch reference stands
beside the kernel, and both give the same bits.

`Packed` takes the parameter's place: its shape, dtype and device are those of the weight that it stands for, so that
PEFT, Trainer and `named_parameters` find what they look for. A product of ours calls its `decode`, which writes the
whole stack into a `DecodeBuffer` that all layers of a model share. The next overwrites that, so nothing may keep it:
autograd saves the packed weight, and a backward decodes again. Spread over ranks it is a DTensor of `Packed` parts.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit

aten = torch.ops.aten
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


@fast_jit
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


class DecodeBuffer:
    """Memory for the largest stack of experts' weights of a model; made at the first use, and anew for a larger one."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def take(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Memory of this shape on the device and in the dtype of `like`: the same in every call."""
        made = self._made.get((like.device, like.dtype))
        if made is None or len(made) < shape.numel():
            with torch.inference_mode(False):  # to be written in training, too
                made = torch.empty(shape.numel(), dtype=like.dtype, device=like.device)
            self._made[like.device, like.dtype] = made
        return made[: shape.numel()].view(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}  # a copied or pickled model makes its own


class Packed(torch.Tensor):
    """Weights [E, out, in] of experts, or [E, in, out] if `transposed`, in 4 bits. It has no gradient.

    codes, scales: of [E, out, in], as above. `copy_` of a weight into it encodes. It can be detached, cloned, moved,
    transposed, split by experts, and take another dtype for what is decoded. All else raises ValueError.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: str
    transposed: bool
    buffer: DecodeBuffer

    @staticmethod
    def __new__(cls, codes, scales, format: str, dtype: torch.dtype, transposed: bool, buffer: DecodeBuffer) -> Any:
        """codes, scales, format, buffer: as the attributes. dtype: of what is decoded."""
        (E, out, _), inner = codes.shape, 2 * codes.shape[2]
        shape, strides = ((E, inner, out), (1, inner)) if transposed else ((E, out, inner), (inner, 1))
        with torch.inference_mode(False):  # there autograd takes no view of it that was made by Python
            self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, shape, (out * inner, *strides), dtype=dtype, device=codes.device, requires_grad=False
            )
        self.codes, self.scales, self.format, self.transposed, self.buffer = codes, scales, format, transposed, buffer
        return self

    @classmethod
    def like(cls, weight: torch.Tensor, format: str, transposed: bool, buffer: DecodeBuffer) -> "Packed":
        """Memory for a weight; nothing is written. Raises ValueError if its rows are not whole blocks."""
        (E, out, inner), size = (weight.transpose(1, 2) if transposed else weight).shape, FORMATS[format].size
        if inner % size:
            raise ValueError(
                f"Experts with rows of {inner} weights cannot be packed in {format}, which takes blocks of {size}: "
                f"load the model without quantization."
            )
        codes = torch.empty(E, out, inner // 2, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(E, out, inner // size, dtype=FORMATS[format].scale, device=weight.device)
        return cls(codes, scales, format, weight.dtype, transposed, buffer)

    def decode(self) -> torch.Tensor:
        """The weight, in the model's buffer, where the next one overwrites it."""
        shape = torch.Size((*self.codes.shape[:2], 2 * self.codes.shape[2]))
        out = decode(self.codes, self.scales, self.format, self.buffer.take(shape, self))
        return out.transpose(1, 2) if self.transposed else out

    def requires_grad_(self, requires_grad: bool = True) -> "Packed":
        """As of a tensor, but it can only be False."""
        if requires_grad:
            raise ValueError("Experts in 4 bits are frozen and cannot be trained: train adapters on them (PEFT).")
        return self

    def _with(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, flip: bool = False) -> "Packed":
        return Packed(codes, scales, self.format, dtype, self.transposed != flip, self.buffer)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Packed({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.format, self.dtype, self.transposed, self.buffer)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], rest: Any, *_: Any) -> "Packed":
        return Packed(inner["codes"], inner["scales"], *rest)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs, self = dict(kwargs or {}), args[0]
        if func in _OF_EACH:
            dtype = kwargs.pop("dtype", None) or self.dtype
            return self._with(*(func(part, *args[1:], **kwargs) for part in (self.codes, self.scales)), dtype)
        if func is aten.transpose.int and {axis % 3 for axis in args[1:]} == {1, 2}:
            return self._with(self.codes, self.scales, self.dtype, flip=True)
        if func is aten.view.default and torch.Size(args[1]) == self.shape:
            return self._with(self.codes, self.scales, self.dtype)
        if func is aten.split.Tensor and not any(args[2:]) and not kwargs:  # along the experts, for ranks
            parts = zip(self.codes.split(args[1]), self.scales.split(args[1]), strict=True)
            return [self._with(*part, self.dtype) for part in parts]
        if func is aten.copy_.default and not isinstance(args[1], Packed):
            weight = args[1].transpose(1, 2) if self.transposed else args[1]
            encode(weight, self.format, self.codes, self.scales)
            return self
        raise ValueError(
            f"Experts' weights are kept in 4 bits, where {func} is not known. They are for adapters to be trained on; "
            f"to merge or change them, load the model without quantization."
        )


#: what is done to a packed weight by doing it to its codes and to its scales
_OF_EACH = {getattr(aten, name).default for name in ("detach", "alias", "clone", "empty_like", "_to_copy")}


def packed_in(weight: Any) -> Packed | None:
    """The packed weight that a parameter is, or of which it holds this rank's experts; None of any other parameter."""
    held = weight._local_tensor if isinstance(weight, DTensor) else weight
    return held if isinstance(held, Packed) else None
