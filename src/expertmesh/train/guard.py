"""Stop a run before a loss or gradient that is not finite reaches a weight.

All losses of an optimizer step and its gradient norm are checked at once, with one synchronization per step instead of
one per micro-batch. expertmesh's AdamW reads a flag on the device (`found_inf`) and skips the update if it is set; the
host reads the result meanwhile. Other optimizers run after the host has read it. The error saves the micro-batches at
fault. If weights are updated in the backward, the loss is checked before it (trainer.py).
"""

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expertmesh.data import REMEDY
from expertmesh.parallel import ranks
from expertmesh.train.errors import first_numbers

ROW = "__row__"  # batch key: the examples' indices in the training data; removed before the model is called
ONE_ROW = "__one_row__"  # batch key: the batch packed into one row (buckets.py); removed before the model is called
SHOWN = 24  # tokens of an example that the error message decodes

ADVICE = {
    "weights": "{count} weights had values that are not finite before this step, first {first}: go back to an earlier "
    "checkpoint, or if the run has only begun, check the one it started from with `expertmesh check`.",
    "loss": "All weights are finite, so the activations overflowed: lower the learning rate, lengthen the warm-up, "
    "clip with max_grad_norm, and train in bfloat16 instead of float16. If the same examples fail under another seed, "
    "start_check at their text and labels.",
    "gradient": "The losses and all weights are finite, so the backward pass overflowed: lower the learning rate, "
    "clip with max_grad_norm, and train in bfloat16 instead of float16. If the same examples fail again, switch "
    "fusions off (`fused=False`) to rule out a kernel, and report it with the saved batch.",
}


class NonFiniteError(FloatingPointError):
    """Raised before the optimizer step if a loss or gradient is nan or infinite, so that no weight has changed.

    Exception: with released gradients, weights may have changed earlier in the same backward; the message says so.
    Attributes: `step` (the optimizer step that was stopped, from 1), `what` ("loss" or "gradient"), `rows` (the
    examples' indices in the training data, None if unknown, as after packing) and `batch_file`.
    """

    def __init__(self, message: str, step: int, what: str, rows: list[int] | None, batch_file: Path):
        super().__init__(message)
        self.step, self.what, self.rows, self.batch_file = step, what, rows, batch_file


@dataclass
class KeepRows:
    """Wrapper of a collator that moves the row numbers of the examples into the batch.

    Batches are still on the CPU here, so reading values costs no synchronization. drop_masks: delete masks without
    padding. one_row: packs the batch into one row, which is added to the batch.
    """

    collate: Callable[[list[Any]], Any]
    drop_masks: bool
    one_row: Callable[[Any], dict[str, Any] | None] | None

    def __call__(self, examples: list[Any]) -> Any:
        rows = [example.pop(ROW, None) if isinstance(example, MutableMapping) else None for example in examples]
        batch = self.collate(examples)
        if not isinstance(batch, MutableMapping):
            return batch
        packed_row, mask = self.one_row and self.one_row(batch), padding_mask(batch)
        if self.drop_masks and mask is not None and mask.all():
            del batch["attention_mask"]
        if packed_row is not None:
            batch[ONE_ROW] = packed_row
        if None not in rows:
            batch[ROW] = torch.tensor(rows)
        return batch


