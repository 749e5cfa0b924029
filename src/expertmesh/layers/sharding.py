"""What Transformers' FSDP2 layout does at a needless cost where experts are spread over ranks, done without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.distributed import DistributedConfig
from transformers.distributed import fsdp as stock_fsdp

from expertmesh.layers.experts import divides_gradients

SMALL = 1 / 30  # of a GPU's memory


@contextmanager
def unwrapped_experts(model: Any, layout: DistributedConfig) -> Iterator[None]:
    """While Transformers lays the model out: FSDP leaves alone the experts that lie whole on one rank.

    It would neither gather nor reduce them, but copy and divide their gradients. They divide them themselves, in the
    kernel that makes them (`experts.grad_divisor`). Replicated experts (HSDP) and other experts backends stay FSDP's.
    """
    experts = _experts_of(model)
    whole = (layout.ep_size or 1) > 1 and layout.efsdp_size == 1 and layout.dp_replicate_size == 1
    if not whole or not all(divides_gradients(module) for module in experts):
        yield
        return
    ours = {id(module) for module in experts}

    def fully_shard(module: Any, **options: Any) -> Any:
        if id(module) in ours:
            module.set_gradient_divide_factor = partial(setattr, module, "grad_divisor")  # Transformers calls it next
            return module
        parameters = {parameter for expert in experts for parameter in expert.parameters()}
        return stock(module, ignored_params=parameters, **options)

    stock = stock_fsdp.fully_shard
    stock_fsdp.fully_shard = fully_shard
    try:
        yield
    finally:
        stock_fsdp.fully_shard = stock
        for module in experts:
            vars(module).pop("set_gradient_divide_factor", None)


def keep_small_dense(model: Any) -> None:
    """Gather dense weights once per step, not again in the backward, if whole they take little of the GPU's memory."""
    if not torch.cuda.is_available():
        return
    of_experts = {parameter for expert in _experts_of(model) for parameter in expert.parameters()}
    dense = [parameter for parameter in model.parameters() if parameter not in of_experts]
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if sum(parameter.numel() * parameter.element_size() for parameter in dense) < SMALL * memory:
        for module in model.modules():
            if isinstance(module, FSDPModule) and not hasattr(module, "is_concatenated"):
                module.set_reshard_after_forward(False, recurse=False)


def _experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]
