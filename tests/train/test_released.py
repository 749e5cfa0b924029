"""A Trainer whose weights are updated within backward logs, schedules, saves and resumes as an ordinary one."""

from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainingArguments, default_data_collator
from trl import SFTConfig

import expertmesh
from expertmesh.data import demo_tokenizer
from expertmesh.memory import release
from expertmesh.train.config import ConfigError, load_config
from expertmesh.train.guard import NonFiniteError
from tests.models import load_ours
from tests.train.runs import checkpoint
from tests.train.runs import rows as conversations
from tests.train.test_resume import assert_same, rows, weights


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(release, "BYTES", 2**14)


def arguments(folder: Any, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    } | options


def trainer(folder: Any, how: str | None, model: Any = None, **options: Any) -> expertmesh.Trainer:
    more = {key: options.pop(key) for key in ("cuda_graph", "optimizers") if key in options}
    model = model or load_ours("qwen3_moe", attention_dropout=0.1)
    args = TrainingArguments(**arguments(folder, **options))
    return expertmesh.Trainer(model, args, default_data_collator, rows(), gradient_release=how, **more)


def records(run: Any) -> list[dict[str, float]]:
    return [record for record in run.state.log_history if "grad_norm" in record]


@pytest.mark.parametrize(("how", "bound"), [("running", 0.0), ("exact", 0.05)])
def test_weights_and_logs_are_those_of_an_ordinary_run(tmp_path, how, bound):
    runs = []
    for each in (how, None):
        runs.append(trainer(tmp_path / str(each), each, max_grad_norm=bound, save_strategy="no"))
        runs[-1].train()
    ours, theirs = runs
    for one, other in zip(records(ours), records(theirs), strict=True):
        for key in ("loss", "learning_rate", "epoch", "step"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert len({record["learning_rate"] for record in records(ours)}) == 4
    for name, value in weights(ours).items():
        close = dict(rtol=0, atol=0) if bound == 0 else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, weights(theirs)[name], **close, msg=name)


def test_a_run_with_a_running_norm_goes_on_bit_for_bit(tmp_path):
    options = {"max_grad_norm": 0.05}
    whole = trainer(tmp_path / "whole", "running", **options)
    whole.train()
    resumed = trainer(tmp_path / "again", "running", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [r["grad_norm"] for r in records(resumed)] == [r["grad_norm"] for r in records(whole)]
    assert_same(weights(whole), weights(resumed))


def poisoned(model: Any, step: int, hook: Any) -> Any:
    """The model, of which `hook` changes the output from the given forward on."""
    calls: list[int] = []

    def change(module, _, output):
        calls.append(1)
        return hook(output) if module.training and len(calls) > step else output

    model.register_forward_hook(change)
    return model


def nan_loss(output: Any) -> Any:
    output.loss = output.loss + float("nan")
    return output


def nan_gradient(output: Any) -> Any:
    output.loss.register_hook(lambda gradient: gradient * float("nan"))
    return output


@pytest.mark.parametrize("hook", [nan_loss, nan_gradient])
def test_what_is_not_finite_stops_before_weights_change(tmp_path, hook):
    """With exact clipping a gradient, too: its norm is known before."""
    model = poisoned(load_ours("qwen3_moe"), 4, hook)
    run, seen = trainer(tmp_path, "exact", model), []

    class Remember(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    run.add_callback(Remember())
    with pytest.raises(NonFiniteError, match="No weight was changed") as caught:
        run.train()
    assert caught.value.step == 3 and caught.value.what == hook.__name__.removeprefix("nan_")
    assert_same(model.state_dict(), seen[-1])


def test_a_gradient_that_comes_too_late_says_that_weights_changed(tmp_path):
    model = load_ours("qwen3_moe")
    model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"stopped in its backward.*Later layers were already updated"):
        trainer(tmp_path, "running", model, max_grad_norm=0.0).train()


def test_a_step_without_labels_changes_nothing(tmp_path):
    model = load_ours("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path, "running", model)
    run.train_dataset = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows()]
    with pytest.raises(ValueError, match="label"):
        run.train()
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"auto_find_batch_size": True}, "Set a batch size"),
        ({"how": "exact", "max_grad_norm": 0.0}, "'running'"),
        ({"optim": "sgd"}, "not to SGD: a trainer has ours as optim='adamw_torch_fused'"),
        ({"cuda_graph": True}, "needs an NVIDIA GPU|Leave gradient_release out"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_says_what_to_change(tmp_path, options, match):
    how = options.pop("how", "running")
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, how, **options).train()


def test_sft_counts_tokens_once_though_trls_head_runs_twice(tmp_path):
    settings = arguments(tmp_path, max_steps=2, save_strategy="no", bf16=False, remove_unused_columns=True)
    counted = []
    for how in (None, "exact"):
        run = expertmesh.SFTTrainer(
            model=expertmesh.AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32),
            args=SFTConfig(**settings, label_smoothing_factor=0.1),
            train_dataset=Dataset.from_list(conversations(8)),
            processing_class=demo_tokenizer(),
            gradient_release=how,
        )
        assert run.why_not_own_loss() is not None
        run.train()
        counted.append([record["num_tokens"] for record in run.state.log_history if "num_tokens" in record])
    assert counted[0] == counted[1] and len(counted[0]) == 2


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["train.gradient_accumulation_steps=2"], "train.gradient_accumulation_steps"),
        (["train.cuda_graph=true"], "train.cuda_graph"),
        (["train.optim=sgd"], "train.optim"),
        (["train.max_grad_norm=0", "train.gradient_release=exact"], "set it to `running`"),
    ],
)
def test_a_configuration_says_it_before_the_model_is_loaded(overrides, match):
    with pytest.raises(ConfigError, match=match):
        load_config(None, ["train.gradient_release=running", *overrides])
