"""The norm of all gradients of a model, on however many meshes they lie, and clipping to it."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.clip import clip_factor, scale_, squared_sum
from expertmesh.waiting import waiting

LARGE = 2**26  # bytes of a gradient that is measured by itself


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter] | nn.Parameter, max_norm: float) -> torch.Tensor:
    """Scale all gradients, in place, so that their norm is at most `max_norm`; returns the norm before, float32 scalar.

    Equals `torch.nn.utils.clip_grad_norm_` of the whole model in one process, for parameters on any mix of meshes and
    plain ones that are the same on every rank. All ranks must call it. One all-reduce of one number; the host does not
    wait. math.inf only measures.
    """
    parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
    norm = grad_norm(parameters)
    if math.isinf(max_norm):  # to measure only
        return norm
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(local(parameter.grad))
    for device, tensors in by_device.items():
        scale_(tensors, clip_factor(norm, max_norm).to(device, non_blocking=True))
    return norm


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], measured: "Measured | None" = None) -> torch.Tensor:
    """As `clip_grad_norm`, which measures by it: the norm of all gradients, which stay as they are.

    measured: what is known of some of these parameters' gradients already.
    """
    parameters, known = list(parameters), {} if measured is None else measured.squares
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.zeros((), device=grads[0].device if grads else parameters[0].device if parameters else None)
    for squares in known.values():
        total += squares
    return norm_of_all(add_squares(total, (p.grad for p in parameters if p.grad is not None and p not in known)))


class Measured:
    """Measures large gradients of one backward as they come, where what computes leaves room, as it waits for others:

        with Measured(parameters) as measured:
            loss.backward()
        norm = grad_norm(parameters, measured)

    A CUDA graph may be recorded of it: a replay measures anew. squares: this rank's part in the squared norm of each.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.squares: dict[torch.Tensor, torch.Tensor] = {}
        self._parameters = list(parameters)
        self._hooks: list[Any] = []

    def __enter__(self) -> "Measured":
        self._hooks = [p.register_post_accumulate_grad_hook(self._measure) for p in self._parameters if p.requires_grad]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        for device in {squares.device for squares in self.squares.values() if squares.is_cuda}:
            torch.cuda.current_stream(device).wait_stream(_last_stream(device))

    @torch.no_grad()
    def _measure(self, parameter: torch.Tensor) -> None:
        """A gradient is complete, or has grown."""
        grad = parameter.grad
        if grad is None or local(grad).nbytes < LARGE:
            return
        if not grad.is_cuda:
            self.squares[parameter] = squared_sum([local(grad)]) / num_copies(grad)
            return
        last = _last_stream(grad.device)
        last.wait_stream(torch.cuda.current_stream(grad.device))
        with torch.cuda.stream(last):
            self.squares[parameter] = squared_sum([local(grad)]) / num_copies(grad)


@cache
def _last_stream(device: torch.device) -> torch.cuda.Stream:
    """Of the lowest priority there is, PyTorch's default."""
    return torch.cuda.Stream(device)


def add_squares(total: torch.Tensor, grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """Adds to `total`, a float32 scalar, this rank's part in the squared norm of gradients that several may hold."""
    pieces: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
    for grad in grads:
        pieces.setdefault((num_copies(grad), grad.device), []).append(local(grad))
    for (copies, _), tensors in pieces.items():
        total += (squared_sum(tensors) / copies).to(total.device, non_blocking=True)
    return total


def norm_of_all(total: torch.Tensor) -> torch.Tensor:
    """The norm of all gradients from every rank's `add_squares`. All ranks must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:  # a rank without any gradient comes, too
        world: Any = dist.group.WORLD
        with waiting("the norm of the gradients", world):
            dist.all_reduce(total)
    return total.sqrt()


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def num_copies(grad: torch.Tensor) -> int:
    """How many ranks hold the same piece of a gradient."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(grad, DTensor):
        return ranks
    assert not any(p.is_partial() for p in grad.placements), "a gradient that is not reduced yet has no norm"
    sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
    return ranks // math.prod(size for placement, size in sizes if not placement.is_replicate())
