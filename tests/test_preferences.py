"""DPO, KTO and a reward model through TRL, with adapters on attention and experts: one model, its adapters off, is the
reference of itself, and losses and gradients are those of stock Transformers and PEFT.
"""

import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors import safe_open

import expertmesh
from expertmesh.bench.parity import CPU_TOLERANCE
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.layers.lora import FastLoraLinear
from expertmesh.moe.lora import FastParamWrapper
from tests.models import load_ours, load_stock, saved
from tests.test_ecosystem import arguments, tokenizer
from tests.test_trainers import preferences, step, words


def adapters(task="CAUSAL_LM"):
    torch.manual_seed(9)  # they do not start at zero, so the reference is another model
    return peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
        task_type=task,
    )


def by_dpo(model, folder, **options):
    args = arguments(trl.DPOConfig, folder, per_device_train_batch_size=2, beta=0.5)
    return trl.DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer(), **options)


def dpo(load, folder):
    return by_dpo(load("qwen3_moe"), folder, peft_config=adapters())


def dpo_of_gpt_oss(load, folder):
    return by_dpo(load("gpt_oss"), folder, peft_config=adapters())


def dpo_of_a_trained_adapter(load, folder):
    """The reference is a copy of the adapter, which TRL makes, and not the model without."""
    trainer = by_dpo(peft.get_peft_model(load("qwen3_moe"), adapters()), folder)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.mul_(1.5)
    return trainer


def by_kto(model, folder, **options):
    texts = [(words(9 + i, 4) + " ", words(*range(5, 7 + i)), i % 2 == 0) for i in range(4)]
    data = Dataset.from_list([dict(zip(("prompt", "completion", "label"), text, strict=True)) for text in texts])
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "dataset_num_proc": None}
    args = arguments(trl.KTOConfig, folder, **settings)
    return trl.KTOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), **options)


def kto(load, folder):
    return by_kto(load("qwen3_moe"), folder, peft_config=adapters())


def reward(load, folder):
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        saved("qwen3_moe"), num_labels=1, dtype=torch.float32
    )
    model = model if load is load_stock else expertmesh.fuse(model)
    args = arguments(trl.RewardConfig, folder, per_device_train_batch_size=2)
    return trl.RewardTrainer(
        model, args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=adapters("SEQ_CLS")
    )


@pytest.mark.parametrize("make", [dpo, dpo_of_gpt_oss, dpo_of_a_trained_adapter, kto, reward])
def test_losses_and_gradients_are_those_of_stock_with_peft(make, tmp_path):
    stock, ours = (make(load, tmp_path / load.__name__) for load in (load_stock, load_ours))
    (theirs, want), (loss, found) = step(stock), step(ours)
    assert relative_error(loss, theirs) <= CPU_TOLERANCE
    error, where = worst_error(found, want)
    assert error <= CPU_TOLERANCE and len(want) >= 12, where
    wrappers = [m for m in ours.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrappers) >= 12 and all(isinstance(m, FastLoraLinear | FastParamWrapper) for m in wrappers)


@pytest.mark.parametrize("make", [by_dpo, by_kto])
def test_with_adapters_off_the_model_is_its_own_reference(make, tmp_path):
    """The loss is that of two models, the second without adapters."""
    alone = make(load_ours("qwen3_moe"), tmp_path, peft_config=adapters())
    model = peft.get_peft_model(load_ours("qwen3_moe"), adapters())
    beside = make(model, tmp_path, ref_model=load_ours("qwen3_moe"))
    beside.model.load_state_dict(alone.model.state_dict())
    losses = [step(trainer)[0] for trainer in (alone, beside)]
    assert relative_error(losses[0], losses[1]) <= CPU_TOLERANCE
    with alone.model.disable_adapter():
        without = alone.compute_loss(alone.model, next(iter(alone.get_train_dataloader()))).detach()
    assert relative_error(losses[0], without) > 1e-3, "adapters matter"


@pytest.mark.parametrize("by", ["dpo", "reward"])
def test_the_example_trains_an_adapter_that_reaches_the_experts(by, tmp_path, monkeypatch):
    load_ours("qwen3_moe").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    preferences().to_json(tmp_path / "rows.jsonl")
    folders = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["preferences.py", by, *folders, "--max-steps", "1", "--batch", "2"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "preferences.py"), run_name="__main__")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any("experts.base_layer.lora_B" in name for name in names) and any("q_proj.lora_A" in name for name in names)
    assert any("score" in name for name in names) == (by == "reward")
