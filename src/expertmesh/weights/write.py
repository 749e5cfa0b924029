"""A sharded model in Hugging Face's format, written by all ranks, gathered by none.

Transformers gathers the whole model in the memory of rank 0, which then splits it and writes alone. Here each rank
writes the experts it holds, one by one where the family's checkpoints have them so. All other tensors are gathered one
at a time and written by ranks in turn. In host memory a rank keeps one file of `max_shard_size`.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from expertmesh.layers.mtp import promise_what_is_kept
from expertmesh.parallel import ranks
from expertmesh.weights.files import replacing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold different parts of the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def save_sharded(model: PreTrainedModel, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write weights, index and configurations as `save_pretrained` does. Every rank must call it, on one file system.

    max_shard_size: the largest weights file, as "5GB" or in bytes, and about the host memory that a rank needs.
    """
    export = Export(model, max_shard_size)
    with replacing(folder) as staging:
        export.write(staging, export.files())


@dataclass
class _Group:
    """Tensors of the model that become tensors of the checkpoint together."""

    target: str
    transform: Any  # Transformers' conversion, reversed
    sources: list[tuple[str, str]]  # (name in the model, pattern it matches)
    by_expert: bool = False  # every rank converts and writes its own rows; else one rank gets the gathered tensors
    mine: bool = False  # whether this rank writes it, or some rows of it
    first: int = 0  # the first of these rows


