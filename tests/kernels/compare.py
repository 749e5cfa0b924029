"""Compares the outputs and gradients of a kernel, interpreted on the CPU, with those of its reference."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import fixed_cross_entropy

from expertmesh import backends
from expertmesh.layers.head import causal_lm_loss, deferred_logits

Outputs = torch.Tensor | Sequence[torch.Tensor]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives nan within this context, so an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def on_triton() -> Iterator[None]:
    """CPU tensors take the Triton path, interpreted, with poisoned memory. Skips where the interpreter is off."""
    if not backends.HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton with TRITON_INTERPRET=1")
    with backends.interpreted(), poisoned():
        yield


def outputs_and_grads(fn: Callable[..., Outputs], *leaves: torch.Tensor) -> list[torch.Tensor]:
    """fn's outputs, then the gradients of all leaves that require one, for fixed random gradients of the outputs."""
    result = fn(*leaves)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    output_grads = [
        torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device).to(y.dtype) for y in outputs
    ]
    grads = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], output_grads)
    return [*(y.detach() for y in outputs), *grads]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    assert got.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30).double()
    return float((got.double() - expected.double()).abs().max() / scale)


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = 2e-6) -> None:
    """Same shapes, dtypes and, within the tolerance relative to each tensor's largest value, the same values."""
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    errors = [error(g, e) for g, e in zip(got, expected, strict=True)]
    assert all(e <= tolerance for e in errors), errors


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).requires_grad_()


def linear_cross_entropy(hidden, weight, labels, bias=None, num_items_in_batch=None, statistics=None):
    """The head's loss of hidden states [N, H] and labels [N], without logits; its statistics join the list."""
    logits = deferred_logits(hidden, weight, bias)
    counts = statistics is not None
    loss = causal_lm_loss(logits, labels, len(weight), num_items_in_batch, shift_labels=labels, counts=counts)
    if counts:
        statistics.append(logits.statistics)
    return loss


def linear_cross_entropy_reference(hidden, weight, labels, bias=None, **options):
    """Transformers' loss of all logits at once."""
    return fixed_cross_entropy(F.linear(hidden, weight, bias).float(), labels, **options)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.kernels = backward
        return forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        return None, None, *ctx.kernels(dy, *ctx.saved_tensors)


def differentiable(forward: Callable, backward: Callable) -> Callable[..., torch.Tensor]:
    """A function of tensors made of two: y = forward(*inputs) and gradients = backward(dy, *inputs)."""
    return lambda *inputs: _Differentiable.apply(forward, backward, *inputs)
