"""Packed documents are still found when `position_ids` are given, and only then looked for."""

import torch
from transformers import masking_utils

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.tiny import tiny_config
from expertmesh.layers import masks


def test_transformers_looks_for_packing_only_when_positions_are_given(monkeypatch):
    looked = []
    monkeypatch.setattr(masks, "_look", lambda positions: looked.append(positions))
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).train()
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    model(input_ids=ids, labels=ids, use_cache=False)
    assert not looked
    model(input_ids=ids, labels=ids, use_cache=False, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    model(ids, None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)
    assert len(looked) == 2


def test_outside_a_fused_model_transformers_answers():
    packed = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1, 2]]))
    assert packed.tolist() == [[0, 0, 1, 1, 1]]
