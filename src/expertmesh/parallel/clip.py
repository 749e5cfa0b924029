"""The norm of all gradients of a model, on however many meshes they lie, and clipping to it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.clip import clip_factor, scale_, squared_sum
from expertmesh.timeouts import step_timeout


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter] | nn.Parameter, max_norm: float) -> torch.Tensor:
    """Scale all gradients, in place, so that their norm is at most `max_norm`; returns the norm before, float32 scalar.

    Equals `torch.nn.utils.clip_grad_norm_` of the whole model in one process, for parameters on any mix of meshes and
    plain ones that are the same on every rank. All ranks must call it. One all-reduce of one number; the host does not
    wait. math.inf only measures.
    """
    parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
    norm = grad_norm(parameters)
    if not math.isinf(max_norm):
        scale_([local_shard(p.grad) for p in parameters if p.grad is not None], clip_factor(norm, max_norm))
    return norm


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """As `clip_grad_norm`, which measures by it: the norm of all gradients, which stay as they are."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.zeros((), device=grads[0].device if grads else parameters[0].device if parameters else None)
    for (copies, _), tensors in local_shards(grads).items():
        total += (squared_sum(tensors) / copies).to(total.device, non_blocking=True)
    return norm_of_all(total)


def local_shards(grads: Iterable[torch.Tensor]) -> dict[tuple[int, torch.device], list[torch.Tensor]]:
    """This rank's pieces of gradients, by how many ranks hold the same and by where they are."""
    found: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for grad in grads:
        partial = isinstance(grad, DTensor) and any(each.is_partial() for each in grad.placements)
        assert not partial, "a gradient that is not reduced yet has no norm"
        found.setdefault((ranks // num_shards(grad), grad.device), []).append(local_shard(grad))
    return found


def norm_of_all(total: torch.Tensor) -> torch.Tensor:
    """The norm of all gradients from every rank's part of its square, a float32 scalar. All ranks must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:  # a rank without any gradient comes, too
        world: Any = dist.group.WORLD
        with step_timeout("the norm of the gradients", world):
            dist.all_reduce(total)
    return total.sqrt()


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def num_shards(x: torch.Tensor, dim: int | None = None) -> int:
    """In how many parts ranks share out a tensor, or one dimension of it."""
    of_ranks: Any = zip(x.placements, x.device_mesh.shape, strict=True) if isinstance(x, DTensor) else ()
    return math.prod(size for each, size in of_ranks if not each.is_replicate() and dim in (None, each.dim))
