"""The same few training steps with somebody's Trainer, on ranks or alone."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

import expertmesh
from expertmesh.parallel.setup import DistributedSetup

STEPS = 4
# bfloat16 is its default; and every rank balances its own tokens, so the router's loss is another one on two ranks
SFT = {"trl", "our trl"}
AT_ONCE = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}  # on each of two ranks
TRL = {"max_length": None, "router_aux_loss_coef": 0.0, "bf16": False}


def rows() -> list[dict[str, list[int]]]:
    """Documents of different lengths."""
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (9, 14, 6, 11, 13, 8, 10, 12) * 2]
    return [{"input_ids": ids, "labels": ids} for ids in documents]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch."""
    width = max(len(row["input_ids"]) for row in batch)
    pad = {"input_ids": 0, "labels": -100}
    padded = {key: [row[key] + [pad[key]] * (width - len(row[key])) for row in batch] for key in pad}
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    return {key: torch.tensor(value) for key, value in (padded | {"attention_mask": mask}).items()}


def arguments(kind: str, folder: Path, batch_size: int) -> dict[str, Any]:
    """What all trainers are given: accumulation, clipping, a log line for every step."""
    return (
        dict(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        | (TRL if kind in SFT else {})
        | (AT_ONCE if kind == "released" else {})
        | ({"optim_args": "matrices=muon"} if kind == "muon" else {})
    )


def records(rank: int, kind: str, folder: Path, setup: dict[str, Any] | None, out: Path) -> list[dict[str, float]]:
    """What is logged at every step. setup None: one process, stock model, all rows of a step on it."""
    batch_size = 2
    if setup is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        chosen = DistributedSetup(**setup)
        batch_size //= chosen.dp_size
        model = expertmesh.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_setup=chosen)
    if kind in SFT:
        import trl
        from datasets import Dataset

        cls = {"trl": trl.SFTTrainer, "our trl": expertmesh.SFTTrainer}[kind]
        data = Dataset.from_list(rows())
        trainer = cls(
            model,
            trl.SFTConfig(**arguments(kind, out, batch_size)),
            train_dataset=data,
            data_collator=collate,
            processing_class=expertmesh_tokenizer(),
        )
    else:
        ours = functools.partial(expertmesh.Trainer, gradient_release="exact" if kind == "released" else None)
        cls: Any = transformers.Trainer if kind == "stock" else ours
        args = transformers.TrainingArguments(**arguments(kind, out, batch_size))
        trainer = cls(model, args, train_dataset=rows(), data_collator=collate)
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def expertmesh_tokenizer() -> Any:
    """Any tokenizer: the rows are tokens already."""
    from expertmesh.data import demo_tokenizer

    return demo_tokenizer()
