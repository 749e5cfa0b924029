"""Export checks: expertmesh saves the same files as stock Transformers, and stock reads them back bit for bit."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM as StockAutoModelForCausalLM
from transformers import PreTrainedModel

from expertmesh.bench.rows import Row


def layout(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {key: (dtype, shape)} of every tensor in a folder's safetensors files. Only the headers are read."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                piece = tensors.get_slice(key)
                found[key] = piece.get_dtype(), tuple(piece.get_shape())
    return found


def configurations(folder: str | Path) -> dict[str, object]:
    """Return {file name: content} of every JSON file in a folder except the index of shards."""
    return {
        file.name: json.loads(file.read_text())
        for file in sorted(Path(folder).glob("*.json"))
        if not file.name.endswith(".index.json")
    }


def differing(found: dict, expected: dict) -> list[str]:
    """Return the keys that exist on one side only or whose values differ."""
    missing = object()
    return [
        key for key in sorted(found.keys() | expected.keys()) if found.get(key, missing) != expected.get(key, missing)
    ]


def differing_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Like `differing`, for tensors: dtype, shape and every bit must be equal."""
    names = sorted(found.keys() | expected.keys())
    both = {name: (found.get(name), expected.get(name)) for name in names}
    return [
        name
        for name, (a, b) in both.items()
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a.cpu(), b.cpu())
    ]


def export_rows(stock: PreTrainedModel, ours: PreTrainedModel) -> list[Row]:
    """Save both models, compare the files, and let stock Transformers reload ours."""
    with tempfile.TemporaryDirectory() as folder:
        expected, found = Path(folder, "stock"), Path(folder, "expertmesh")
        stock.save_pretrained(expected)
        ours.save_pretrained(found)
        reloaded = StockAutoModelForCausalLM.from_pretrained(found, dtype="auto")
        checks = {
            "tensor layout": differing(layout(found), layout(expected)),
            "JSON files": differing(configurations(found), configurations(expected)),
            "weights, reloaded": differing_tensors(reloaded.state_dict(), ours.state_dict()),
        }
    return [Row("export", what, len(names), 0, names[0] if names else "") for what, names in checks.items()]
