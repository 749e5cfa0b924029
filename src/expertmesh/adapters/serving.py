"""Write adapters in the layouts that vLLM, SGLang and PEFT read.

Both servers use the names of the published checkpoint. So each routed expert has pairs of its own, such as
`experts.3.gate_proj` (`.w1` in Mixtral), and all experts of a layer need all projections. For families that vLLM marks
`is_3d_moe_weight`, it reads PEFT's layout instead. Both servers read only `r` and `lora_alpha` (SGLang ignores
`use_rslora`), so all pairs are padded with zeros to one rank and get one scaling. Of projections that servers fuse
(q, k, v; gate, up), missing ones are written as zeros.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from expertmesh.adapters.files import CONFIG, WEIGHTS, Adapter, AdapterError, Change
from expertmesh.adapters.layouts import locate_projection
from expertmesh.moe.experts import is_experts

SERVERS = ("vllm", "sglang")
#: families whose classes vLLM marks `is_3d_moe_weight`, by model_type
VLLM_3D = {"gpt_oss"}
#: projections that servers fuse
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


class Pair(NamedTuple):
    """The factors of one module. path: its name in the file. embedding: A is [r, vocabulary], B [hidden, r]."""

    path: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    embedding: bool = False


def write_adapter(adapter: Adapter, model: PreTrainedModel, folder: Path, reader: str, base: str | None = None) -> None:
    """Write an adapter of `model`, which may be on the meta device, into a folder for `vllm`, `sglang` or `peft`. The
    products do not change, except for rounding if scalings differ. Raises AdapterError if the reader has no names for a
    part of the adapter."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or adapter.config.get("base_model_name_or_path"),
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    changes = {name: _concatenated(parts, model.get_parameter(name).shape) for name, parts in adapter.changes.items()}
    if reader == "peft":
        pairs, more = _for_peft(changes, model)
    else:
        if adapter.replaced:
            raise AdapterError(
                f"The adapter holds {next(iter(adapter.replaced))} whole (modules_to_save), which no server adds to a "
                f"model that it serves: merge it (`expertmesh merge`)."
            )
        pairs, more = _for_server(adapter, changes, model, reader)
    tensors = {}
    for pair in pairs:
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{pair.path}.{a}"] = pair.A.contiguous().clone()
        tensors[f"base_model.model.{pair.path}.{b}"] = pair.B.contiguous().clone()
    (folder / CONFIG).write_text(json.dumps(config | more, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refuse_multimodal(model: PreTrainedModel) -> None:
    """Raise AdapterError for the text model of a multimodal model, because servers name its modules otherwise."""
    if model.config.model_type.endswith("_text"):
        raise AdapterError(
            f"{model.config.model_type} is part of a multimodal model, whose names on servers are not known here: "
            f"merge the adapter (`expertmesh merge`)."
        )


def _concatenated(parts: list[Change], shape: torch.Size) -> Change:
    """Return the sum of changes of one parameter, which may be of different rows, concatenated along the rank."""
    if len(parts) == 1 and parts[0].rows == slice(None):
        return parts[0]
    out = shape[-1] if parts[0].transposed else shape[-2]
    A, B = torch.cat([part.A for part in parts], -2), []
    for part in parts:
        whole = part.B.new_zeros(*part.B.shape[:-2], out, part.B.shape[-1])
        whole[..., part.rows, :] = part.B * (part.scaling / parts[0].scaling)
        B.append(whole)
    return Change(A, torch.cat(B, -1), parts[0].scaling, transposed=parts[0].transposed)


def _to_peft_layout(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) in PEFT's layout: one pair for all experts, or for a matrix."""
    if change.A.ndim == 2:
        return (change.B.T, change.A.T) if change.transposed else (change.A, change.B)
    return change.A.flatten(0, 1), change.B.permute(1, 2, 0).flatten(1)


def _for_peft(changes: dict[str, Change], model: PreTrainedModel) -> tuple[list[Pair], dict[str, Any]]:
    """Return pairs and configuration for PEFT, with full names in `target_parameters`: PEFT renames some modules."""
    pairs = []
    for name, change in changes.items():
        module = name.rpartition(".")[0]
        adapted = [n for n, _ in model.get_submodule(module).named_parameters(recurse=False)]
        adapted = [n for n in adapted if f"{module}.{n}" in changes]
        depth = len(adapted) - 1 - adapted.index(name.rpartition(".")[2])
        pairs.append(Pair(module + depth * ".base_layer", *_to_peft_layout(change), change.scaling))
    ranks = {name.replace(".", r"\."): change.A.shape[-2] for name, change in changes.items()}
    alphas = {key: rank * pair.scaling for (key, rank), pair in zip(ranks.items(), pairs, strict=True)}
    return pairs, {
        "peft_version": importlib.metadata.version("peft"),
        "lora_B_layout": "rank_major",  # Unsloth's key, as it has written both layouts
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": [],
        "target_parameters": sorted(changes),
    }


def _for_server(
    adapter: Adapter, changes: dict[str, Change], model: PreTrainedModel, server: str
) -> tuple[list[Pair], dict[str, Any]]:
    refuse_multimodal(model)
    family, experts, pairs = model.config.model_type, set(), []
    for name, change in changes.items():
        module = name.rpartition(".")[0]
        if is_experts(model.get_submodule(module)):
            experts.add(module)
        else:
            path = _keys_on_disk(model, name, model.get_parameter(name).shape)[0]
            embedding = isinstance(model.get_submodule(module), nn.Embedding)
            pairs.append(Pair(path.removesuffix(".weight"), change.A, change.B, change.scaling, embedding))
    pairs += _missing_projections(pairs, model)
    for path in sorted(experts):
        if server == "vllm" and family in VLLM_3D:
            pairs += _stacked(changes, model, path)
        else:
            pairs += _per_expert(adapter, model, path, server)
    R, scalings = max(pair.A.shape[-2] for pair in pairs), {pair.scaling for pair in pairs}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    more: dict[str, Any] = {
        "r": R,
        "lora_alpha": int(R * scaling) if R * scaling == int(R * scaling) else R * scaling,
        "target_modules": sorted({_leaf(pair.path) for pair in pairs}),
    }
    if any(".experts" in pair.path and _leaf(pair.path) == "experts" for pair in pairs):  # flattened after padding
        more |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "lora_B_layout": "rank_major"}
    return [_padded(pair, R, scaling) for pair in pairs], more


def _leaf(path: str) -> str:
    return path.removesuffix(".base_layer").rpartition(".")[2]


def _padded(pair: Pair, R: int, scaling: float) -> Pair:
    """Return the pair with rank R and this scaling. A pair with a dimension of experts gets PEFT's layout."""
    A, B = pair.A, pair.B if pair.scaling == scaling else (pair.B.float() * (pair.scaling / scaling)).to(pair.B.dtype)
    more = R - A.shape[-2]
    A, B = nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))
    if A.ndim == 3:
        A, B = _to_peft_layout(Change(A, B, scaling))
    return pair._replace(A=A, B=B, scaling=scaling)


