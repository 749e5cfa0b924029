"""Frozen expert weights stored in 4 bits and decoded when a product needs them.

A byte holds two codes. Each block of weights along the inner axis has one scale:

    w = VALUES[code] · scale          computed in float32, rounded once

NF4 (QLoRA, arXiv:2305.14314, appendix E): the values are quantiles of a normal distribution. The scale of 64 weights is
their largest magnitude, in bfloat16. MXFP4 (OCP Microscaling Formats 1.0): the values are floats with 2 exponent bits
and 1 mantissa bit. The scale of 32 weights is a power of two, stored as its exponent plus 127. GPT-OSS is published in
MXFP4, and the layout here is that of its files.

Codes are [E, out, in / 2], the first of a pair in the lower half; scales are [E, out, in / size]. The Triton kernel and
its PyTorch reference give the same bits.

`Packed` replaces the parameter. It has the shape, dtype and device of the decoded weight, as PEFT, Trainer and
`named_parameters` expect. Our products call `decode`, which writes all experts into a `DecodeBuffer` that all layers of
a model share. The next `decode` overwrites it, so no caller may keep the result: autograd saves the packed weight, and
the backward decodes again. When sharded it is a DTensor whose local tensors are `Packed`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit

aten = torch.ops.aten
WORDS = 1024  # of 8 codes each, per program


class Format(NamedTuple):
    """values: of the 16 codes. size: weights per scale. scale: dtype of the scales, uint8 for exponents."""

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
    """Write the codes and scales nearest to weights [E, out, in], in which `in` may be strided. Weights that MXFP4
    represents exactly are encoded without loss: of two exponents that can hold a block's largest weight, the one with
    the smaller squared error is chosen.
    """
    values = _values(format, weight_EOI.device)
    floats = values[:8] if format == "mxfp4" else values
    between = (floats[1:] + floats[:-1]) / 2
    for expert, weight_OI in enumerate(weight_EOI):  # one by one: temporaries are several times as large as the weights
        blocks = weight_OI.float().unflatten(-1, (-1, FORMATS[format].size))
        largest = blocks.abs().amax(-1, keepdim=True)
        if format == "nf4":
            scale = largest.bfloat16()
            code = torch.bucketize(blocks / scale.float().clamp_min(1e-38), between)
        else:
            low = largest.clamp_min(2.0**-125).log2().floor() - 2
            exponents = torch.stack([low, low + 1])
            candidates = torch.bucketize(blocks.abs() * torch.exp2(-exponents), between)
            errors = (floats[candidates] * torch.exp2(exponents) - blocks.abs()).square().sum(-1, keepdim=True)
            use_second = errors[1] < errors[0]
            code = torch.where(use_second, candidates[1], candidates[0]) + 8 * (blocks < 0)
            scale = low + 127 + use_second
        codes[expert] = (code[..., ::2] + 16 * code[..., 1::2]).flatten(-2).to(torch.uint8)
        scales[expert] = scale[..., 0]


def decode(codes: torch.Tensor, scales: torch.Tensor, format: str, out: torch.Tensor) -> torch.Tensor:
    """Write the decoded weights to `out` [..., in], contiguous, of any float dtype, and return it."""
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
    for out_OI, codes_OI, scale in zip(out, codes, scales, strict=True):  # one by one, to save memory
        pairs = torch.stack([codes_OI & 15, codes_OI >> 4], -1).flatten(-2)
        blocks = values[pairs.int()].unflatten(-1, (scale.shape[-1], -1))
        out_OI.copy_((blocks * _scale_factors(scale)[..., None]).flatten(-2))
    return out


def _scale_factors(scale: torch.Tensor) -> torch.Tensor:
    """Return the scales in float32. Powers of two are built from bits, because exp2 is not exact on every device."""
    if scale.dtype != torch.uint8:
        return scale.float()
    exponent = scale.int()
    bits = torch.where(exponent > 0, exponent << 23, 1 << 22)  # 2 ** -127 is subnormal
    return torch.where(exponent == 255, torch.nan, bits.view(torch.float32))


@cache
def _values(format: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(FORMATS[format].values, device=device)


@fast_jit
def _decode_kernel(
    words, scales, values, out, num_words, EXPONENTS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr
):
    """Decode 4 bytes of codes to one 16-byte store per thread. SIZE: words per scale."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    in_range = at < num_words
    scale = tl.load(scales + at // SIZE, mask=in_range, other=0)
    if EXPONENTS:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent > 0, exponent << 23, 1 << 22)
        factor = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        factor = scale.to(tl.float32)
    nibble = tl.arange(0, 8)
    code = (tl.load(words + at, mask=in_range, other=0)[:, None] >> (4 * nibble)[None, :]) & 15
    weight = tl.load(values + code) * factor[:, None]
    tl.store(out + at[:, None] * 8 + nibble[None, :], weight.to(out.dtype.element_ty), mask=in_range[:, None])


