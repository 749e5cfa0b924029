"""Save and load optimizer state, sharded like its parameters and keyed by their names, so that the layout may change.

torch's own `get_optimizer_state_dict` runs a step with zero gradients to create the state it loads into, and
`Optimizer.load_state_dict` casts state to the dtype of the parameters. This module creates the state from the
checkpoint's metadata instead, so there is no step, and the loaded state is exactly what was saved.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from expertmesh.memory.adamw import IMPLEMENTATION, AdamW
from expertmesh.parallel import ranks
from expertmesh.parallel.clip import local_shard, num_shards

FOLDER = "optimizer"  # subfolder of a checkpoint
GROUPS = "groups.pt"  # file in FOLDER
FILE = 2**32  # bytes of a file; PyTorch needs twice as much memory to write it
PER_GROUP = {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"}
NUMBER = int | float | None
Named = dict[str, nn.Parameter]


def is_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all parameters of the optimizer are the model's. Layer-wise optimizers have placeholders instead."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]} <= {*model.parameters()}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({"parameter/key": tensor}, everything else) of the optimizer's state. All ranks must call it. Tensors
    have placements that torch.distributed.checkpoint supports. The second dict has the groups' options, the group
    number of each parameter by name, as the groups may depend on the layout, and state that is a number."""
    named = _parameters_by_name(model, optimizer)
    if isinstance(optimizer, AdamW):
        optimizer.settle()
    tensors: dict[str, Any] = {}
    numbers: dict[str, dict[str, NUMBER]] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = _reshard(value, _unstrided(getattr(value, "placements", ()))).contiguous()
            elif isinstance(value, NUMBER):
                numbers.setdefault(name, {})[key] = value
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of every parameter, which "
                    f"cannot be saved: save without the optimizer, or take one whose state is tensors and numbers."
                )
    groups = optimizer.param_groups
    options = [{key: value for key, value in g.items() if key not in ("params", "param_names")} for g in groups]
    number_of = {parameter: number for number, g in enumerate(groups) for parameter in g["params"]}
    group_of = {name: number_of[parameter] for name, parameter in named.items()}
    return tensors, {"options": options, "of": group_of, "numbers": numbers, "tensors": list(tensors)}


