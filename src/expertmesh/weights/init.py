"""Random initialization of a sharded or packed model, with the same weights under every layout."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation

from expertmesh.kernels.packed import Packed


@torch.no_grad()
def initialise_shards(model: PreTrainedModel, device: Any) -> None:
    """Initialize a sharded or packed model on the meta device by Transformers' rules, equally under every layout. Every
    rank draws all weights from rank 0's seed, one layer at a time, and keeps its shard. All ranks must call it."""
    model.to_empty(device=device)
    seed = torch.randint(2**62, (1,), device=device)
    if dist.is_initialized():
        dist.broadcast(seed, 0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        _initialise(model, model, whole=False)
    model.tie_weights(recompute_mapping=False)


def _initialise(module: nn.Module, owner: PreTrainedModel, whole: bool) -> None:
    """Initialize children first, as Transformers does. whole: the parameters below `module` are unsharded already."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    is_container = isinstance(module, (PreTrainedModel, nn.ModuleList))
    with contextlib.nullcontext() if whole else _in_full(module, recurse=not is_container):
        for child in module.children():
            _initialise(child, owner, whole or not is_container)
        owner._initialize_weights(module, owner.is_custom_code())


@contextlib.contextmanager
def _in_full(module: nn.Module, recurse: bool) -> Iterator[None]:
    """Context manager that replaces sharded and packed parameters by whole, empty ones, and stores them back after."""
    shards: list[tuple[nn.Module, str, Any]] = [
        (part, name, param)
        for part in (module.modules() if recurse else [module])
        for name, param in part._parameters.items()
        if isinstance(param, DTensor | Packed)
    ]
    for part, name, param in shards:
        part._parameters[name] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=param.device))
    yield
    for part, name, param in shards:
        full: Any = part._parameters[name]
        if isinstance(param, Packed):
            param.copy_(full)
        else:
            param._local_tensor.copy_(DtensorShardOperation(param).shard_tensor(full))
        part._parameters[name] = param
