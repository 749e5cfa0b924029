"""The global gradient norm of a model whose parameters may be on different meshes, and clipping to it."""

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
    """Scale all gradients in place so that their norm is at most `max_norm`. Return the norm before, a float32 scalar.

    Equal to `torch.nn.utils.clip_grad_norm_` of the unsharded model. Parameters may be on different meshes; plain
    tensors must be the same on every rank. All ranks must call it. It all-reduces one number, without synchronizing
    with the host. math.inf only measures.
    """
    parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
    norm = grad_norm(parameters)
    if not math.isinf(max_norm):
        scale_([local_shard(p.grad) for p in parameters if p.grad is not None], clip_factor(norm, max_norm))
    return norm


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients, a float32 scalar, without changing them. All ranks must call it."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.zeros((), device=grads[0].device if grads else parameters[0].device if parameters else None)
    for (copies, _), tensors in local_shards(grads).items():
        total += (squared_sum(tensors) / copies).to(total.device, non_blocking=True)
    return norm_of_all(total)


def local_shards(grads: Iterable[torch.Tensor]) -> dict[tuple[int, torch.device], list[torch.Tensor]]:
    """Group this rank's shards of gradients by (number of ranks that hold the same shard, device)."""
    shards: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for grad in grads:
        partial = isinstance(grad, DTensor) and any(each.is_partial() for each in grad.placements)
        assert not partial, "a gradient that is not reduced yet has no norm"
        shards.setdefault((ranks // num_shards(grad), grad.device), []).append(local_shard(grad))
    return shards


def norm_of_all(total: torch.Tensor) -> torch.Tensor:
    """Return the norm of all gradients. total: this rank's part of its square, overwritten. All ranks must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:  # also on a rank without gradients
        world: Any = dist.group.WORLD
        with step_timeout("the norm of the gradients", world):
            dist.all_reduce(total)
    return total.sqrt()


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor; a plain tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def num_shards(x: torch.Tensor, dim: int | None = None) -> int:
    """Return the number of shards of a tensor, or of one dimension of it. A plain tensor has one."""
    mesh_dims: Any = zip(x.placements, x.device_mesh.shape, strict=True) if isinstance(x, DTensor) else ()
    return math.prod(size for each, size in mesh_dims if not each.is_replicate() and dim in (None, each.dim))
