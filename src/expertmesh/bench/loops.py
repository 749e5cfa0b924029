"""Time the training loops of common trainers: transformers' Trainer, TRL's SFTTrainer and DPOTrainer, also with PEFT.

`expertmesh bench --loop sft-packed` trains the same model on the same rows in every arm with one of these trainers,
with AdamW and clipping. It times whole steps by wall clock, from the end of one to the end of the next, including data
loading and logging. It synchronizes with the device before the first measured step and after the last, so that the
total includes all work, but not between steps.

    row = measure(LOOPS["sft"], ARMS["expertmesh"], model, batch=4, seq=4096, warmup=6, repeats=24)
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from expertmesh import backends
from expertmesh.auto import AutoModelForCausalLM
from expertmesh.bench import loop_rows
from expertmesh.bench.arms import Arm, model_of
from expertmesh.bench.works import Work, config_of
from expertmesh.data import demo_tokenizer
from expertmesh.data.tokenizer import VOCABULARY
from expertmesh.parallel.setup import current_world_size
from expertmesh.train.errors import ConfigError, install

WARMUP, REPEATS = 6, 24
SHORTEST_SEQ = 16  # rows are divided into quarters
OWN_TRAINER = "expertmesh-trainer"
DEFAULT = ("stock", "stock-flash-attn-4", "stock-compiled", "expertmesh", OWN_TRAINER)
ON_RANKS = ("stock", "expertmesh", OWN_TRAINER)
#: the settings of all trainers; everything else is their default
SETTINGS: dict[str, Any] = dict(
    optim="adamw_torch_fused",
    max_grad_norm=1.0,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
#: TRL's defaults are autocast and activation checkpointing; these weights are bfloat16 already, and activations fit
TRL_SETTINGS: dict[str, Any] = dict(bf16=False, gradient_checkpointing=False)
#: the attention projections that get adapters, with the names of all families
ATTENTION = "q_proj k_proj v_proj o_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split()
EXPERTS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]  # the same for experts


@dataclass(frozen=True)
class Loop:
    """One training loop. `trainer`: Trainer, SFTTrainer or DPOTrainer. `rows`: a function of `loop_rows`. `padded`: a
    collator pads to the longest row of a batch. `lora`: adapters of rank 16 on the attention, everything else frozen.
    `experts`: also adapters on routed experts. `settings`: extra trainer settings. `ranks`: supports several GPUs.
    """

    trainer: str
    rows: Callable[[int, int, int], Any]
    padded: bool = False
    lora: bool = False
    experts: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: bool = False

    @property
    def needs(self) -> list[str]:
        """Packages of the `train` extra that this loop needs."""
        return ["trl", "datasets"] * (self.trainer != "Trainer") + ["peft"] * self.lora


LOOPS = {
    "trainer": Loop("Trainer", loop_rows.whole, ranks=True),
    "trainer-padded": Loop("Trainer", loop_rows.ragged, padded=True),
    "lora": Loop("Trainer", loop_rows.whole, lora=True),
    "lora-experts": Loop("Trainer", loop_rows.whole, lora=True, experts=True),
    "sft": Loop("SFTTrainer", loop_rows.whole_dataset),
    "sft-packed": Loop(
        "SFTTrainer",
        loop_rows.documents,
        settings={"packing": True, "packing_strategy": "bfd", "padding_free": True},
    ),
    "dpo": Loop("DPOTrainer", loop_rows.pairs, lora=True),
}


def refuse(names: tuple[str, ...], arms: tuple[str, ...], seq: int, device: str) -> None:
    """Raise ConfigError for loops and arms that cannot run on this machine; the message says what to do."""
    ranks = current_world_size()
    for name in names:
        missing = [package for package in LOOPS[name].needs if backends.version_of(package) is None]
        if missing:
            raise ConfigError(f"--loop {name} needs {' and '.join(missing)}: {install(*missing)} adds what is missing.")
        if ranks > 1 and not LOOPS[name].ranks:
            able = ", ".join(known for known, loop in LOOPS.items() if loop.ranks)
            raise ConfigError(f"--loop {name} runs in one process. On {ranks} ranks take --loop {able}.")
    for arm in arms:
        if ranks > 1 and arm not in ON_RANKS:
            raise ConfigError(f"{arm} runs in one process. On {ranks} ranks there are {', '.join(ON_RANKS)}.")
    if device == "cuda" and ranks == 1 and torch.cuda.device_count() > 1:
        raise ConfigError(
            "One process that sees several GPUs trains by nn.DataParallel: show it one (CUDA_VISIBLE_DEVICES=0), or "
            "start a rank for each by torchrun."
        )
    if seq < SHORTEST_SEQ:
        raise ConfigError(f"Rows of a loop are divided into parts: --seq {SHORTEST_SEQ} at least, not {seq}.")


def default_arms() -> tuple[str, ...]:
    """Return the default arms of a loop for this number of ranks."""
    return DEFAULT if current_world_size() == 1 else ON_RANKS


def why_not(loop: Loop, arm: Arm) -> str | None:
    """Return why this loop does not support the arm, or None if it does."""
    if arm.trainer and loop.trainer == "DPOTrainer":
        return "expertmesh has no DPOTrainer of its own; TRL's runs in the arm expertmesh."
    if arm.four_bit and not loop.lora:
        return "experts in 4 bits are frozen: the loops lora, lora-experts and dpo train adapters."
    return None


def loop_config(work: Work, layers: int | None, tiny: bool) -> PreTrainedConfig:
    """Return the work's configuration as users have it, with `use_cache` on until a trainer switches it off. Tiny
    models have the vocabulary of the built-in tokenizer.
    """
    return config_of(work, layers, tiny, use_cache=True, **({"vocab_size": VOCABULARY} if tiny else {}))


@contextmanager
def loop_model(
    arm: Arm, config: PreTrainedConfig, dtype: torch.dtype, device: str, attention: str | None
) -> Iterator[PreTrainedModel]:
    """Context manager that yields a model of this arm, with the same weights in every arm. On several ranks, stock uses
    Transformers' FSDP2, and ours divides the experts over all ranks.
    """
    if current_world_size() == 1:
        # in a loop the trainer compiles, not this function
        with model_of(dataclasses.replace(arm, compiled=False), config, dtype, device, attention) as model:
            yield model
        return
    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": attention} if attention and not arm.ours else {}
    setup = {"ep_size": current_world_size() if arm.ours else 1}
    yield AutoModelForCausalLM.from_config(
        config, dtype=dtype, fused=arm.ours, distributed_setup=setup, **options
    ).train()


def measure(
    loop: Loop, arm: Arm, model: PreTrainedModel, batch: int, seq: int, warmup: int, repeats: int
) -> dict[str, Any]:
    """Train `warmup` steps, then `repeats` measured steps of `batch` rows per rank. Return this rank's measurements.

    "tokens_per_second": tokens of the measured steps without padding, over the sum of their times, for all ranks.
    "peak_gib", "reserved_gib": peak memory that PyTorch allocated and reserved, from the first step on.
    "losses": of the first three steps and of the last, warm-up included.
    """
    ranks, steps = current_world_size(), warmup + repeats
    rows = loop.rows((steps + 1) * batch * ranks, seq, model.config.get_text_config().vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(loop, arm, model, rows, batch, seq, steps, folder)
        watch = _Watch(trainer, warmup)
        trainer.train()
    assert len(watch.ends) == steps + 1, f"{len(watch.ends) - 1} steps ran, not {steps}"
    times = [(end - start) * 1e3 for start, end in zip(watch.ends, watch.ends[1:], strict=False)]
    tokens, losses = [int(count) for count in watch.tokens], [float(loss) for loss in watch.losses]
    rate = sum(tokens[warmup:]) / sum(times[warmup:]) * 1e3

    def gib(measured: Callable[[], int]) -> float | None:
        return round(measured() / 2**30, 2) if model.device.type == "cuda" else None

    return {
        "ranks": ranks,
        "transformers": transformers.__version__,
        "trl": backends.version_of("trl") if "trl" in loop.needs else None,
        "step_ms": round(statistics.median(times[warmup:]), 2),
        "steps_ms": [round(ms, 2) for ms in times[warmup:]],
        "tokens": tokens[warmup:],
        "tokens_per_second": round(rate * ranks),
        "tokens_per_second_per_gpu": round(rate),
        "peak_gib": gib(torch.cuda.max_memory_allocated),
        "reserved_gib": gib(torch.cuda.max_memory_reserved),
        "first_step_s": round(times[0] / 1e3, 1),
        "losses": [round(loss, 6) for loss in (*losses[:3], losses[-1])],
    }


def _trainer(
    loop: Loop, arm: Arm, model: PreTrainedModel, rows: Any, batch: int, seq: int, steps: int, folder: str
) -> Any:
    """Return the trainer of this loop, stock's or ours, with the arguments that users pass."""
    source = "transformers" if loop.trainer == "Trainer" else "trl"
    settings = SETTINGS | loop.settings | {"output_dir": folder, "max_steps": steps}
    settings |= {"per_device_train_batch_size": batch, "use_cpu": model.device.type == "cpu"}
    options: dict[str, Any] = {"train_dataset": rows}
    if arm.trainer:
        del settings["optim"]  # our trainers have their own default
    if arm.compiled:
        torch._dynamo.reset()
        settings["torch_compile"] = True
    if source == "trl":
        settings |= TRL_SETTINGS | {"max_length": seq}
        options["processing_class"] = demo_tokenizer()
    if loop.padded:
        options["data_collator"] = transformers.DataCollatorForLanguageModeling(demo_tokenizer(), mlm=False)
    trained: Any = model
    if loop.lora:
        torch.manual_seed(0)  # adapters are initialized at random
        if source == "trl":
            options["peft_config"] = adapters(loop.experts)
        else:
            trained = adapted(model, loop.experts)
    config = "TrainingArguments" if source == "transformers" else loop.trainer.replace("Trainer", "Config")
    options["args"] = getattr(import_module(source), config)(**settings)
    return getattr(import_module("expertmesh" if arm.trainer else source), loop.trainer)(trained, **options)