def _keys_on_disk(model: PreTrainedModel, name: str, shape: torch.Size) -> list[str]:
    """Return the keys on disk of a parameter's tensors."""
    return list(revert_weight_conversion(model, {name: torch.empty(shape, device="meta")}))


def _missing_projections(pairs: list[Pair], model: PreTrainedModel) -> list[Pair]:
    """Return zero pairs for missing projections that servers fuse with present ones."""
    present, added, by_path = {pair.path for pair in pairs}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(name.endswith(f".{leaf}") for group in FUSED for leaf in group):
            key = _keys_on_disk(model, f"{name}.weight", module.weight.shape)[0]
            by_path[key.removesuffix(".weight")] = module
    for pair in pairs:
        parent, _, leaf = pair.path.rpartition(".")
        for other in next((group for group in FUSED if leaf in group), ()):
            path = f"{parent}.{other}"
            if path not in present and path in by_path:
                A = pair.A.new_zeros(pair.A.shape[0], by_path[path].in_features)
                B = pair.B.new_zeros(by_path[path].out_features, pair.A.shape[0])
                added[path] = Pair(path, A, B, pair.scaling)
    return list(added.values())


def _stacked(changes: dict[str, Change], model: PreTrainedModel, path: str) -> Iterator[Pair]:
    """Yield the pairs of both parameters of stacked experts, [E, r, in] and [E, out, r]; zeros where there is none."""
    experts: Any = model.get_submodule(path)
    like = next(changes[f"{path}.{n}"] for n in ("gate_up_proj", "down_proj") if f"{path}.{n}" in changes)
    for name, suffix in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        change = changes.get(f"{path}.{name}")
        if change is None:
            E, *shape = getattr(experts, name).shape
            out, into = shape[::-1] if experts.is_transposed else shape
            r = like.A.shape[1]
            change = Change(like.A.new_zeros(E, r, into), like.B.new_zeros(E, out, r), like.scaling)
        yield Pair(path + suffix, change.A, change.B, change.scaling)


