"""A frozen weight of experts that stays in 4 bits, and is decoded when a product needs it.

`Packed` takes the parameter's place: its shape, dtype and device are those of the weight that it stands for, so that
PEFT, Trainer and `named_parameters` find what they look for. What it holds is codes and scales (four_bit.py). A product
of ours calls `decode`, which writes the whole stack into a `DecodeBuffer` that all layers of a model share. The next
`decode` overwrites that, so nothing may keep it: autograd saves the packed weight, and a backward decodes again.

Spread over ranks it is a DTensor whose local tensor is a `Packed` of this rank's experts.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from expertmesh.kernels import four_bit

aten = torch.ops.aten


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

    codes, scales: as in four_bit.py, of [E, out, in]. `copy_` of a weight into it encodes. What it knows beyond that is
    to be detached, cloned, moved, transposed, split by experts, and to take another dtype for what is decoded. All else
    raises ValueError.
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
        """Memory for a weight; nothing is written."""
        shape = tuple(weight.transpose(1, 2).shape if transposed else weight.shape)
        return cls(*four_bit.empty(format, shape, weight.device), format, weight.dtype, transposed, buffer)

    def decode(self) -> torch.Tensor:
        """The weight, in the model's buffer, where the next one overwrites it."""
        shape = torch.Size((*self.codes.shape[:2], 2 * self.codes.shape[2]))
        out = four_bit.decode(self.codes, self.scales, self.format, self.buffer.take(shape, self))
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
            four_bit.encode(weight, self.format, self.codes, self.scales)
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


def parts_of(weight: Any) -> list[torch.Tensor]:
    """[codes, scales] of a packed parameter, spread over ranks as it is."""
    held: Any = packed_in(weight)
    if not isinstance(weight, DTensor):
        return [held.codes, held.scales]
    return [
        DTensor.from_local(x, weight.device_mesh, weight.placements, run_check=False) for x in (held.codes, held.scales)
    ]