def adapters(experts: bool) -> Any:
    """Return PEFT's configuration for adapters on attention, and with `experts` also on the routed experts."""
    from peft import LoraConfig

    targets: dict[str, Any] = {"target_modules": ATTENTION, "target_parameters": EXPERTS if experts else None}
    return LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", **targets)


def adapted(model: Any, experts: bool = True) -> Any:
    """Return the model with the adapters of `adapters`."""
    from peft import get_peft_model

    return get_peft_model(model, adapters(experts))


class _Watch(TrainerCallback):
    """Callback that records the end time, tokens and loss of every step. It resets the memory peak before the first
    step, not after the warm-up, because a CUDA graph allocates when it is recorded.
    """

    def __init__(self, trainer: Any, warmup: int) -> None:
        self.on_gpu, self.warmup = trainer.args.device.type == "cuda", warmup
        self.ends: list[float] = []  # the first entry is the start of training
        self.tokens: list[Any] = []
        self.losses: list[torch.Tensor] = []
        run = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            # both stay on the device, so nothing synchronizes
            self.tokens.append(inputs["input_ids"].numel() if mask is None else mask.sum())
            self.losses.append(run(model, inputs, *rest, **more).detach().clone())
            return self.losses[-1]

        trainer.training_step = training_step
        trainer.add_callback(self)
        trainer.remove_callback(transformers.PrinterCallback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = len(self.ends) == self.warmup  # the steps after this one are measured
        if self.on_gpu and (first or state.global_step >= state.max_steps):
            torch.cuda.synchronize()  # not between steps: a trainer may load data while the GPU works
        self._end()

    def _end(self) -> None:
        self.ends.append(time.perf_counter())
