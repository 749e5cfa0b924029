"""A block-FP8 checkpoint on several ranks: each reads its slices, which end within blocks, with the right scales."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.export import differing_tensors
from tests.distributed import work
from tests.distributed.ranks import on_ranks
from tests.weights.test_quantized import checkpoints

LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"ep_size": 2}, {"tp_size": 2})


def load_and_save(rank: int, stored: Path, exact: Path, out: Path) -> list[list[str]]:
    """For every layout, the weights that differ from those of the unquantized checkpoint."""
    want = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16).state_dict()
    found = []
    for number, sizes in enumerate(LAYOUTS):
        model: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16, distributed_setup=sizes)
        found.append(differing_tensors({name: work.full(value) for name, value in model.state_dict().items()}, want))
        model.save_pretrained(out / str(number))
    return found


def test_every_rank_reads_its_slices_with_their_scales(tmp_path):
    stored, exact = checkpoints(False)
    assert on_ranks(2, load_and_save, stored, exact, tmp_path) == [[[], [], []]] * 2
    AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16).save_pretrained(tmp_path / "want")
    want = load_file(tmp_path / "want" / "model.safetensors")
    for number in range(len(LAYOUTS)):
        folder = tmp_path / str(number)
        saved = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        assert not differing_tensors(saved, want)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
