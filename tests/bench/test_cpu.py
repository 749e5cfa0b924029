"""On a CPU, too, a model is not slower than stock's."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM as StockAuto
from transformers import Qwen3MoeConfig

from expertmesh import AutoModelForCausalLM

CONFIG = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4,
    norm_topk_prob=True, max_position_embeddings=4096, use_cache=False,
)  # fmt: skip


def milliseconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return (time.perf_counter() - begin) * 1e3


@pytest.mark.slow
def test_expertmesh_is_not_slower_than_stock_on_a_cpu():
    """Shortest of alternating steps, because other work may share the cores."""
    models = {
        "stock-eager": StockAuto.from_config(Qwen3MoeConfig(**CONFIG), experts_implementation="eager"),
        "stock": StockAuto.from_config(Qwen3MoeConfig(**CONFIG), experts_implementation="grouped_mm"),
        "expertmesh": AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG)),
    }
    for model in models.values():
        model.train().load_state_dict(models["stock"].state_dict())
    ids = torch.randint(0, CONFIG["vocab_size"], (8, 256))
    rounds = [{arm: milliseconds(model, ids) for arm, model in models.items()} for _ in range(9)]
    shortest = {arm: min(each[arm] for each in rounds[2:]) for arm in models}
    assert shortest["expertmesh"] < min(shortest["stock"], shortest["stock-eager"]), shortest