class DecodeBuffer:
    """Memory for the largest stack of experts' weights of a model. Allocated at the first use; grows on demand."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def take(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Return the same memory in every call, in this shape, on the device and in the dtype of `like`."""
        buffer = self._buffers.get((like.device, like.dtype))
        if buffer is None or len(buffer) < shape.numel():
            with torch.inference_mode(False):  # an inference tensor could not be written in training
                buffer = torch.empty(shape.numel(), dtype=like.dtype, device=like.device)
            self._buffers[like.device, like.dtype] = buffer
        return buffer[: shape.numel()].view(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}}  # a copied or pickled model allocates its own


class Packed(torch.Tensor):
    """Weights of experts in 4 bits, [E, out, in], or [E, in, out] if `transposed`. A tensor subclass without gradient.

    codes, scales: of [E, out, in], as above. `copy_` of a weight into it encodes the weight. It supports detach, clone,
    moves between devices, transpose(1, 2), split by experts, and another decoded dtype. All else raises ValueError.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: str
    transposed: bool
    buffer: DecodeBuffer

    @staticmethod
    def __new__(cls, codes, scales, format: str, dtype: torch.dtype, transposed: bool, buffer: DecodeBuffer) -> Any:
        """codes, scales, format, transposed, buffer: as the attributes. dtype: of the decoded weight."""
        (E, out, _), inner = codes.shape, 2 * codes.shape[2]
        shape, strides = ((E, inner, out), (1, inner)) if transposed else ((E, out, inner), (inner, 1))
        with torch.inference_mode(False):  # in inference mode autograd rejects its views
            self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, shape, (out * inner, *strides), dtype=dtype, device=codes.device, requires_grad=False
            )
        self.codes, self.scales, self.format, self.transposed, self.buffer = codes, scales, format, transposed, buffer
        return self

    @classmethod
    def like(cls, weight: torch.Tensor, format: str, transposed: bool, buffer: DecodeBuffer) -> "Packed":
        """Allocate, uninitialized, for a weight. Raise ValueError if its rows are not whole blocks."""
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
        """Return the decoded weight, in the model's shared buffer. It is valid until the next `decode` of the model."""
        shape = torch.Size((*self.codes.shape[:2], 2 * self.codes.shape[2]))
        out = decode(self.codes, self.scales, self.format, self.buffer.take(shape, self))
        return out.transpose(1, 2) if self.transposed else out

    def requires_grad_(self, requires_grad: bool = True) -> "Packed":
        """Return self; raise ValueError if `requires_grad`."""
        if requires_grad:
            raise ValueError("Experts in 4 bits are frozen and cannot be trained: train adapters on them (PEFT).")
        return self

    def _replace(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, flip: bool = False) -> "Packed":
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
        if func in _APPLIED_TO_EACH:
            dtype = kwargs.pop("dtype", None) or self.dtype
            return self._replace(*(func(part, *args[1:], **kwargs) for part in (self.codes, self.scales)), dtype)
        if func is aten.transpose.int and {axis % 3 for axis in args[1:]} == {1, 2}:
            return self._replace(self.codes, self.scales, self.dtype, flip=True)
        if func is aten.view.default and torch.Size(args[1]) == self.shape:
            return self._replace(self.codes, self.scales, self.dtype)
        if func is aten.split.Tensor and not any(args[2:]) and not kwargs:  # by experts, when sharding
            parts = zip(self.codes.split(args[1]), self.scales.split(args[1]), strict=True)
            return [self._replace(*part, self.dtype) for part in parts]
        if func is aten.copy_.default and not isinstance(args[1], Packed):
            weight = args[1].transpose(1, 2) if self.transposed else args[1]
            encode(weight, self.format, self.codes, self.scales)
            return self
        raise ValueError(
            f"Experts' weights are kept in 4 bits and do not support {func}. Only adapters on them can be trained: "
            f"to merge or change the weights, load the model without quantization."
        )


#: operations on a packed weight that are applied to its codes and to its scales
_APPLIED_TO_EACH = {getattr(aten, name).default for name in ("detach", "alias", "clone", "empty_like", "_to_copy")}


def packed_in(weight: Any) -> Packed | None:
    """Return the `Packed` that a parameter is, or that is its local shard as a DTensor; None for other parameters."""
    local = weight._local_tensor if isinstance(weight, DTensor) else weight
    return local if isinstance(local, Packed) else None
