"""Triton kernels that are launched with less of the CPU's work.

At every launch Triton classifies all arguments, writes their classes and all options out as text, and looks the
compiled kernel up by that, and a layer's forward and backward are two dozen launches. A `Kernel` finds it by what it
can see at once, and sees more than Triton asks for: the values of numbers instead of their divisibility, and alignment
up to 64 bytes. So what it finds is what Triton would find.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from expertmesh import backends
from expertmesh.backends import TensorDescriptor, triton

MOST = 4096  # launches that a kernel remembers; sizes that are never the same again must not fill the memory


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 for a CPU, where the interpreter plays both."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def fast_jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a function that is launched, not called by others."""
    return Kernel(triton.jit(function))


class Kernel:
    """`kernel[grid](*arguments, **constants)`: tensors, descriptors and numbers by position, then all constants and
    launch options by name.

    To `torch.compile` a launch is opaque: its own way to compile Triton kernels makes doubles of numbers, and copies of
    a tensor that is passed twice.
    """

    def __init__(self, jit: Any) -> None:
        self.jit, self._interpreted = jit, type(jit).__name__ == "InterpretedFunction"
        self._known: dict[tuple, tuple[Any, list[Any]]] = {}
        self._opaque = torch.compiler.disable(self._launch)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if backends.watching is not None:
            return partial(backends.watching[0], self.jit)
        if self._interpreted:
            return self.jit[grid]
        if torch.compiler.is_compiling():
            return partial(self._opaque, grid)
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        looks = [_LOOKS.get(type(argument), _of_tensor)(argument) for argument in arguments]
        key = (torch.cuda.current_device(), *looks, *constants, *constants.values())
        if found := self._known.get(key):
            compiled, rest = found
            compiled[(*grid, 1, 1)](*arguments, *rest)
            return
        assert not any(isinstance(value, (torch.Tensor, float)) for value in constants.values()), "by position, please"
        compiled = self.jit[grid](*arguments, **constants)
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[key] = compiled, [constants[name] for name in self.jit.arg_names[len(arguments) :]]


def _of_tensor(x: torch.Tensor) -> tuple[torch.dtype, int]:
    return x.dtype, x.data_ptr() % 64


#: what decides how an argument of a type is compiled; others are tensors, of any subclass
_LOOKS: dict[type, Callable[[Any], Any]] = {
    int: lambda number: number,
    bool: lambda flag: (bool, flag),  # True is 1 elsewhere, but not to Triton
    float: lambda number: float,
    type(None): lambda none: None,
    TensorDescriptor: lambda x: (*_of_tensor(x.base), *x.block_shape, *x.shape, *x.strides, x.padding),
}
