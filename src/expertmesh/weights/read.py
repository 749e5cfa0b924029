"""Checkpoint names in, a model's weights out: the conversion that `from_pretrained` does, for a model that exists.

On disk most families name every expert's matrix; in the model one tensor holds all experts of a layer. What reads a
checkpoint by the model's names, as torch's `load_state_dict` does, leaves such experts untouched. Both functions here
go through Transformers' own conversion rules, one group of tensors at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from expertmesh.parallel.clip import local_shard


def to_model_names(
    model: PreTrainedModel, state: Mapping[str, Any], strict: bool = True
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(`state` under the names in the model; tensors that wait for the next part of the checkpoint)

    Keys that are the model's already, or unknown, stay as they are. Experts wait for others of their layer, which lie
    in another file, but not if `strict`, nor if the model has no parameter that is not in `state`. Raises ValueError if
    the tensors of one parameter do not fit together, as when one expert's are missing.
    """
    targets = model.state_dict(keep_vars=True)
    foreign = {key: value for key, value in state.items() if key not in targets}
    if not foreign:
        return state, {}
    groups, unknown = _groups(model, foreign, targets)
    converted = {key: value for key, value in state.items() if key in targets or key in unknown}
    absent = _to_load(model, targets).keys() - {id(targets[name]) for name in (*converted, *groups) if name in targets}
    is_part = not strict and len(absent) > 0
    waiting: dict[str, Any] = {}
    for name, group in groups.items():
        keys = set().union(*group.layer_targets.values())
        try:
            converted |= _converted(model, name, group, targets)
        except ValueError:
            if not is_part or len(keys) == 1:
                raise
            waiting |= {key: state[key] for key in keys}
    return converted, waiting


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Overwrite the model's weights, in place, with those of a checkpoint in Hugging Face's format (safetensors).

    Of a sharded model every rank reads its own slices only. Raises FileNotFoundError if the folder has no weights,
    ValueError if a weight is missing, does not fit, or is not the model's.
    """
    files = weight_files(Path(folder))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors). Name a folder that save_pretrained wrote.")
    with opened(files) as sources, torch.no_grad():
        targets = model.state_dict(keep_vars=True)
        groups, unknown = _groups(model, sources, targets)
        own, absent = {name: local_shard(x) for name, x in targets.items()}, _to_load(model, targets)
        for name, group in groups.items():
            for target, value in _converted(model, name, group, own).items():
                own[target].copy_(value)
                absent.pop(id(targets[target]), None)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        unknown = [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]
    for what, keys in (("lacks", sorted(absent.values())), ("has, but the model has not:", sorted(unknown))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"The checkpoint {folder} {what} {', '.join(keys[:3])}{more}. It was cut short, or is another model's: "
                f"resume from the one before, or from one of this model."
            )


def _groups(
    model: PreTrainedModel, sources: Mapping[str, Any], targets: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """(Transformers' conversion for each parameter with its tensors, still unread; keys that belong to no parameter)"""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Any] = {}
    unknown = []
    for key in sorted(sources, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, targets)
        if name not in targets and key in targets:
            name, pattern = key, None
        if name not in targets:
            unknown.append(key)
            continue
        if pattern is None:
            group, index = groups.setdefault(name, WeightRenaming(key, name)), None
        else:
            group = groups.setdefault(name, deepcopy(by_pattern[pattern]))
            index = len(group.collected_tensors.get(pattern, ()))
        group.add_tensor(name, key, pattern or key, partial(_read, sources[key], targets[name], index))
    return groups, unknown


def _converted(
    model: PreTrainedModel, name: str, group: Any, targets: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights by their names in the model, each of the shape that it has in `targets`."""
    try:
        found = group.convert(name, model=model, config=model.config)
        values = {target: value[0] if isinstance(value, list) else value for target, value in found.items()}
        for target, value in values.items():
            if target in targets and value.shape != (shape := targets[target].shape):
                raise ValueError(f"they have the shape {tuple(value.shape)}, the model's {tuple(shape)}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's tensors for {name} do not fit: {error}. One of them is missing, or they are another "
            f"model's: take a complete checkpoint of this model."
        ) from error
    return values


def _read(source: Any, target: torch.Tensor, index: int | None) -> torch.Tensor | None:
    """This rank's part of a slice of safetensors, None if none of it is this rank's; a tensor in memory as it is."""
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(target, DTensor):
        return DtensorShardOperation(target).shard_tensor(source, index, target.device, target.dtype)
    return source[...].to(target.device, target.dtype)


def _to_load(model: PreTrainedModel, targets: dict[str, torch.Tensor]) -> dict[int, str]:
    """{id of a tensor: one of its names} of what a checkpoint must hold; tied weights are one."""
    ignored = model._keys_to_ignore_on_save or ()
    return {id(x): name for name, x in targets.items() if name not in ignored}


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights: those that Transformers reads, whatever else lies there. [] without any."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else ()
    return sorted(folder / Path(name).name for name in names)


@contextmanager
def opened(files: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Every tensor in these safetensors files, by its key, as a slice that is read when it is indexed."""
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {key: handle.get_slice(key) for handle in handles for key in handle.keys()}  # noqa: SIM118 (not a dict)


def glance(file: str | Path) -> str:
    """A digest of a file's size and of 128 places in it, for telling two fine-tunings apart without reading them."""
    size = os.path.getsize(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb", buffering=0) as opened:
        for place in range(0, size, max(1, size // 128)):
            opened.seek(place)
            digest.update(opened.read(64))
    return digest.hexdigest()[:12]