@dataclass
class StepRecord:
    """The micro-batches of one optimizer step and their losses (scalars on the device)."""

    batches: list[Mapping[str, Any]] = field(default_factory=list)
    rows: list[torch.Tensor | None] = field(default_factory=list)
    num_items: torch.Tensor | int | None = None
    losses: list[torch.Tensor] = field(default_factory=list)
    flags: torch.Tensor | None = None  # results of `start_check`, valid on the CPU after the event `copied`
    copied: torch.cuda.Event | None = None

    def start_check(self, grad_norm: torch.Tensor | float) -> torch.Tensor:
        """Check losses and gradient norm on the device, without waiting for it. Return `found_inf` for the optimizer:
        a float32 scalar on the device, 1 if the step must be skipped, else 0.
        """
        device = self.losses[0].device if self.losses else None
        grad_norm = torch.as_tensor(grad_norm, device=device)
        supervised = torch.as_tensor(1 if self.num_items is None else self.num_items, device=device) > 0
        finite = [torch.isfinite(value).all() for value in (grad_norm, *self.losses)]
        flags = torch.stack([supervised, *finite])
        self.flags = flags.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None
        return 1.0 - flags.all().float()

    def check(self, trainer: Any, grad_norm: torch.Tensor | float) -> None:
        """Raise NonFiniteError if a loss or the gradient norm is not finite, ValueError if all labels are masked.

        Call `start_check` first. Only here does a training step wait for the device. It waits for the event after
        `start_check`, not for later work, so that the host prepares the next step while the optimizer runs.
        """
        assert self.flags is not None
        if self.copied is not None:
            self.copied.synchronize()
        (has_labels, grad_finite, *loss_finite), step = self.flags.tolist(), trainer.state.global_step + 1
        if not has_labels:
            raise ValueError(f"All labels of step {step} are masked: there is nothing to learn from. {REMEDY}")
        if all(loss_finite) and grad_finite:
            return
        norm, guilty = torch.as_tensor(grad_norm).item(), [i for i, finite in enumerate(loss_finite) if not finite]
        losses = [f"microbatch {i + 1} of {len(self.batches)}: {self.losses[i].item()}" for i in guilty]
        what, symptom = "loss", f"the loss is not finite ({', '.join(losses)})"
        when, consequence = "before the optimizer ran", "No weight was changed"
        if not guilty:
            what, symptom, guilty = "gradient", f"the gradient is not finite (norm {norm})", [*range(len(loss_finite))]
            if trainer._release is not None and trainer._release.changed():
                when, consequence = "in its backward", "Later layers were already updated: go back to a checkpoint"
        microbatches: list[dict[str, Any]] = []
        for i in guilty:
            tokens = {key: self.batches[i][key].tolist() for key in ("input_ids", "labels") if key in self.batches[i]}
            numbers = self.rows[i]
            result = {"loss": str(self.losses[i].item()), "rows": None if numbers is None else numbers.tolist()}
            microbatches.append(result | tokens)
        suffix = f"-rank-{ranks.rank()}" if ranks.world_size() > 1 else ""  # each rank has its own batch
        path = Path(trainer.args.output_dir or ".") / f"nonfinite-step-{step}{suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "what": what, "grad_norm": str(norm), "microbatches": microbatches}))
        known = all(batch["rows"] is not None for batch in microbatches)
        rows = [row for batch in microbatches for row in batch["rows"]] if known else None
        origin = "cannot be traced to rows" if rows is None else f"are rows {first_numbers(rows)} of the training data"
        ids, decode = self.batches[guilty[0]].get("input_ids"), getattr(trainer.processing_class, "decode", None)
        begin = f", beginning {decode(ids[0, :SHOWN].tolist())!r}" if decode and ids is not None else ""
        damaged = [name for name, weight in trainer.model.named_parameters() if not torch.isfinite(weight).all()]
        advice = ADVICE["weights" if damaged else what].format(count=len(damaged), first=next(iter(damaged), ""))
        raise NonFiniteError(
            f"Step {step} was stopped {when}: {symptom}. {consequence}. Its examples "
            f"{origin}, saved in {path}{begin}. {advice}",
            *(step, what, rows, path),
        )


def padding_mask(batch: Any) -> torch.Tensor | None:
    """Return the batch's padding mask [B, S], nonzero for real tokens; None without one, or if it is a 4D mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def whole_steps_only(trainer: Any) -> dict[str, bool]:
    """Return the setups that allow neither CUDA graphs nor released gradients: {reason and fix: whether it applies}."""
    args, is_sharded = trainer.args, trainer.is_distributed_loading_by_transformers
    return {
        "gradients are accumulated over several micro-batches. Set gradient_accumulation_steps=1 and raise "
        "per_device_train_batch_size": args.gradient_accumulation_steps > 1,
        "float16's loss scaler reads the gradients' values after the backward. Train in bfloat16": trainer._scales_loss,
        "on several GPUs it needs a model that is sharded while it is loaded. Pass distributed_setup= to "
        "from_pretrained": args.n_gpu > 1 or (args.world_size > 1 and not is_sharded),
    }


def refuse_to_release(trainer: Any) -> None:
    """Raise ValueError if a Trainer's setup does not work with released gradients."""
    has_engine = trainer._has_other_format
    reasons = {
        "DeepSpeed and Accelerate's FSDP update weights themselves. Load the model with distributed_setup=": has_engine,
        "auto_find_batch_size repeats steps whose weights may be half updated. Set a batch size": (
            trainer.args.auto_find_batch_size
        ),
    }
    for reason, holds in (reasons | whole_steps_only(trainer)).items():
        if holds:
            raise ValueError(f"Gradients cannot be released: {reason}, or set gradient_release=None.")
