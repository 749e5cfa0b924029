"""Every trainer that people use gives a fused model the gradients that it should have: TRL's those of the stock model,
and packed and padded batches those of each document by itself.

A trainer makes its own batch and takes one step on it, without an optimizer.
"""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, TrainingArguments

import expertmesh
from expertmesh.bench.parity import CPU_TOLERANCE
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import FAMILIES
from tests.layers.test_rows import LENGTHS, STATEFUL, alone, documents, gradients, trained
from tests.models import load_ours, load_stock, saved
from tests.test_ecosystem import arguments, tokenizer
from tests.test_ecosystem import rows as token_rows

SIX = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral", "qwen3_next"]
BETA = 0.5


def step(trainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the trainer's first batch."""
    torch.manual_seed(0)
    model = trainer.model.train()
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    loss = trainer.training_step(model, batches[0], count)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows(model) -> Dataset:
    return Dataset.from_list([{"input_ids": ids.tolist()} for ids in documents(model)])


def plain(cls, model, packed: bool, folder):
    """transformers' Trainer and ours."""
    padding = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    args = arguments(TrainingArguments, folder, per_device_train_batch_size=len(LENGTHS))
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packed else padding
    return cls(model, args, collator, rows(model))


def sft(cls, model, packed: bool, folder):
    """TRL's SFTTrainer and ours."""
    options = {"packing": True, "max_length": sum(LENGTHS)} if packed else {"padding_free": False}
    size = 1 if packed else len(LENGTHS)
    args = arguments(trl.SFTConfig, folder, per_device_train_batch_size=size, router_aux_loss_coef=0.0, **options)
    return cls(model, args, train_dataset=rows(model), processing_class=tokenizer())


#: TRL's last: it puts a head of its own on the model
TRAINERS = ((plain, transformers.Trainer), (plain, expertmesh.Trainer),
            (sft, expertmesh.SFTTrainer), (sft, trl.SFTTrainer))  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batch_gives_the_documents_own_gradients(family, tmp_path):
    model = trained(family)
    want = alone(model)
    for (make, cls), packed in itertools.product(TRAINERS, (True, False)):
        trainer = make(cls, model, packed, tmp_path)
        if packed and family in STATEFUL:
            with pytest.raises(ValueError, match="packed sequences apart|would mix them"):
                step(trainer)
            continue
        error, where = worst_error(step(trainer)[1], want)
        assert error <= CPU_TOLERANCE, (where, cls, packed)


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def preferences() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [words(9, 4) + " ", words(20, 7, 31, 5, 8) + " "],
            "chosen": [words(11, 91, 32), words(50)],
            "rejected": [words(3, 89, 65, 71, 41, 51), words(60, 61)],
        }
    )


def dpo(model, reference, folder, **options):
    args = arguments(trl.DPOConfig, folder, per_device_train_batch_size=2, beta=BETA, **options)
    return trl.DPOTrainer(model, reference, args, train_dataset=preferences(), processing_class=tokenizer())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dpo_of_padded_rows_gives_the_answers_own_gradients(family, tmp_path):
    """By the formula of DPO (arXiv:2305.18290), from one call for each answer."""
    reference, model = load_ours(family), trained(family)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1.2

    def log_prob(of, prompt: list[int], answer: list[int]) -> torch.Tensor:
        labels = [-100] * len(prompt) + answer
        return -of(torch.tensor([prompt + answer]), labels=torch.tensor([labels]), num_items_in_batch=1).loss

    trainer, losses = dpo(model, reference, tmp_path, router_aux_loss_coef=0.0), []
    for pair in trainer.train_dataset:
        gain = []
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            with torch.no_grad():
                before = log_prob(reference, pair["prompt_ids"], answer)
            gain.append(log_prob(model, pair["prompt_ids"], answer) - before)
        losses.append(-F.logsigmoid(BETA * (gain[0] - gain[1])) / 2)
    want = gradients(model, *losses)
    loss, found = step(trainer)
    assert relative_error(loss, sum(losses).detach()) <= CPU_TOLERANCE
    error, where = worst_error(found, want)
    assert error <= CPU_TOLERANCE, where


# --- the same trainer on the stock model and on ours, all of the model's own auxiliary loss included


def by_dpo(load, family, folder):
    return dpo(load(family), load(family), folder)


def by_sft(load, family, folder):
    args = arguments(trl.SFTConfig, folder, per_device_train_batch_size=3)
    model = load(family)
    return trl.SFTTrainer(model, args, train_dataset=rows(model), processing_class=tokenizer())


def by_kto(load, family, folder):
    options = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    data = [
        {"prompt": words(9 + i, 4) + " ", "completion": words(*range(5, 7 + i)), "label": i % 2 == 0} for i in range(4)
    ]
    args = arguments(trl.KTOConfig, folder, dataset_num_proc=None, **options)
    return trl.KTOTrainer(
        load(family), load(family), args, train_dataset=Dataset.from_list(data), processing_class=tokenizer()
    )