def write_optimizer(folder: Path, tensors: dict[str, Any], groups: dict[str, Any], group: Any = None) -> None:
    """Write the results of `state_of` into `folder/optimizer`. All ranks of `group` must call it."""
    folder = folder / FOLDER
    folder.mkdir(exist_ok=True)
    sizes = accumulate(local_shard(value).nbytes for value in tensors.values())
    files = defaultdict(int, zip(tensors, (1 + size // FILE for size in sizes), strict=True))  # 0: not on rank 0
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    _all_ranks(dcp.save, tensors, storage_writer=writer, process_group=group)
    if ranks.rank(group) == 0:
        torch.save(groups, folder / GROUPS)


@torch.no_grad()
def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Replace the optimizer's state and options by the checkpoint's. All ranks must call it; each reads its shards.
    Return for each parameter group the number of the saved group that it continues. Raises ValueError if the checkpoint
    has other parameters, or if a group would get two different sets of options."""
    folder, named = checkpoint / FOLDER, _parameters_by_name(model, optimizer)
    groups = torch.load(folder / GROUPS, map_location="cpu", weights_only=True)
    if groups["of"].keys() != named.keys():
        odd = sorted(groups["of"].keys() ^ named.keys())[0]
        raise ValueError(
            f"The optimizer in {checkpoint} has other parameters: only the "
            f"{'optimizer' if odd in named else 'checkpoint'} has {odd}. Freeze parameters as in the run that saved it."
        )
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    if not saved.keys() >= set(groups["tensors"]):
        raise ValueError(f"{folder} has lost some of its files: resume from the checkpoint before.")
    tensors = _to_load(saved, named, optimizer)
    _all_ranks(dcp.load, tensors, storage_reader=reader)
    optimizer.state.clear()
    for name, numbers in groups["numbers"].items():
        optimizer.state[named[name]] |= numbers
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        optimizer.state[named[name]][key] = _reshard(value, _placements(named[name], value.shape))
    names = {parameter: name for name, parameter in named.items()}
    order = []
    for group in optimizer.param_groups:
        numbers = [groups["of"][names[parameter]] for parameter in group["params"]]
        options = [groups["options"][number] for number in dict.fromkeys(numbers)]
        if any(other != options[0] for other in options):
            raise ValueError(
                f"A parameter group of the optimizer joins parameters that had different options in {checkpoint}: "
                f"group them as in the run that saved it."
            )
        if options:
            group.update({key: value for key, value in options[0].items() if key not in IMPLEMENTATION})
        order.append(numbers[0] if numbers else 0)
    return order


def regrouped(state: Any, order: list[int]) -> Any:
    """Reorder the values per group in a scheduler's state by the `order` that `load_optimizer` returned."""
    if isinstance(state, dict):
        per_group = {key: value for key, value in state.items() if key in PER_GROUP and isinstance(value, list)}
        more = {key: [value[number] for number in order] for key, value in per_group.items()}
        return {key: regrouped(value, order) for key, value in state.items()} | more
    return [regrouped(item, order) for item in state] if isinstance(state, list) else state  # SequentialLR has a list


def _all_ranks(do: Callable, tensors: dict[str, Any], **options: Any) -> None:
    """Call dcp.save or dcp.load, also without torch.distributed. Raise the first rank's own error, because PyTorch's
    CheckpointException is a BaseException, which callers do not catch."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        do(tensors, **options)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _parameters_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> Named:
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    except KeyError:
        raise ValueError("The optimizer has parameters that are not the model's: build it from this model's.") from None


def _to_load(saved: dict[str, Any], named: Named, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Create empty state tensors, sharded like the parameters, for all tensors in the checkpoint."""
    groups = [group for group in optimizer.param_groups if group.get("capturable") or group.get("fused")]
    on_device = {parameter for group in groups for parameter in group["params"]}
    tensors: dict[str, Any] = {}
    for path, entry in saved.items():
        name, _, key = path.rpartition("/")
        parameter = named[name]
        shape, dtype = entry.size, entry.properties.dtype
        if not shape:  # the step count: PyTorch keeps it on the device if its kernel reads it
            tensors[path] = torch.empty((), dtype=dtype, device=parameter.device if parameter in on_device else "cpu")
        elif not isinstance(parameter, DTensor):
            place = optimizer.form(parameter).place if isinstance(optimizer, AdamW) else {"device": parameter.device}
            tensors[path] = torch.empty(shape, dtype=dtype, **place)
        elif shape[:-1] == parameter.shape[:-1]:  # elementwise state, or scales of blocks
            mesh, placements = parameter.device_mesh, _unstrided(_placements(parameter, shape))
            tensors[path] = empty_dtensor(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        else:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} in the shape {tuple(shape)}, the parameter is "
                f"{tuple(parameter.shape)}: such state cannot be loaded into a sharded model. Resume in one process."
            )
    return tensors


def _unstrided(placements: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace the strided shards of FSDP2 over EP and TP by contiguous ones, because files support no others."""
    return tuple(each if each.is_replicate() else Shard(each.dim) for each in placements)


def _placements(parameter: Any, shape: torch.Size) -> tuple[Any, ...]:
    """Return the placements of state of this shape: the parameter's, but uneven rows of scales are replicated."""
    placements = getattr(parameter, "placements", ()) if shape else ()
    if shape == parameter.shape or not placements:
        return placements
    row = len(shape) - 1
    if shape[-1] % num_shards(parameter, row) == 0:
        return placements
    return tuple(Replicate() if each.is_replicate() or each.dim == row else each for each in placements)


def _reshard(value: Any, placements: tuple[Any, ...]) -> Any:
    is_other = isinstance(value, DTensor) and value.placements != placements
    return value.redistribute(placements=placements) if is_other else value
