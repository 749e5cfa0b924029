"""The routers' bias moves by the rate towards even load, and not at all unless that is asked for."""

import pytest
import torch
from transformers import TrainingArguments

from expertmesh import Trainer
from expertmesh.bench.tiny import tiny_model
from expertmesh.moe.block import routers
from expertmesh.train.balance import BalanceRouters
from expertmesh.train.routing import RouterLoad
from tests.models import load_ours


def biases(model) -> list[torch.Tensor]:
    return [router.e_score_correction_bias for _, router in routers(model)]


def test_experts_with_much_load_lose_and_others_gain_exactly_the_rate():
    model = tiny_model("deepseek_v3").train()
    load = RouterLoad(model)
    balance = BalanceRouters(model, load, 0.01)
    before = [bias.clone() for bias in biases(model)]
    model(input_ids=torch.randint(3, 128, (2, 31)))
    load.mask = torch.tensor([[1] * 31, [0] * 31])
    model(input_ids=torch.randint(3, 128, (2, 31)))
    model.eval()(input_ids=torch.randint(3, 128, (2, 31)))  # evaluation does not count
    load.window()
    balance.on_step_end(None, None, None)
    assert load.last is not None and load.last.sum() == 3 * 31 * 3 * len(before)
    for bias, old, counts in zip(biases(model), before, load.last, strict=True):
        expected = 0.01 * torch.from_numpy(counts.mean() - counts).sign().float()
        torch.testing.assert_close(bias - old, expected, rtol=0, atol=1e-6)
        assert expected.any()
    now = [bias.clone() for bias in biases(model)]
    balance.on_step_end(None, None, None)  # nothing was counted since
    assert all(torch.equal(*pair) for pair in zip(biases(model), now, strict=True))


@pytest.mark.parametrize("rate", [None, 0.02])
def test_training_with_it_evens_the_load_and_without_it_leaves_the_bias(rate, tmp_path):
    model = load_ours("deepseek_v3")
    with torch.no_grad():
        for bias in biases(model):
            bias[:2] += 0.5
    before = [bias.clone() for bias in biases(model)]
    ids = [{"input_ids": row, "labels": row} for row in torch.randint(3, 128, (48, 16)).tolist()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=24, per_device_train_batch_size=2, learning_rate=0.0, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ids)
    if rate is not None:
        trainer.add_callback(BalanceRouters(model, trainer.load, rate))
    trainer.train()
    found = [record["moe/load_cv"] for record in trainer.state.log_history if "moe/load_cv" in record]
    if rate is None:
        assert all(torch.equal(*pair) for pair in zip(biases(model), before, strict=True))
    else:
        assert sum(found[-4:]) < 0.8 * sum(found[:4])


def test_a_model_without_such_a_bias_is_refused():
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="No router of Qwen3MoeForCausalLM has"):
        BalanceRouters(model, RouterLoad(model), 0.001)
