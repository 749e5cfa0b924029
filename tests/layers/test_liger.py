"""Liger goes into a model without experts at its first forward on a GPU, and into nothing else."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama

from expertmesh import AutoModelForCausalLM
from expertmesh.layers.liger import apply_liger, why_not_liger

pytest.importorskip("liger_kernel")
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = LlamaConfig(**SIZES)
QWEN = Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)


@pytest.mark.parametrize(("stock", "config"), [(LlamaForCausalLM, CONFIG), (Qwen3ForCausalLM, QWEN)])
def test_on_the_cpu_the_model_computes_what_stock_computes(stock, config, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert type(model) is stock and AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().keys()
    stock = stock(config)
    stock.load_state_dict(model.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert len(model._forward_pre_hooks) == 1


def test_liger_changes_this_instance_and_nothing_else_in_the_process():
    before = {name: value for name, value in vars(modeling_llama).items()}
    model = LlamaForCausalLM(CONFIG)
    apply_liger(model)
    assert "forward" in vars(model) and "forward" in vars(model.model.norm)
    after = vars(modeling_llama)
    assert {name for name in before if after.get(name) is not before[name]} == set()
    assert type(LlamaForCausalLM(CONFIG).model.norm) is before["LlamaRMSNorm"]


def test_a_forward_that_a_trainer_replaced_is_left_alone():
    model = LlamaForCausalLM(CONFIG)
    own = lambda *args, **kwargs: "the trainer's"  # noqa: E731
    model.forward = own
    apply_liger(model)
    assert model.forward is own and "forward" in vars(model.model.norm)


def test_an_unknown_model_type_is_a_reason_not_an_error():
    model = LlamaForCausalLM(CONFIG)
    model.config.model_type = "nobody"
    assert "nobody" in why_not_liger(model)
