"""Save a sharded model in Hugging Face's format from all ranks, without gathering the whole model on any.

Transformers gathers the whole model on rank 0, which writes it alone. Here each rank writes its experts, if the
checkpoint has one tensor per expert. All other tensors are gathered one at a time, and each is written by one rank. A
rank needs host memory for one file of `max_shard_size`.
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
    """Whether the model has sharded or replicated DTensor parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def save_sharded(model: PreTrainedModel, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write weights, index and configurations as `save_pretrained` does. All ranks must call it, on one file system.
    max_shard_size: of a weights file, as "5GB" or in bytes; a rank needs about as much host memory."""
    files = files_of(model, max_shard_size)
    with atomic_export(folder) as staging:
        write_model(staging, model, files)


def files_of(model: PreTrainedModel, max_shard_size: int | str = "5GB") -> Iterator[dict[str, torch.Tensor]]:
    """Yield the content of the weights files that this rank must write: {key on disk: copy on the CPU}. All ranks must
    exhaust the iterator, because it all-gathers."""
    size = max_shard_size.upper() if isinstance(max_shard_size, str) else max_shard_size  # a small b would be bits
    return _split(_own_tensors(model), convert_file_size_to_int(size))


def write_model(
    folder: Path, model: PreTrainedModel, files: Iterable[dict[str, torch.Tensor]], group: Any = None
) -> None:
    """Write this rank's `files`; rank 0 adds configurations, and an index if there are several files. The layout
    affects only which weights are in which file. An error on one rank of `group` raises on all. A rank that cannot
    write still exhausts `files`, so that the collectives of the others do not hang."""
    files, rank = iter(files), ranks.rank(group)
    mine: list[tuple[int, str, dict[str, int]]] = []
    with ranks.fail_together(group):
        try:
            for tensors in files:
                name = f"rank-{rank}-{len(mine)}.safetensors"  # until the number of files is known
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
    """Yield (key on disk, tensor) of all tensors that this rank writes. Experts with one tensor each on disk are not
    gathered. Other tensors are, and the rank that has the fewest bytes of them so far writes them."""
    state = _saved_state(model)
    groups, renamed = _groups(model, state)

    def converted(names: list[str], values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if names[0] in renamed:
            return {renamed[names[0]]: values[0]}
        return revert_weight_conversion(model, dict(zip(names, values, strict=True)))

    bytes_of_rank = [0] * ranks.world_size()
    for names in groups:
        values = [state[name] for name in names]
        on_disk = converted(names, [torch.empty(value.shape, device="meta") for value in values])
        if _is_per_expert(on_disk, values):
            (experts,) = values
            mesh, rows = experts.device_mesh, experts.to_local()
            at = zip(mesh.get_coordinate(), experts.placements, strict=True)
            if not len(rows) or any(number for number, placement in at if placement.is_replicate()):
                continue  # only the first replica is written
            _, (first, *_) = compute_local_shape_and_global_offset(experts.shape, mesh, experts.placements)
            keys = [key for number, key in enumerate(on_disk) if first <= number % len(experts) < first + len(rows)]
            pieces = dict(zip(keys, converted(names, [rows]).values(), strict=True))
        else:
            writer = bytes_of_rank.index(min(bytes_of_rank))
            bytes_of_rank[writer] += sum(value.nbytes for value in values)
            values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]  # on all ranks
            pieces = converted(names, values) if writer == ranks.rank() else {}
        for key, value in pieces.items():
            yield key, value.to("cpu", copy=True).contiguous()


def _saved_state(model: PreTrainedModel) -> dict[str, Any]:
    """Return the tensors to save by their names in the model; tied weights once."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    # Transformers finds tied weights by storage, which DTensors lack; of meta tensors it compares the parameters
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
    saved = {name: state[name] for name in remove_tied_weights_from_state_dict(shapes, model)}
    return with_packed_parts(saved | {copy: state[name] for copy, name in _copies(model).items()})


def with_packed_parts(state: dict[str, Any]) -> dict[str, Any]:
    """Replace packed weights in `state`, in place, by blocks and scales as in GPT-OSS's checkpoints. Return `state`."""
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
    """Return `state` (None: the model's) plus CPU copies of weights that checkpoints store twice; if none, `state`."""
    copies = _copies(model)
    if not copies:
        return state
    state = model.state_dict() if state is None else state
    return state | {copy: state[name].to("cpu", copy=True) for copy, name in copies.items() if name in state}


def _copies(model: PreTrainedModel) -> dict[str, str]:
    """Return {name on disk: name in the model} of weights stored twice: those that MTP modules share with the model."""
    mtp = getattr(model, "_mtp", None)
    return {} if mtp is None else mtp.copies


def _groups(model: PreTrainedModel, state: dict[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
    """Return (groups of names that are converted together, {name: key on disk} of weights that are only renamed)."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    converters: Any = [each.reverse_transform() for each in conversions[::-1] if isinstance(each, WeightConverter)]
    groups: dict[str, list[str]] = {}
    renamed_only: dict[str, torch.Tensor] = {}
    for name in sorted(state, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        groups.setdefault(target, []).append(name)
        if pattern is None:
            renamed_only[name] = torch.empty(0)
    # one call, because some of Transformers' renames depend on the names before
    return list(groups.values()), dict(zip(renamed_only, revert_weight_conversion(model, renamed_only), strict=True))


def _is_per_expert(on_disk: dict[str, torch.Tensor], values: list[Any]) -> bool:
    """Whether a sharded stack of experts has separate tensors per expert on disk, so ranks can convert their rows."""
    return (
        len(values) == 1
        and isinstance(values[0], DTensor)
        and all(piece.ndim < values[0].ndim for piece in on_disk.values())
        and len(on_disk) % len(values[0]) == 0
        and all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in values[0].placements)
    )


def _split(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors into files of at most `limit` bytes, or of one larger tensor."""
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