class Export:
    """Who writes which tensor of a model into which file. Made on every rank at the same time."""

    def __init__(self, model: PreTrainedModel, max_shard_size: int | str = "5GB"):
        self.model = model
        self.state = _saved_state(model)
        self.groups, self.renamings = _groups(model, self.state)
        limit = _bytes(max_shard_size)
        self._share_out()
        mine = [(key, value.nbytes) for group in self.groups for key, value in self._converted(group, meta=True)]
        everyone = ranks.gathered(_split(mine, limit))
        files = [(rank, content) for rank, contents in enumerate(everyone) for content in contents]
        names = (
            [WEIGHTS]
            if len(files) == 1
            else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        )
        #: of every weights file its name, the rank that writes it, and (key, bytes) of its tensors
        self._files = [(name, *file) for name, file in zip(names, files, strict=True)]

    @torch.no_grad()
    def files(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(name, tensors as copies on the CPU) of every file this rank writes. Gathers: every rank must exhaust it."""
        tensors = (
            (key, value.to("cpu", copy=True).contiguous())
            for group in self.groups
            for key, value in self._converted(group, meta=False)
        )
        for name, rank, content in self._files:
            if rank == ranks.rank():
                yield name, dict(islice(tensors, len(content)))
        rest = list(tensors)  # none, but gathers what other ranks write
        assert not rest, "the plan and the conversion disagree"

    def write(self, folder: Path, files: Iterable[tuple[str, dict[str, torch.Tensor]]], group: Any = None) -> None:
        """Write these files; rank 0 adds the index, if there are several, and configurations; no trace of layout.

        An error on one rank of `group` is one on all: they go on gathering with a rank that cannot write.
        """
        files = iter(files)
        with ranks.together(group):
            try:
                for name, tensors in files:
                    save_file(tensors, folder / name, metadata={"format": "pt"})
            finally:
                deque(files, maxlen=0)
            if ranks.rank(group) == 0:
                self._write_configurations(folder)

    def _write_configurations(self, folder: Path) -> None:
        model = self.model
        if len(self._files) > 1:
            size = sum(nbytes for *_, content in self._files for _, nbytes in content)
            index = {
                "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
                "weight_map": {key: name for name, _, content in self._files for key, _ in content},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        promise_what_is_kept(model)
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    def _share_out(self) -> None:
        """Gathered tensors go to the rank that has the fewest bytes of them so far."""
        load = [0] * ranks.world_size()
        for group in self.groups:
            first: Any = self.state[group.sources[0][0]]
            if group.by_expert:
                _, offset = compute_local_shape_and_global_offset(first.shape, first.device_mesh, first.placements)
                group.first, group.mine = offset[0], len(first.to_local()) > 0 and _is_first_replica(first)
            else:
                writer = load.index(min(load))
                load[writer] += sum(self.state[name].nbytes for name, _ in group.sources)
                group.mine = writer == ranks.rank()

    def _converted(self, group: _Group, meta: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """(key on disk, tensor) of a group that this rank writes; with `meta` without values, for the plan."""
        transform = deepcopy(group.transform)
        for name, pattern in group.sources:
            value = self.state[name]
            if group.by_expert:
                value = value.to_local()
            elif isinstance(value, DTensor) and not meta:
                value = value.full_tensor()  # on all ranks
            if meta:
                value = torch.empty(value.shape, dtype=value.dtype, device="meta")
            transform.add_tensor(group.target, name, pattern, value)
        if not group.mine:
            return
        for key, value in transform.convert(group.target, model=self.model, config=self.model.config).items():
            if isinstance(transform, WeightConverter):
                key = apply_renamings(_renumbered(key, transform, group.first), self.renamings)
            yield key, value[0] if isinstance(value, list) else value


def _saved_state(model: PreTrainedModel) -> dict[str, Any]:
    """What of the model is saved, by its names in the model, tied weights once."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    # on meta tensors Transformers compares the parameters themselves: sharded ones have no storage to compare
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
    saved = {name: state[name] for name in remove_tied_weights_from_state_dict(shapes, model)}
    return saved | {copy: state[name] for copy, name in _copies(model).items()}


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


def _groups(model: PreTrainedModel, state: dict[str, Any]) -> tuple[list[_Group], list[WeightRenaming]]:
    """The conversions that `save_pretrained` applies, with the model's names they apply to; and its renamings."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # not from a checkpoint: a prefix that might have been there is not invented
        known = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in known if not isinstance(transform, PrefixChange)]
    reverse = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [transform for transform in reverse if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in reverse if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(state, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        if pattern is None:
            target = apply_renamings(name, renamings)
            transform: Any = WeightRenaming(name, target)
        else:
            transform = by_pattern[pattern]
        groups.setdefault(target, _Group(target, transform, [])).sources.append((name, pattern or name))
    for group in groups.values():
        group.by_expert = _splits_by_expert(group, state)
    return list(groups.values()), renamings


def _splits_by_expert(group: _Group, state: dict[str, Any]) -> bool:
    """Whether one sharded tensor becomes one tensor per row, so that every rank can convert the rows it has."""
    operations = getattr(group.transform, "operations", ())
    parameter = state[group.sources[0][0]]
    return (
        len(group.sources) == 1
        and isinstance(parameter, DTensor)
        and any(isinstance(operation, SplitModulelist) and operation.dim == 0 for operation in operations)
        and all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in parameter.placements)
    )


def _is_first_replica(parameter: DTensor) -> bool:
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None, "every rank is part of every mesh"
    pairs = zip(coordinates, parameter.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in pairs if placement.is_replicate())


def _renumbered(key: str, transform: WeightConverter, first: int) -> str:
    """A rank's rows are numbered from 0 by the conversion: make that the number of the expert."""
    for pattern in transform.target_patterns if first else ():
        found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
        if found and found.groups():
            return f"{key[: found.start(1)]}{int(found[1]) + first}{key[found.end(1) :]}"
    assert not first, f"{key} has no expert's number"
    return key


def _split(entries: list[tuple[str, int]], limit: int) -> list[list[tuple[str, int]]]:
    """Consecutive (key, bytes), in files of at most `limit` bytes or one tensor."""
    files: list[list[tuple[str, int]]] = []
    size = 0
    for key, nbytes in entries:
        if not files or size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append((key, nbytes))
        size += nbytes
    return files


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdecimal():
        raise ValueError(f"max_shard_size is {size!r}: give bytes as a number, or KB, MB or GB, as in '5GB'.")
    return int(number) * UNITS[unit]
