"""An optimizer's state, sharded like its parameters, saved by parameter name: it can be loaded under another layout.

torch's own `get_optimizer_state_dict` takes a step with zero gradients to create the state it loads into, and
`Optimizer.load_state_dict` casts state to the dtype of the parameters. Here state is created from what the checkpoint
says about it, so nothing is stepped, and it stays exactly what was saved.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from expertmesh.checkpoint.tensors import TensorReader
from expertmesh.memory.adamw import IMPLEMENTATION
from expertmesh.parallel import ranks

FOLDER = "optimizer"  # in a checkpoint
GROUPS = "groups.pt"  # in FOLDER

PER_GROUP = {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"}

NUMBER = int | float | None
Named = dict[str, nn.Parameter]


def _is_alone() -> bool:
    """Whether there is no process group, which is no reason for PyTorch to warn at every save."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return not dist.is_initialized()


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's state into `folder/optimizer`; every rank writes its shards."""
    write(folder, tensors_of(model, optimizer), groups_of(model, optimizer))


def is_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all the optimizer's parameters are the model's; those of layer-wise optimizers are only for show."""
    known = set(model.parameters())
    return all(parameter in known for group in optimizer.param_groups for parameter in group["params"])


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as {"parameter/key": value}, in layouts that torch.distributed.checkpoint knows. All ranks call it."""
    tensors = {}
    for name, parameter in _named(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = _contiguous(value)
            elif not isinstance(value, NUMBER):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of every parameter, which "
                    f"cannot be saved: save without the optimizer, or take one whose state is tensors and numbers."
                )
    return tensors


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of every parameter group, each parameter's group by name (groups are cut by layout), and state that
    is numbers.
    """
    names = {parameter: name for name, parameter in _named(model, optimizer).items()}
    groups = optimizer.param_groups
    options = [{key: value for key, value in g.items() if key not in ("params", "param_names")} for g in groups]
    of = {names[p]: number for number, g in enumerate(groups) for p in g["params"]}
    states = [(name, optimizer.state.get(parameter, {})) for parameter, name in names.items()]
    numbers = {name: {key: x for key, x in state.items() if isinstance(x, NUMBER)} for name, state in states}
    return {"options": options, "of": of, "numbers": numbers}


def write(folder: Path, tensors: dict[str, Any], groups: dict[str, Any], group: Any = None) -> None:
    """Write what `tensors_of` and `groups_of` gave, from all ranks of `group`."""
    folder = folder / FOLDER
    folder.mkdir(exist_ok=True)
    with _told_plainly():
        dcp.save(tensors, checkpoint_id=folder, process_group=group, no_dist=_is_alone())
    if ranks.rank(group) == 0:
        torch.save(groups, folder / GROUPS)


@torch.no_grad()
def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Replace the optimizer's state and options by the checkpoint's; each rank reads its shards.

    Returns for each parameter group the number of the saved group that it continues. Raises ValueError if the
    checkpoint is of other parameters, or a group would get two different sets of options.
    """
    folder, named = checkpoint / FOLDER, _named(model, optimizer)
    groups = torch.load(folder / GROUPS, weights_only=True)
    if groups["of"].keys() != named.keys():
        odd = sorted(groups["of"].keys() ^ named.keys())[0]
        raise ValueError(
            f"The optimizer in {checkpoint} is of other parameters: only the "
            f"{'optimizer' if odd in named else 'checkpoint'} has {odd}. Freeze parameters as in the run that saved it."
        )
    reader = TensorReader(folder)
    tensors = _to_load(reader, named, optimizer)
    with _told_plainly():
        dcp.load(tensors, storage_reader=reader, no_dist=_is_alone())
    optimizer.state.clear()
    for name, numbers in groups.get("numbers", {}).items():
        if numbers:
            optimizer.state[named[name]] |= numbers
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        optimizer.state[named[name]][key] = _like_parameter(value, named[name])
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


def regrouped(state: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """A scheduler's state for the groups of `load_optimizer`: what it keeps for each group is put in their order."""

    def change(key: str, value: Any) -> Any:
        if key in PER_GROUP and isinstance(value, list):
            return [value[number] for number in order]
        if isinstance(value, list):  # schedulers of a SequentialLR
            return [regrouped(item, order) if isinstance(item, dict) else item for item in value]
        return value

    return {key: change(key, value) for key, value in state.items()}


@contextmanager
def _told_plainly() -> Iterator[None]:
    """PyTorch raises what went wrong on any rank on all, as a BaseException of its own, which no handler expects."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Named:
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    except KeyError:
        raise ValueError("The optimizer has parameters that are not the model's: build it from this model's.") from None


def _to_load(reader: Any, named: Named, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Empty state, laid out like the parameters, for everything the checkpoint holds."""
    on_device = {
        parameter: bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    tensors: dict[str, Any] = {}
    for path, saved in reader.read_metadata().state_dict_metadata.items():
        name, _, key = path.rpartition("/")
        parameter = named[name]
        shape, dtype = saved.size, saved.properties.dtype
        if not shape:  # the step count: PyTorch keeps it beside the parameter if its kernel reads it there
            tensors[path] = torch.empty((), dtype=dtype, device=parameter.device if on_device[parameter] else "cpu")
        elif not isinstance(parameter, DTensor):
            tensors[path] = torch.empty(shape, dtype=dtype, device=parameter.device)
        elif shape == parameter.shape:
            mesh, placements = parameter.device_mesh, _simple(parameter.placements)
            tensors[path] = empty_dtensor(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        else:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} in the shape {tuple(shape)}, the parameter is "
                f"{tuple(parameter.shape)}: such state cannot be loaded into a sharded model. Resume in one process."
            )
    return tensors


def _simple(placements: Any) -> tuple[Any, ...]:
    """Contiguous shards instead of the strided ones that FSDP2 makes of EP and TP shards: files have no strides."""
    return tuple(
        placement if placement.is_replicate() else Shard(placement.dim)  # Shard(d) and _StridedShard(d)
        for placement in placements
    )


def _contiguous(value: Any) -> Any:
    if not isinstance(value, DTensor) or _simple(value.placements) == value.placements:
        return value
    return value.redistribute(placements=_simple(value.placements))


def _like_parameter(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, DTensor) or not isinstance(parameter, DTensor) or value.placements == parameter.placements:
        return value
    return value.redistribute(placements=parameter.placements)
