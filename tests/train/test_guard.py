"""A loss or gradient that is not finite stops a run before the optimizer step, and says where it came from."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig

import expertmesh
from expertmesh.bench.tiny import tiny_model
from expertmesh.data import demo_tokenizer
from expertmesh.fuse import fuse
from expertmesh.train.guard import NonFiniteError, StepRecord
from tests.train.runs import rows

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def token_rows(count=40, labels=None):
    """Rows of 6 tokens; row i begins with token 10 + i, so that a batch shows which rows it holds."""
    ids = [[10 + i, 3, 4, 5, 6, 7] for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels or ids})


def trainer(tmp_path, model, dataset=None, **settings):
    args = transformers.TrainingArguments(str(tmp_path), **SETTINGS | settings)
    dataset = token_rows() if dataset is None else dataset
    return expertmesh.Trainer(model=model, args=args, train_dataset=dataset)


def fused():
    return fuse(tiny_model("qwen3_moe"))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_unchanged(model, before):
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) or torch.equal(weight.isnan(), before[name].isnan()), name


class PoisonedLoss(torch.nn.Module):
    """A model whose loss is nan for every batch that holds row `row` of token_rows."""

    def __init__(self, model, row):
        super().__init__()
        self.model, self.row, self.config = model, row, model.config

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        guilty = (input_ids[:, 0] == 10 + self.row).any()
        output.loss = torch.where(guilty, torch.full_like(output.loss, float("nan")), output.loss)
        return output


def test_a_nan_loss_stops_before_the_step_and_names_the_rows(tmp_path):
    model = PoisonedLoss(fused(), row=13)
    run, seen = trainer(tmp_path, model, max_steps=20), []

    class Remember(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[:] = [weights(model)]

    run.add_callback(Remember())
    with pytest.raises(NonFiniteError) as caught:
        run.train()
    error = caught.value
    assert error.what == "loss" and error.step > 1, "the seed should put row 13 after the first step"
    assert error.step == run.state.global_step + 1
    assert error.rows is not None and 13 in error.rows and len(error.rows) == 2, "the guilty microbatch alone"
    assert_unchanged(model, seen[0])
    text = str(error)
    for part in (f"Step {error.step} was stopped", "No weight was changed", "13", "nan", "lower the learning rate"):
        assert part in text
    assert "\n" not in text
    saved = json.loads(error.batch_file.read_text())
    assert saved["step"] == error.step
    assert [ids[0] - 10 for batch in saved["microbatches"] for ids in batch["input_ids"]] == error.rows


def test_a_damaged_weight_is_named(tmp_path):
    model = fused()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(NonFiniteError, match="1 weights .* first model.layers.0.self_attn.q_proj.weight") as caught:
        trainer(tmp_path, model).train()
    assert caught.value.step == 1
    assert_unchanged(model, before)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_nan_gradient_alone_stops_before_the_step(tmp_path, max_grad_norm):
    model = fused()
    model.lm_head.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([5]), float("nan")))
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the gradient is not finite") as caught:
        trainer(tmp_path, model, max_grad_norm=max_grad_norm).train()
    assert caught.value.what == "gradient" and len(caught.value.rows) == 4, "all microbatches of the step"
    assert_unchanged(model, before)


def test_a_step_without_labels_stops(tmp_path):
    masked = token_rows(8, labels=[[-100] * 6] * 8)
    model = fused()
    before = weights(model)
    with pytest.raises(ValueError, match=r"All labels of step 1 are masked.*\{% generation %\}.*chat_template"):
        trainer(tmp_path, model, masked).train()
    assert_unchanged(model, before)


def test_one_masked_microbatch_among_others_is_trained(tmp_path):
    labels = [[-100] * 6 if i % 8 == 0 else [10 + i, 3, 4, 5, 6, 7] for i in range(16)]
    run = trainer(
        tmp_path, fused(), token_rows(16, labels), per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    assert run.train().training_loss > 0


def test_the_guard_and_the_router_counts_ask_the_device_once_per_step(tmp_path, monkeypatch):
    readers = []

    def recording(stock):
        def read(self, *args, **kwargs):
            readers.append(Path(sys._getframe(1).f_code.co_filename))
            return stock(self, *args, **kwargs)

        return read

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, recording(getattr(torch.Tensor, name)))
    for microbatches in (1, 8):
        readers.clear()
        trainer(tmp_path, fused(), max_steps=3, logging_steps=10, gradient_accumulation_steps=microbatches).train()
        ours = [path.name for path in readers if path.parent.name == "train"]
        assert [name for name in ours if name != "buckets.py"] == ["guard.py"] * 3  # batches are laid out on the CPU


def test_the_next_batch_is_collated_before_the_device_is_waited_for(tmp_path, monkeypatch):
    events = []
    check, collate = StepRecord.check, transformers.default_data_collator
    monkeypatch.setattr(StepRecord, "check", lambda *args: events.append("check") or check(*args))
    run = trainer(tmp_path, fused(), max_steps=4, gradient_accumulation_steps=1)
    run.data_collator = lambda rows: events.append("collate") or collate(rows)
    run.train()
    assert events == ["collate", "collate", *["collate", "check"] * 4]  # the first two are Accelerate's


class Broken(torch.utils.data.Dataset):
    """Row 13 cannot be read."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 13:
            raise OSError("row 13 is on a disk that is gone")
        return {"input_ids": [10 + i, 3, 4, 5], "labels": [10 + i, 3, 4, 5]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_row_that_cannot_be_read_ends_the_run_at_the_same_step_as_stock(tmp_path, accumulate):
    reached = []
    for cls in (transformers.Trainer, expertmesh.Trainer):
        options = SETTINGS | {"gradient_accumulation_steps": accumulate, "seed": 1}
        run = cls(model=fused(), args=transformers.TrainingArguments(str(tmp_path), **options), train_dataset=Broken())
        with pytest.raises(OSError, match="disk that is gone"):
            run.train()
        reached.append(run.state.global_step)
    assert reached[0] == reached[1]


def test_sft_names_rows_and_a_packed_run_says_that_it_cannot(tmp_path):
    for packing in (False, True):
        model = fuse(tiny_model("qwen3_moe", vocab_size=4096))
        model.lm_head.weight.data.fill_(float("inf"))
        args = SFTConfig(
            str(tmp_path), **SETTINGS, packing=packing, max_length=64, bf16=False, activation_checkpointing=False
        )
        run = expertmesh.SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows()), processing_class=demo_tokenizer()
        )
        with pytest.raises(NonFiniteError) as caught:
            run.train()
        assert (caught.value.rows is None) == packing
        assert ("cannot be traced" in str(caught.value)) == packing
        assert "Count to" in str(caught.value), "the text that the batch begins with"


def test_float16_loss_scaling_may_overflow_without_stopping(tmp_path):
    run = trainer(tmp_path, fused(), max_steps=1)
    run._record.losses = [torch.tensor(1.0)]

    class Scaler:
        def is_enabled(self):
            return True

    run.accelerator.scaler = Scaler()
    overflowed = torch.tensor(float("inf"))
    run.accelerator.clip_grad_norm_ = lambda *_: overflowed
    assert run._get_grad_norm(run.model) is overflowed
