"""Launch Triton kernels with less work on the CPU.

At every launch, two dozen for a layer's forward and backward, Triton classifies all arguments, writes their classes and
all options into a string, and looks the compiled kernel up by it. `Kernel` puts a cheaper cache in front. Its key is
finer than Triton's: values of integers instead of their divisibility, and alignment up to 64 bytes. So a hit always
returns the kernel that Triton would choose.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from expertmesh import backends
from expertmesh.backends import TensorDescriptor, triton

MAX_ENTRIES = 4096  # of a kernel's cache; bounds memory when sizes change at every launch


@cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU; 2 for a CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def fast_jit(function: Callable[..., Any]) -> Any:
    """Decorate like `triton.jit`, but with cached launches. Not for functions that other kernels call."""
    return Kernel(triton.jit(function))


class Kernel:
    """Launcher, called as `kernel[grid](*arguments, **constants)`: tensors, descriptors and numbers by position, then
    all constexpr parameters and launch options by keyword.

    `torch.compile` treats a launch as a graph break. Its own support of Triton kernels turns numbers into doubles, and
    copies a tensor that is passed twice.
    """

    def __init__(self, jit: Any) -> None:
        self.jit, self._interpreted = jit, type(jit).__name__ == "InterpretedFunction"
        self._cache: dict[tuple, tuple[Any, list[Any]]] = {}
        self._launch_uncompiled = torch.compiler.disable(self._launch)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if backends.watching is not None:
            return partial(backends.watching[0], self.jit)
        if self._interpreted:
            return self.jit[grid]
        if torch.compiler.is_compiling():
            return partial(self._launch_uncompiled, grid)
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        arguments_key = [_KEY_OF_TYPE.get(type(argument), _tensor_key)(argument) for argument in arguments]
        key = (torch.cuda.current_device(), *arguments_key, *constants, *constants.values())
        if cached := self._cache.get(key):
            compiled, rest = cached
            compiled[(*grid, 1, 1)](*arguments, *rest)
            return
        assert not any(isinstance(value, (torch.Tensor, float)) for value in constants.values()), "pass it by position"
        compiled = self.jit[grid](*arguments, **constants)
        if len(self._cache) >= MAX_ENTRIES:
            self._cache.clear()
        self._cache[key] = compiled, [constants[name] for name in self.jit.arg_names[len(arguments) :]]


def _tensor_key(x: torch.Tensor) -> tuple[torch.dtype, int]:
    return x.dtype, x.data_ptr() % 64


#: by type of argument: its part of the cache key; all other types are subclasses of Tensor
_KEY_OF_TYPE: dict[type, Callable[[Any], Any]] = {
    int: lambda number: number,
    bool: lambda flag: (bool, flag),  # True == 1 in Python, but Triton compiles them differently
    float: lambda number: float,
    type(None): lambda none: None,
    TensorDescriptor: lambda x: (*_tensor_key(x.base), *x.block_shape, *x.shape, *x.strides, x.padding),
}
