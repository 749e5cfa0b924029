"""Load a checkpoint into an existing model, with the conversion of names and tensors that `from_pretrained` does.

Most checkpoints have one tensor per expert and projection, but the model stacks all experts of a layer in one. Loading
by the model's names, as torch's `load_state_dict` does, would skip such experts. `to_model_names` and `load_weights`
apply Transformers' own conversion rules, one group of tensors at a time.
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
    """Return (`state` with the model's names; tensors to pass again with the next part of the checkpoint).

    Keys that the model has already, and unknown ones, are not changed. If not `strict`, experts of which some tensors
    are missing wait for the next file, unless `state` has all parameters of the model. Raises ValueError if the tensors
    of one parameter do not fit each other, or if one is missing.
    """
    targets = model.state_dict(keep_vars=True)
    to_convert = {key: value for key, value in state.items() if key not in targets}
    if not to_convert:
        return state, {}
    groups, unknown = _groups(model, to_convert, targets)
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
    """Overwrite the model's weights in place with those of a safetensors checkpoint in Hugging Face's format.

    Each rank reads only its shards. Raises FileNotFoundError if the folder has no weights, and ValueError if a weight
    is missing, does not fit, or is unknown to the model.
    """
    files = weight_files(Path(folder))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors). Name a folder that save_pretrained wrote.")
    with safetensors_slices(files) as sources, torch.no_grad():
        targets = model.state_dict(keep_vars=True)
        groups, unknown = _groups(model, sources, targets)
        shards, absent = {name: local_shard(x) for name, x in targets.items()}, _to_load(model, targets)
        for name, group in groups.items():
            for target, value in _converted(model, name, group, shards).items():
                shards[target].copy_(value)
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
    """Return {name in the model: weight} of a group. Raises ValueError if a shape differs from that in `targets`."""
    try:
        converted = group.convert(name, model=model, config=model.config)
        values = {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}
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
    """Read this rank's shard of a safetensors slice, None if it is empty. A tensor in memory is returned as it is."""
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(target, DTensor):
        return DtensorShardOperation(target).shard_tensor(source, index, target.device, target.dtype)
    return source[...].to(target.device, target.dtype)


def _to_load(model: PreTrainedModel, targets: dict[str, torch.Tensor]) -> dict[int, str]:
    """Return {id of a tensor: one of its names} of all tensors that a checkpoint must have; tied weights count once."""
    ignored = model._keys_to_ignore_on_save or ()
    return {id(x): name for name, x in targets.items() if name not in ignored}


def weight_files(folder: Path) -> list[Path]:
    """Return the weights files of a checkpoint that Transformers would read; [] if there are none."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else ()
    return sorted(folder / Path(name).name for name in names)


@contextmanager
def safetensors_slices(files: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Context manager that yields {key: safetensors slice} of all tensors in these files. Indexing a slice reads it."""
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {key: handle.get_slice(key) for handle in handles for key in handle.keys()}  # noqa: SIM118 (not a dict)


def glance(file: str | Path) -> str:
    """Return a hash of a file's size and of 128 samples of it: a fast fingerprint that differs between fine-tunings."""
    size = os.path.getsize(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb", buffering=0) as reader:
        for offset in range(0, size, max(1, size // 128)):
            reader.seek(offset)
            digest.update(reader.read(64))
    return digest.hexdigest()[:12]
