"""Of every family: an adapter made on the fused model is read by stock PEFT, and merged it is an ordinary model."""

import peft
import pytest
import torch

from expertmesh.adapters.merge import NotEqualError, merge
from expertmesh.bench import tiny
from tests.adapters.test_merge import FAMILIES, GATED, IDS, QKVO, TARGETS, assert_same, logits_of
from tests.models import load_ours, load_stock, saved

OTHERS = sorted(set(tiny.FAMILIES) - set(FAMILIES))
QUICK = {"mixtral", "qwen3_next", "glm4_moe"}
JAMBA = [*QKVO, "in_proj", "x_proj", "out_proj"]
#: where all-linear is not possible: PEFT refuses Mamba's out_proj, phimoe's router is a layer that returns several
#: tensors, and Jamba computes with the weight of dt_proj past its adapter
CHOSEN = {
    "nemotron_h": TARGETS["nemotron_h"],
    "phimoe": {"target_modules": QKVO, "target_parameters": GATED},
    "jamba": {"target_modules": JAMBA, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def drawn(model, targets):
    """(the model with a random adapter, the names of its factors)"""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)).eval()
    generator, factors = torch.Generator().manual_seed(1), {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in factors.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, list(factors)


@pytest.mark.parametrize(
    "family", FAMILIES + [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in OTHERS]
)
@torch.no_grad()
def test_adapters_of_the_fused_model_and_what_is_merged_give_stock_the_same_logits(family, tmp_path):
    model, adapted = drawn(load_ours(family), CHOSEN.get(family, {"target_modules": "all-linear"}))
    assert {".experts." in name for name in adapted} == {True, False}
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    stock = load_stock(family)
    plain = stock(input_ids=IDS).logits
    assert (plain - logits).abs().max() > 0.05 * logits.abs().max()
    assert_same(peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()(input_ids=IDS).logits, logits)
    merge(tmp_path / "adapter", str(saved(family)), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)


@pytest.mark.slow
@torch.no_grad()
def test_an_adapter_that_the_model_never_computes_is_not_merged(tmp_path):
    model, _ = drawn(load_stock("jamba"), {"target_modules": ["dt_proj"]})
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotEqualError):
        merge(tmp_path / "adapter", str(saved("jamba")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
