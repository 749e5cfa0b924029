"""Batches in buckets: the same loss and gradients, few shapes, and nothing that asks for a value once rows are made."""

import functools

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening

from expertmesh.bench.rows import worst_error
from expertmesh.layers.rows import inspect_rows
from expertmesh.train.buckets import bucket_for, fused_base, one_row, pad_to_bucket, sizes
from expertmesh.train.graphed import WARM_UP, GraphedStep
from expertmesh.train.trainer import Trainer
from tests.models import load_ours, load_stock
from tests.train import tape
from tests.train.tape import Tape

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def padded(seed=0, side="right", rows=3, longest=17):
    """Rows of changing lengths, the first tokens of each without a label."""
    lengths = torch.randint(4, longest, (rows,), generator=generator(seed)).tolist()
    ids = torch.randint(3, 128, (rows, longest), generator=generator(seed + 1))
    place = torch.arange(longest).expand(rows, -1)
    keep = torch.stack([p < n if side == "right" else p >= longest - n for p, n in zip(place, lengths, strict=True)])
    first = keep.int().argmax(1, keepdim=True)
    labels = ids.masked_fill(~keep | (place < first + (2 if side == "left" else 1)), -100)
    return {"input_ids": ids.masked_fill(~keep, 0), "attention_mask": keep.long(), "labels": labels}


def packed(seed=0, told=True, documents=5):
    lengths = torch.randint(1, 15, (documents,), generator=generator(seed)).tolist()
    rows = [{"input_ids": torch.randint(3, 128, (n,), generator=generator(seed + i)).tolist()}
            for i, n in enumerate(lengths)]  # fmt: skip
    return DataCollatorWithFlattening(return_flash_attn_kwargs=told, return_tensors="pt")(rows)


BATCHES = {
    "padded": padded(),
    "padded on the left": padded(side="left"),
    "packed": packed(),
    "packed, told by positions": packed(told=False),
    "labels across documents": packed(told=False) | {"labels": packed()["input_ids"]},
    "rows without padding": {"input_ids": padded()["input_ids"], "labels": padded()["input_ids"]},
}


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(29)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def ours(family):
    return load_ours(family).train()


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bucket_gives_the_loss_and_gradients_of_the_batch_as_it_came(family, kind):
    model, batch = ours(family), BATCHES[kind]
    model.config.output_router_logits = hasattr(model, "router_aux_loss_coef")
    row = one_row(batch)
    tokens, documents, longest = bucket = bucket_for(sizes(row), [])
    inputs = pad_to_bucket(row, bucket)
    assert inputs["input_ids"].shape == (1, tokens) and len(inputs["cu_seq_lens_q"]) == documents + 1
    assert inputs["cu_seq_lens_q"].diff().max() <= longest and inputs["cu_seq_lens_q"][-1] == tokens
    assert inputs["attention_mask"].sum() == row["input_ids"].numel() < tokens
    want, wanted = loss_and_gradients(model, **batch)
    loss, gradients = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys() and worst_error(gradients, wanted)[0] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_changing_lengths_are_replayed_from_one_bucket(family, monkeypatch):
    tape.instead_of_cuda(monkeypatch)
    Tape.made.clear()
    plain = {"experts": False, "linear_cross_entropy": False}  # on a CPU these want to know their rows
    model, other = (load_ours(family, fused=plain).train() for _ in range(2))
    model.set_experts_implementation("batched_mm")
    buckets, step = [], GraphedStep(model)
    for seed in range(WARM_UP + 4):
        batch = padded(seed) if seed % 2 else packed(seed)
        row = one_row(batch)
        bucket = bucket_for(sizes(row), buckets)
        model.zero_grad()
        count = torch.tensor(20 + seed)
        loss = step(**pad_to_bucket(row, bucket), num_items_in_batch=count)
        other.zero_grad()
        want = other(**batch, num_items_in_batch=count).loss
        want.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=0)
        grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, other)]
        assert worst_error(*grads)[0] <= 1e-5
    assert len(buckets) == 1 and step.replayed == 4


