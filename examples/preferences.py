"""Preferences with adapters on attention and experts, by TRL: DPO, KTO or a reward model.

    python examples/preferences.py dpo --model Qwen/Qwen3-30B-A3B --data trl-lib/ultrafeedback_binarized --output run

One model is in memory: with its adapters off it is its own reference. `--data` names a dataset or a JSONL file with the
columns that TRL asks for: prompt, chosen, rejected (DPO, reward); prompt, completion, label (KTO). `--output` gets the
adapter in PEFT's format: `expertmesh merge` merges it, `expertmesh adapter` writes it for servers.
"""

import argparse
from pathlib import Path

import torch
import trl
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import expertmesh

TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
}


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("by", choices=TRAINERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    is_file = Path(given.data).is_file()
    rows = load_dataset("json", data_files=given.data) if is_file else load_dataset(given.data)
    options = {"dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32}
    if given.by == "reward":
        stock = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1, **options)
        model = expertmesh.fuse(stock)
    else:
        model = expertmesh.AutoModelForCausalLM.from_pretrained(given.model, **options)
    trainer, settings = TRAINERS[given.by]
    args = settings(
        output_dir=given.output,
        max_steps=given.max_steps,
        per_device_train_batch_size=given.batch,
        learning_rate=1e-5,
        bf16=False,  # the weights are, and the adapters stay float32
        report_to="none",
    )
    adapters = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",  # of a fused model: the routed experts, too
        task_type="SEQ_CLS" if given.by == "reward" else "CAUSAL_LM",
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    run = trainer(model, args=args, train_dataset=rows["train"], processing_class=tokenizer, peft_config=adapters)
    run.train()
    run.save_model(given.output)


if __name__ == "__main__":
    main()