def _per_expert(adapter: Adapter, model: PreTrainedModel, path: str, server: str) -> Iterator[Pair]:
    """Yield a pair for every projection of every expert, with zeros where the adapter has none."""
    experts: Any = model.get_submodule(path)
    like = next(part for name, parts in adapter.changes.items() if name.startswith(f"{path}.") for part in parts)
    for projection in ("gate", "up", "down") if experts.has_gate else ("up", "down"):
        name, rows = locate_projection(experts, projection)
        shape = getattr(experts, name).shape
        keys = _keys_on_disk(model, f"{path}.{name}", shape)
        columns = len(keys) // shape[0]
        if len(keys) < shape[0] or model.config.model_type == "gpt_oss":
            raise AdapterError(
                f"{server} documents no names for LoRA on the routed experts of {model.config.model_type}: merge the "
                f"adapter (`expertmesh merge`)."
            )
        out, into = shape[1:][::-1] if experts.is_transposed else shape[1:]
        A, B, scaling = _projection(adapter.changes.get(f"{path}.{name}", []), rows, out)
        if A is None:
            r, scaling = like.A.shape[1], like.scaling
            A, B = like.A.new_zeros(shape[0], r, into), like.B.new_zeros(shape[0], len(range(out)[rows]), r)
        for e in range(shape[0]):
            of_expert = [key for key in keys if f".experts.{e}." in key]
            key = of_expert[1 if projection == "up" and columns == 2 else 0].removesuffix(".weight")
            if server == "sglang" and not experts.has_gate and projection == "up":
                key = f"{key.rpartition('.')[0]}.gate_proj"  # SGLang's name of it
            yield Pair(key, A[e], B[e], scaling)


def _projection(parts: list[Change], rows: slice, out: int) -> tuple[Any, Any, float]:
    """Return (A [E, r, in], B [E, rows, r], scaling) for these rows of a parameter, without ranks that are all zero."""
    wanted = range(out)[rows]
    matching = [part for part in parts if part.rows == rows or part.rows == slice(None)]
    if not matching:
        return None, None, 1.0
    scaling = matching[0].scaling
    A = torch.cat([part.A for part in matching], 1)
    at = slice(wanted.start, wanted.stop, wanted.step)
    Bs = [(part.B if part.rows == rows else part.B[:, at]) * (part.scaling / scaling) for part in matching]
    B = torch.cat(Bs, 2)
    used = (B != 0).any(0).any(0)
    if not used.any():
        used[:1] = True  # keep one rank
    return A[:, used], B[:, :, used], scaling