def holds(bucket, tokens, documents, longest):
    """Whether such a row fits, and the documents of padding behind it."""
    padding = -(-(bucket[0] - tokens) // bucket[2])
    return tokens <= bucket[0] and longest <= bucket[2] and documents + padding <= bucket[1]


def test_buckets_are_few():
    buckets = []
    for seed in range(300):
        tokens, documents, longest = (
            int(torch.randint(low, high, (), generator=generator(3 * seed + i)))
            for i, (low, high) in enumerate([(4097, 8193), (1, 60), (500, 4096)])
        )
        bucket = bucket_for((tokens, documents, longest), buckets)
        assert holds(bucket, tokens, documents, longest) and bucket[0] <= 1.25 * tokens
    used = {bucket_for((tokens, 20, 1000), buckets) for tokens in range(4097, 8193)}
    assert len(used) == 4 and len(buckets) <= 8


def test_a_larger_bucket_than_the_row_s_own_holds_its_documents_of_padding():
    row = one_row(packed())  # another rank's row is longer
    inputs = pad_to_bucket(row, (512, 32, 64))
    assert inputs["cu_seq_lens_q"].diff().max() <= 64 and inputs["cu_seq_lens_q"][-1] == 512
    assert (inputs["position_ids"] < 64).all()


@pytest.mark.parametrize(
    ("made", "row", "fits"),
    [
        ((128, 3, 64), (100, 2, 60), True),
        ((128, 2, 64), (100, 2, 60), False),  # 28 tokens are one document more
        ((128, 2, 64), (128, 2, 64), True),
        ((128, 2, 64), (128, 2, 65), False),
        ((512, 32, 64), (100, 2, 60), False),  # of more tokens than its own would have
    ],
)
def test_a_row_takes_a_bucket_that_holds_it_and_its_padding(made, row, fits):
    assert (bucket_for(row, [made]) == made) == fits


def test_the_smallest_bucket_that_holds_a_row_is_taken():
    buckets = []
    small, large = (bucket_for((100, documents, 60), buckets) for documents in (3, 40))
    assert small != large and bucket_for((100, 3, 60), buckets) == small


def test_a_new_bucket_is_made_for_what_was_large_before():
    buckets = []
    bucket_for((5000, 60, 3000), buckets)
    bucket = bucket_for((7000, 1, 100), buckets)
    assert bucket_for((7000, 60, 3000), buckets) == bucket and len(buckets) == 2
    assert holds(bucket_for((4100, 30, 60), []), 4100, 30, 60), "1020 tokens are 16 documents of padding"


def test_documents_are_those_that_are_told_unless_a_mask_takes_tokens_away():
    batch = packed()
    length, bounds = batch["input_ids"].numel(), batch["cu_seq_lens_q"]
    row = one_row(batch | {"position_ids": torch.arange(length)[None]})
    assert torch.equal(row["cu_seq_lens_q"], bounds)
    padding = torch.arange(length)[None] == length - 1
    row = one_row(batch | {"attention_mask": ~padding, "labels": batch["labels"].masked_fill(padding, -100)})
    assert row["cu_seq_lens_q"][-1] == row["input_ids"].numel() == length - 1


def test_positions_of_one_row_are_those_of_all():
    rows = BATCHES["rows without padding"]
    row = one_row(rows | {"position_ids": torch.arange(17)[None]})
    assert torch.equal(row["position_ids"], one_row(rows)["position_ids"])


def left_padded_and_labelled():
    batch = padded(side="left")
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def with_a_hole(labelled):
    batch = padded()
    batch["attention_mask"][0, 1] = 0
    if not labelled:
        batch["labels"][0, :3] = -100
    return batch


@pytest.mark.parametrize(
    "batch",
    [
        left_padded_and_labelled(),  # padding predicts the first token
        with_a_hole(labelled=True),
        with_a_hole(labelled=False),  # windows of attention count it
        {
            "input_ids": torch.tensor([[3, 4, 5, 0]]),
            "labels": torch.tensor([[3, 4, 5, 7]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        },  # the last token is to predict one that is padding
        padded() | {"token_type_ids": padded()["input_ids"]},
        {"input_ids": padded()["input_ids"]},
        {name: value for name, value in packed().items() if name != "max_length_k"},  # told by halves
        padded() | {"attention_mask": torch.zeros_like(padded()["input_ids"])},
        padded() | {"attention_mask": torch.ones(3, 1, 17, 17)},
    ],
)
def test_what_would_not_be_the_same_stays_as_it_is(batch):
    assert one_row(batch) is None


def test_models_that_cannot_be_told_are_known():
    assert fused_base(load_stock("qwen3_moe")) is None
    assert fused_base(ours("qwen3_moe")).takes_documents(8192)
    assert not fused_base(load_ours("qwen3_next")).takes_documents(64)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)  # which come before every row
    assert fused_base(get_peft_model(load_ours("qwen3_moe"), virtual)) is None
    mixtral = fused_base(load_ours("mixtral", sliding_window=32))
    assert mixtral.takes_documents(32) and not mixtral.takes_documents(64)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batches", [padded, functools.partial(packed, told=False)], ids=["padded", "packed"])
def test_steps_that_are_not_recorded_do_not_ask_the_device_either(tmp_path, monkeypatch, batches, accumulate):
    """The collator's batch goes on as one row that is told: the base model, which would wait, does not look at it."""
    looks: list = []
    monkeypatch.setattr(
        "expertmesh.layers.base_model.inspect_rows", lambda *args: looks.append(args) or inspect_rows(*args)
    )

    def losses(cls):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, gradient_accumulation_steps=accumulate, per_device_train_batch_size=1,
            use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        rows = [{"seed": seed} for seed in range(6)]
        trainer = cls(load_ours("qwen3_moe"), args, lambda rows: dict(batches(rows[0]["seed"])), rows)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    want = losses(transformers.Trainer)
    assert len(looks) == 3 * accumulate
    assert losses(Trainer) == pytest.approx(want, rel=1e-5)
    assert len(looks) == 3 * accumulate


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_are_copied_without_waiting_where_their_memory_is_pinned(tmp_path, pinned):
    settings = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    settings.dataloader_pin_memory = pinned  # which use_cpu switches off
    assert Trainer(load_ours("qwen3_moe"), settings).accelerator.non_blocking is pinned
