"""A sharded model in Hugging Face's format, written by all ranks, gathered by none.

Transformers gathers the whole model in the memory of rank 0, which then splits it and writes alone. Here each rank
writes the experts it holds, one by one where the family's checkpoints have them so. All other tensors are gathered one
at a time and written by ranks in turn. In host memory a rank keeps one file of `max_shard_size`.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters, dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from expertmesh.kernels.packed import packed_in
from expertmesh.layers.mtp import config_without_mtp
from expertmesh.parallel import ranks
from expertmesh.weights.files import atomic_export

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold different parts of the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def save_sharded(model: PreTrainedModel, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write weights, index and configurations as `save_pretrained` does. Every rank must call it, on one file system.

    max_shard_size: the largest weights file, as "5GB" or in bytes, and about the host memory that a rank needs.
    """
    files = files_of(model, max_shard_size)
    with atomic_export(folder) as staging:
        write_model(staging, model, files)


def files_of(model: PreTrainedModel, max_shard_size: int | str = "5GB") -> Iterator[dict[str, torch.Tensor]]:
    """The weights files that this rank is to write: tensors by their keys on disk, as copies on the CPU.

    Every rank must exhaust it: it gathers.
    """
    size = max_shard_size.upper() if isinstance(max_shard_size, str) else max_shard_size  # a small b is a bit to it
    return _split(_own_tensors(model), convert_file_size_to_int(size))


def write_model(
    folder: Path, model: PreTrainedModel, files: Iterable[dict[str, torch.Tensor]], group: Any = None
) -> None:
    """Write this rank's `files`; rank 0 adds configurations, and an index if there are several files.

    What is written does not depend on the layout, except for how weights are shared out among the files. An error on
    one rank of `group` is one on all: they go on gathering with a rank that cannot write.
    """
    files, rank = iter(files), ranks.rank(group)
    mine: list[tuple[int, str, dict[str, int]]] = []
    with ranks.fail_together(group):
        try:
            for tensors in files:
                name = f"rank-{rank}-{len(mine)}.safetensors"  # until all ranks know how many there are
                save_file(tensors, folder / name, metadata={"format": "pt"})
                mine.append((rank, name, {key: value.nbytes for key, value in tensors.items()}))
        finally:
            deque(files, maxlen=0)
    written = [file for part in ranks.all_gather_object(mine, group) for file in part]
    weight_map: dict[str, str] = {}
    with ranks.fail_together(group):
        for number, (writer, name, sizes) in enumerate(written, 1):
            final = WEIGHTS if len(written) == 1 else f"model-{number:05}-of-{len(written):05}.safetensors"
            weight_map |= dict.fromkeys(sizes, final)
            if writer == rank:
                (folder / name).rename(folder / final)
        if rank == 0:
            if len(written) > 1:
                size = sum(nbytes for *_, sizes in written for nbytes in sizes.values())
                metadata = {"total_parameters": model.num_parameters(), "total_size": size}
                index = {"metadata": metadata, "weight_map": weight_map}
                (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            _write_configurations(folder, model)


def _write_configurations(folder: Path, model: PreTrainedModel) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    config_without_mtp(model)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def _own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(key on disk, tensor) of all that this rank writes. Of experts that become one tensor each it has its own rows;
    other tensors are gathered, and go to the rank that has the fewest bytes of them so far."""
    state = _saved_state(model)
    groups, renamed = _groups(model, state)

    def converted(names: list[str], values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if names[0] in renamed:
            return {renamed[names[0]]: values[0]}
        return revert_weight_conversion(model, dict(zip(names, values, strict=True)))

    load = [0] * ranks.world_size()
    for names in groups:
        values = [state[name] for name in names]
        every = converted(names, [torch.empty(value.shape, device="meta") for value in values])
        if _are_rows(every, values):
            (experts,) = values
            mesh, rows = experts.device_mesh, experts.to_local()
            at = zip(mesh.get_coordinate(), experts.placements, strict=True)
            if not len(rows) or any(number for number, placement in at if placement.is_replicate()):
                continue  # the first of several copies is written
            _, (first, *_) = compute_local_shape_and_global_offset(experts.shape, mesh, experts.placements)
            keys = [key for number, key in enumerate(every) if first <= number % len(experts) < first + len(rows)]
            pieces = dict(zip(keys, converted(names, [rows]).values(), strict=True))
        else:
            writer = load.index(min(load))
            load[writer] += sum(value.nbytes for value in values)
            values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]  # on all ranks
            pieces = converted(names, values) if writer == ranks.rank() else {}
        for key, value in pieces.items():
            yield key, value.to("cpu", copy=True).contiguous()


def _saved_state(model: PreTrainedModel) -> dict[str, Any]:
    """What of the model is saved, by its names in the model, tied weights once."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    # on meta tensors Transformers compares the parameters themselves: sharded ones have no storage to compare
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
    saved = {name: state[name] for name in remove_tied_weights_from_state_dict(shapes, model)}
    return in_parts(saved | {copy: state[name] for copy, name in _copies(model).items()})


def in_parts(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with blocks and scales, as in files of GPT-OSS, in the place of packed weights."""
    for name in [name for name, tensor in state.items() if packed_in(tensor) is not None]:
        weight = state.pop(name)
        held: Any = packed_in(weight)
        parts = {"blocks": held.codes.unflatten(-1, (held.scales.shape[-1], -1)), "scales": held.scales}
        for what, part in parts.items():
            if isinstance(weight, DTensor):
                part = DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False)
            state[f"{name}_{what}"] = part
    return state


def with_copies(model: PreTrainedModel, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """`state` (None: the model's) with the weights that its checkpoints repeat, as memory of their own on the CPU.

    None stays None where checkpoints repeat nothing.
    """
    copies = _copies(model)
    if not copies:
        return state
    state = model.state_dict() if state is None else state
    return state | {copy: state[name].to("cpu", copy=True) for copy, name in copies.items() if name in state}


def _copies(model: PreTrainedModel) -> dict[str, str]:
    """{name on disk: name in the model} of weights that checkpoints have twice: MTP modules repeat what they share."""
    mtp = getattr(model, "_mtp", None)
    return {} if mtp is None else mtp.copies


def _groups(model: PreTrainedModel, state: dict[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
    """([names of weights that become tensors of the checkpoint together]; {name: key on disk} of those that only get
    another name: these by one call, as what Transformers makes of some names depends on those before)"""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    converters: Any = [each.reverse_transform() for each in conversions[::-1] if isinstance(each, WeightConverter)]
    groups: dict[str, list[str]] = {}
    alone: dict[str, torch.Tensor] = {}
    for name in sorted(state, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        groups.setdefault(target, []).append(name)
        if pattern is None:
            alone[name] = torch.empty(0)
    return list(groups.values()), dict(zip(alone, revert_weight_conversion(model, alone), strict=True))


def _are_rows(every: dict[str, torch.Tensor], values: list[Any]) -> bool:
    """Whether these are one tensor for each row of a sharded one, so that every rank can convert the rows it has."""
    return (
        len(values) == 1
        and isinstance(values[0], DTensor)
        and all(piece.ndim < values[0].ndim for piece in every.values())
        and len(every) % len(values[0]) == 0
        and all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in values[0].placements)
    )


def _split(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Files of at most `limit` bytes, or of one tensor."""
    file: dict[str, torch.Tensor] = {}
    size = 0
    for key, value in tensors:
        if file and size + value.nbytes > limit:
            yield file
            file, size = {}, 0
        file[key] = value
        size += value.nbytes
    if file:
        yield file
