"""A kernel that is launched again is found without Triton's own search, and only where that would find the same."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from expertmesh import backends
from expertmesh.backends import TensorDescriptor
from expertmesh.kernels import launch


class Jit:
    """In place of `triton.jit`'s: notes what is searched for, and what is launched."""

    arg_names = ["x", "n", "eps", "WIDE", "BLOCK"]

    def __init__(self):
        self.searched, self.launched = [], []

    def __getitem__(self, grid):
        def search(*arguments, **constants):
            self.searched.append((grid, arguments, constants))
            return self

        return search

    def compiled(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Compiled(Jit):
    def __getitem__(self, grid):
        if len(grid) < 3:
            return super().__getitem__(grid)
        return self.compiled(grid)


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Compiled()


def test_the_second_launch_needs_no_search_and_passes_constants_in_the_kernels_order(jit):
    kernel, x, y = launch.Kernel(jit), torch.zeros(64), torch.ones(64)
    kernel[(4,)](x, 64, 1e-6, BLOCK=8, WIDE=True, num_warps=4)
    kernel[(2, 3)](y, 64, 1e-5, BLOCK=8, WIDE=True, num_warps=4)
    assert len(jit.searched) == 1
    ((grid, arguments),) = jit.launched
    assert grid[:3] == (2, 3, 1) and arguments[0] is y and arguments[1:] == (64, 1e-5, True, 8)


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(64).double(), 64, 1e-6, True, 8, 4),
        (torch.zeros(65)[1:], 64, 1e-6, True, 8, 4),  # starts elsewhere
        (torch.nn.Parameter(torch.zeros(65))[1:], 64, 1e-6, True, 8, 4),
        (None, 64, 1e-6, True, 8, 4),
        (torch.zeros(64), 1, 1e-6, True, 8, 4),
        (torch.zeros(64), True, 1e-6, True, 8, 4),
        (torch.zeros(64), 64, 1, True, 8, 4),
        (torch.zeros(64), 64, 1e-6, False, 8, 4),
        (torch.zeros(64), 64, 1e-6, True, 16, 4),
        (torch.zeros(64), 64, 1e-6, True, 8, 8),
    ],
)
def test_whatever_triton_may_compile_differently_is_searched_for(jit, other):
    kernel = launch.Kernel(jit)
    for x, n, eps, wide, block, warps in [(torch.zeros(64), 64, 1e-6, True, 8, 4), other] * 2:
        kernel[(4,)](x, n, eps, WIDE=wide, BLOCK=block, num_warps=warps)
    assert len(jit.searched) == len(jit.launched) == 2


def test_descriptors_of_other_tiles_or_sizes_are_searched_for(jit):
    kernel, x, y = launch.Kernel(jit), torch.zeros(64, 64), torch.zeros(32, 64)
    for matrix, block in ((x, [16, 16]), (x, [16, 32]), (y, [16, 16]), (torch.ones(64, 64), [16, 16])):
        kernel[(4,)](TensorDescriptor.from_tensor(matrix, block), 64, 1e-6, WIDE=True, BLOCK=8)
    assert len(jit.searched) == 3 and len(jit.launched) == 1


def test_another_device_is_searched_for(jit, monkeypatch):
    kernel = launch.Kernel(jit)
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        kernel[(4,)](torch.zeros(64), 64, 1e-6, WIDE=True, BLOCK=8)
    assert len(jit.searched) == 2


def test_sizes_that_never_come_again_do_not_fill_the_memory(jit, monkeypatch):
    monkeypatch.setattr(launch, "MAX_ENTRIES", 8)
    kernel = launch.Kernel(jit)
    for n in range(2, 100):
        kernel[(4,)](torch.zeros(64), n, 1e-6, WIDE=True, BLOCK=8)
    assert len(kernel._cache) <= 8 and len(jit.searched) == 98


def test_an_interpreted_function_is_the_interpreters_to_launch():
    def add(x):
        return x

    launched = launch.fast_jit(add)[(1,)]
    assert (getattr(getattr(launched, "func", None), "__func__", None) is launch.Kernel._launch) == (
        os.environ["TRITON_INTERPRET"] != "1"
    )


def test_a_watched_launch_is_told_of_and_launches_nothing(jit, monkeypatch):
    told = []
    monkeypatch.setattr(backends, "watching", (lambda *launch, **constants: told.append((*launch, constants)), 2**30))
    launch.Kernel(jit)[(4,)](1, 2, BLOCK=8)
    assert told == [(jit, 1, 2, {"BLOCK": 8})] and jit.searched == []


def test_compiled_code_launches_as_eager_code_does(jit, monkeypatch):
    kernel = launch.Kernel(jit)
    monkeypatch.setattr(jit, "compiled", lambda grid: lambda x, out, *_: out.copy_(2 * x))

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = torch.empty_like(x)
            kernel[(1,)](x, out, 1e-6, WIDE=True, BLOCK=8)
            return out

        @staticmethod
        def backward(ctx, dout):
            dx = torch.empty_like(dout)
            kernel[(1,)](dout.contiguous(), dx, 1e-6, WIDE=True, BLOCK=8)
            return dx

    @torch.compile(backend="aot_eager")
    def run(x):
        return Double.apply(x.sin()).cos().sum()

    for _ in range(3):  # the first launch is the search, which here computes nothing
        x = torch.randn(64, requires_grad=True)
        run(x).backward()
    want = torch.autograd.grad((2 * x.sin()).cos().sum(), x)[0]
    torch.testing.assert_close(x.grad, want)
    assert len(jit.searched) == 1 and len(jit.launched) == 0


def test_no_parameter_has_a_name_that_triton_takes_for_itself():
    """Triton writes a function around each kernel, whose own names these are; its interpreter does not."""
    kernels = {}
    for file in Path(launch.__file__).parent.glob("*.py"):
        for name, found in vars(importlib.import_module(f"expertmesh.kernels.{file.stem}")).items():
            kernel = getattr(found, "jit", found)  # of `fast_jit` or of Triton
            if hasattr(kernel, "arg_names"):
                kernels[name] = set(kernel.arg_names)
    taken = {"options", "backend", "specialize_impl", "JITCallable", "grid", "warmup"}
    assert len(kernels) > 30
    assert not {name for name, parameters in kernels.items() if taken & parameters}