def by_grpo(load, family, folder):
    options = {"num_generations": 2, "max_completion_length": 5, "per_device_train_batch_size": 4, "beta": 0.1}
    args = arguments(trl.GRPOConfig, folder, **options)
    data = Dataset.from_list([{"prompt": words(9 + i, 4, *range(7, 7 + i))} for i in range(4)])

    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    model = load(family)
    return trl.GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=tokenizer())


def by_reward(load, family, folder):
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        saved(family), num_labels=1, dtype=torch.float32
    )
    model = model if load is load_stock else expertmesh.fuse(model)
    args = arguments(trl.RewardConfig, folder, per_device_train_batch_size=2)
    return trl.RewardTrainer(model, args, train_dataset=preferences(), processing_class=tokenizer())


@pytest.mark.parametrize(
    ("family", "make"),
    [(family, make) for family in SIX for make in (by_sft, by_dpo, by_kto, by_grpo)]
    # Transformers has no classifier of Nemotron 3
    + [("qwen2_moe" if family == "nemotron_h" else family, by_reward) for family in SIX],
)
def test_losses_and_gradients_are_the_stock_model_s(family, make, tmp_path):
    stock, ours = (make(load, family, tmp_path / load.__name__) for load in (load_stock, load_ours))
    (theirs, want), (loss, found) = step(stock), step(ours)
    torch.testing.assert_close(loss, theirs, rtol=CPU_TOLERANCE, atol=CPU_TOLERANCE)  # GRPO's is about zero
    error, where = worst_error(found, want)
    assert error <= CPU_TOLERANCE, where


# --- expertmesh.Trainer takes what transformers' takes


def of_tuples(examples):
    return {"input_ids": torch.stack([ids for ids, _ in examples]), "labels": torch.stack([y for _, y in examples])}


def of_objects(examples):
    return of_tuples([(example.input_ids, example.labels) for example in examples])


def of_tensors(examples):
    return of_tuples([(torch.as_tensor(ids), torch.as_tensor(ids)) for ids in examples])


def with_masks(examples, lowest: float, kinds: bool = False):
    """Batches of one's own masks, [B, 1, S, S]: causal, and two documents in each row."""
    batch = of_tuples([(example["input_ids"], example["labels"]) for example in examples])
    mask = torch.full((12, 12), lowest).triu(1)
    mask[6:, :6] = lowest
    mask = mask.expand(len(examples), 1, 12, 12)
    return batch | {"attention_mask": {"full_attention": mask, "sliding_attention": mask} if kinds else mask}


AS_IT_IS = {
    "tuples": (lambda row: (row["input_ids"], row["labels"]), of_tuples),
    "objects": (lambda row: SimpleNamespace(**row), of_objects),
    "tensors": (lambda row: row["input_ids"], of_tensors),
    "lists": (lambda row: row["input_ids"].tolist(), of_tensors),
    "encodings": (transformers.BatchEncoding, transformers.default_data_collator),
    "masks of one's own": (lambda row: row, functools.partial(with_masks, lowest=float("-inf"))),
    "masks, finite": (lambda row: row, functools.partial(with_masks, lowest=torch.finfo(torch.float32).min)),
    "masks for each kind": (lambda row: row, functools.partial(with_masks, lowest=float("-inf"), kinds=True)),
}


@pytest.mark.parametrize("kind", AS_IT_IS)
def test_examples_and_masks_of_any_kind(kind, tmp_path):
    example, collate = AS_IT_IS[kind]
    made = []
    for cls, load in ((transformers.Trainer, load_stock), (expertmesh.Trainer, load_ours)):
        args = arguments(TrainingArguments, tmp_path, remove_unused_columns=False, label_names=["labels"])
        made.append(cls(load("gpt_oss"), args, collate, [example(row) for row in token_rows()]))
    (theirs, want), (loss, found) = (step(trainer) for trainer in made)
    assert relative_error(loss, theirs) <= CPU_TOLERANCE
    error, where = worst_error(found, want)
    assert error <= CPU_TOLERANCE, where
    assert made[1].tokens == 48


def test_a_batch_that_is_no_mapping_reaches_one_s_own_loss(tmp_path):
    class Own(expertmesh.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs[0], labels=inputs[1]).loss

    args = arguments(TrainingArguments, tmp_path, remove_unused_columns=False, max_steps=1)
    data = [(row["input_ids"], row["labels"]) for row in token_rows()]
    trainer = Own(load_ours("qwen3_moe"), args, torch.utils.data.default_collate, data)
    assert trainer.train().training_loss > 0
