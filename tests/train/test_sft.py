"""expertmesh.SFTTrainer: TRL's loss, gradients and metrics, by the model's own head and without TRL's waits."""

import pytest
import torch
import trl
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTConfig

import expertmesh
from expertmesh import AutoModelForCausalLM
from expertmesh.bench.rows import relative_error
from tests.layers.test_mtp import saved
from tests.models import load_ours
from tests.test_ecosystem import BOTH, arguments, assert_same_updates, history, prompts, remember, texts, tokenizer

METRICS = ("entropy", "mean_token_accuracy", "num_tokens")
ACCUMULATING = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
PACKED = {"packing": True, "packing_strategy": "bfd", "padding_free": True}


def trained(cls, folder, model, data, **options):
    evaluation = options.pop("eval_dataset", None)
    args = arguments(SFTConfig, folder, max_length=16, dataset_num_proc=None, **options)
    trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=evaluation, processing_class=tokenizer())
    remember(trainer.model)
    trainer.train()
    return trainer


def both(folder, data, make=lambda: load_ours("qwen3_moe"), **options):
    """The same run by TRL's SFTTrainer and by ours."""
    trainers = []
    for cls in (trl.SFTTrainer, expertmesh.SFTTrainer):
        torch.manual_seed(4)
        trainers.append(trained(cls, folder / cls.__module__, make(), data, **options))
    return trainers


def assert_same_run(trainers, *more: str) -> None:
    theirs, ours = trainers
    assert ours.why_not_own_loss() is None
    assert relative_error(history(ours), history(theirs)) <= 1e-5
    for key in (*METRICS, *more):
        assert len(history(ours, key)) == len(history(theirs, key)) > 0, key
        torch.testing.assert_close(history(ours, key), history(theirs, key), rtol=1e-4, atol=1e-4)
    assert_same_updates(ours.model, theirs.model)


@pytest.fixture
def own_head(monkeypatch):
    """TRL's way to the loss is an error in training."""
    real = trl.SFTTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        assert type(self) is trl.SFTTrainer or not model.training
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", compute_loss)


@BOTH
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (texts, {}),
        (prompts, ACCUMULATING | {"completion_only_loss": True, "logging_steps": 2, "max_steps": 4}),
        (texts, PACKED | ACCUMULATING),
    ],
    ids=["padded", "completions", "packed"],
)
def test_losses_metrics_and_updates_are_trl_s(family, data, options, tmp_path, own_head):
    assert_same_run(both(tmp_path, data(), lambda: load_ours(family), **options))


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_so_is_the_auxiliary_loss_and_the_model_keeps_its_coefficient(coefficient, tmp_path, own_head):
    def make():
        return load_ours("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.2)

    trainers = both(tmp_path, prompts(), make, router_aux_loss_coef=coefficient, **ACCUMULATING)
    assert_same_run(trainers, "aux_loss")
    assert trainers[1].model.router_aux_loss_coef == 0.2


def test_a_record_of_one_s_own_takes_no_metrics_away(tmp_path, own_head):
    class Notes(expertmesh.SFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.log({"note": 1.0})
            return loss

    theirs = trained(trl.SFTTrainer, tmp_path / "theirs", load_ours("qwen3_moe"), texts(), logging_steps=2)
    assert_same_run([theirs, trained(Notes, tmp_path / "ours", load_ours("qwen3_moe"), texts(), logging_steps=2)])


def test_evaluation_knows_the_tokens_of_training(tmp_path, own_head):
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainers = both(tmp_path, texts(), eval_dataset=texts().select(range(6)), **options)
    assert_same_run(trainers, "eval_loss", "eval_entropy", "eval_num_tokens")


def test_adapters_train_so_too(tmp_path, own_head):
    def make():
        model = load_ours("qwen3_moe")  # which may have to be made first, by other random numbers
        torch.manual_seed(2)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    assert_same_run(both(tmp_path, texts(), make))


def test_metrics_wait_on_the_device_until_a_record(tmp_path, own_head, monkeypatch):
    read = []
    real = expertmesh.SFTTrainer._read_metrics
    monkeypatch.setattr(
        expertmesh.SFTTrainer, "_read_metrics", lambda self: read.append(len(self._unread)) or real(self)
    )
    trained(expertmesh.SFTTrainer, tmp_path, load_ours("qwen3_moe"), texts(), logging_steps=2, max_steps=5)
    assert read == [2, 2, 1]


def test_modules_for_multi_token_prediction_train_here_and_are_refused_by_trl(tmp_path, own_head):
    def make():
        return AutoModelForCausalLM.from_pretrained(saved("deepseek_v3"), dtype=torch.float32, mtp_loss_weight=0.3)

    ours = trained(expertmesh.SFTTrainer, tmp_path, make(), texts(), **PACKED).model
    parameters = ours._mtp.parameters_of(ours)
    before = [ours.weights_before[name] for name, _ in ours.named_parameters() if ours._mtp.owns(name)]
    assert all(not torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    with pytest.raises(ValueError, match="use expertmesh.SFTTrainer"):
        trained(trl.SFTTrainer, tmp_path, make(), texts(), **PACKED)


def virtual_tokens():
    return get_peft_model(load_ours("qwen3_moe"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: load_ours("qwen3_moe"), {"loss_type": "dft"}, "loss_type='dft'"),
        (lambda: load_ours("qwen3_moe"), {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (lambda: load_ours("qwen3_moe", fused={"linear_cross_entropy": False}), {}, "a head that makes logits"),
        (virtual_tokens, {}, "virtual tokens"),
    ],
)
def test_other_losses_and_heads_go_trl_s_way_and_say_so(make, options, reason, tmp_path, caplog):
    theirs, ours = both(tmp_path, texts(), make, **options)
    assert ours.why_not_own_loss() == reason and f"because of {reason}" in caplog.text
    assert torch.equal(history(ours), history(theirs))
    for key in METRICS:
        assert torch.equal(history(ours, key), history(theirs, key))


def test_a_model_that_turns_out_to_make_its_logits_goes_on_with_trl_s_head(tmp_path, caplog):
    def make():
        model = load_ours("qwen3_moe")
        model.loss_function = lambda *args, **options: ForCausalLMLoss(*args, **options)
        return model

    theirs, ours = both(tmp_path, texts(), make)
    assert "the head made logits" in caplog.text
    assert ours.why_not_own_loss() == "a head that makes logits"
    for key in ("loss", *METRICS):
        torch.testing.assert_close(history(ours, key), history(theirs, key), rtol=1e-4, atol=1e-4)
