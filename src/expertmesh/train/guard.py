"""Nothing that is not a number reaches a weight.

The losses of an optimizer step and its gradient norm are checked together: one synchronization per step, not one per
microbatch. Our AdamW reads a flag on the device (`found_inf`) and then changes no weight; the host reads the result
while it runs. Other optimizers run after the host has read it. The microbatches at fault are saved with the error.
Where weights are updated within backward the loss is checked before that (trainer.py).
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

ROW = "__row__"  # column of an example's position in the training data; it never reaches the model
ONE_ROW = "__one_row__"  # nor does the batch as a row of documents
SHOWN = 24  # tokens of an example that the error text decodes

ADVICE = {
    "weights": "{count} weights held values that are not finite before this step, first {first}: go back to a "
    "checkpoint before that, or if the run has only begun, check the one it came from with `expertmesh check`.",
    "loss": "All weights are finite, so the activations overflowed: lower the learning rate, lengthen the warm-up, "
    "clip with max_grad_norm, and train in bfloat16 instead of float16. If the same examples fail under another seed, "
    "look at their text and labels.",
    "gradient": "The losses and all weights are finite, so the backward pass overflowed: lower the learning rate, "
    "clip with max_grad_norm, and train in bfloat16 instead of float16. If the same examples fail again, switch "
    "fusions off (`fused=False`) to rule out a kernel, and report it with the saved batch.",
}


class NonFiniteError(FloatingPointError):
    """A loss or gradient was nan or infinite. Raised before the optimizer step: no weight has changed, unless gradients
    are released and this one came after others had been; the message says so.

    Attributes: `step` (the optimizer step that did not happen, from 1), `what` ("loss" or "gradient"), `rows` (the
    examples' positions in the training data, None where unknown, as after packing) and `batch_file`.
    """

    def __init__(self, message: str, step: int, what: str, rows: list[int] | None, batch_file: Path):
        super().__init__(message)
        self.step, self.what, self.rows, self.batch_file = step, what, rows, batch_file


@dataclass
class KeepRows:
    """A collator around a collator: takes the row numbers out of the examples and adds them to the batch.

    Batches are still on the CPU here, so that reading values costs no synchronization. drop_masks: leave out masks
    without padding. one_row: lays the batch out as one row, which is added to it.
    """

    collate: Callable[[list[Any]], Any]
    drop_masks: bool
    one_row: Callable[[Any], dict[str, Any] | None] | None

    def __call__(self, examples: list[Any]) -> Any:
        rows = [example.pop(ROW, None) if isinstance(example, MutableMapping) else None for example in examples]
        batch = self.collate(examples)
        if not isinstance(batch, MutableMapping):
            return batch
        one, mask = self.one_row and self.one_row(batch), padding_mask(batch)
        if self.drop_masks and mask is not None and mask.all():
            del batch["attention_mask"]
        if one is not None:
            batch[ONE_ROW] = one
        if None not in rows:
            batch[ROW] = torch.tensor(rows)
        return batch


@dataclass
class StepRecord:
    """The microbatches of one optimizer step: what went in, and the losses that came out (device scalars)."""

    batches: list[Mapping[str, Any]] = field(default_factory=list)
    rows: list[torch.Tensor | None] = field(default_factory=list)
    num_items: torch.Tensor | int | None = None
    losses: list[torch.Tensor] = field(default_factory=list)
    signs: torch.Tensor | None = None  # what `look` found, on the CPU once `copied` is over
    copied: torch.cuda.Event | None = None

    def look(self, grad_norm: torch.Tensor | float) -> torch.Tensor:
        """Look at losses and gradient norm on the device, without waiting for it. Returns a float32 scalar: 1 if the
        step must not be taken, else 0, as optimizers know it by the name of `found_inf`.
        """
        device = self.losses[0].device if self.losses else None
        grad_norm = torch.as_tensor(grad_norm, device=device)
        supervised = torch.as_tensor(1 if self.num_items is None else self.num_items, device=device) > 0
        finite = [torch.isfinite(value).all() for value in (grad_norm, *self.losses)]
        signs = torch.stack([supervised, *finite])
        self.signs = signs.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(signs.device).record_event() if signs.is_cuda else None
        return 1.0 - signs.all().float()

    def check(self, trainer: Any, grad_norm: torch.Tensor | float) -> None:
        """Raises NonFiniteError for a loss or gradient norm that is not finite, ValueError without a supervised label.

        Call `look` first. This is the only place where a training step waits for the device: for the event after
        `look`, not for later work, so that the host prepares the next step while the optimizer runs.
        """
        assert self.signs is not None
        if self.copied is not None:
            self.copied.synchronize()
        (has_labels, grad_finite, *loss_finite), step = self.signs.tolist(), trainer.state.global_step + 1
        if not has_labels:
            raise ValueError(f"All labels of step {step} are masked: there is nothing to learn from. {REMEDY}")
        if all(loss_finite) and grad_finite:
            return
        norm, guilty = torch.as_tensor(grad_norm).item(), [i for i, finite in enumerate(loss_finite) if not finite]
        losses = [f"microbatch {i + 1} of {len(self.batches)}: {self.losses[i].item()}" for i in guilty]
        what, symptom = "loss", f"the loss is not finite ({', '.join(losses)})"
        when, left = "before the optimizer ran", "No weight was changed"
        if not guilty:
            what, symptom, guilty = "gradient", f"the gradient is not finite (norm {norm})", [*range(len(loss_finite))]
            if trainer._release is not None and trainer._release.changed():
                when, left = "in its backward", "Weights behind it were changed: go back to a checkpoint"
        microbatches: list[dict[str, Any]] = []
        for i in guilty:
            tokens = {key: self.batches[i][key].tolist() for key in ("input_ids", "labels") if key in self.batches[i]}
            numbers = self.rows[i]
            found = {"loss": str(self.losses[i].item()), "rows": None if numbers is None else numbers.tolist()}
            microbatches.append(found | tokens)
        of_rank = f"-rank-{ranks.rank()}" if ranks.world_size() > 1 else ""  # each has its own batch
        path = Path(trainer.args.output_dir or ".") / f"nonfinite-step-{step}{of_rank}.json"
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
            f"Step {step} was stopped {when}: {symptom}. {left}. Its examples "
            f"{origin}, saved in {path}{begin}. {advice}",
            *(step, what, rows, path),
        )


def padding_mask(batch: Any) -> torch.Tensor | None:
    """[B, S], nonzero where a token is no padding, if the batch says so; masks of other shapes are for attention."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def whole_steps_only(trainer: Any) -> dict[str, bool]:
    """What is neither recorded nor trained with released gradients: why and what to change, and whether it is so."""
    args, laid_out = trainer.args, trainer.is_distributed_loading_by_transformers
    return {
        "gradients are accumulated over several microbatches. Set gradient_accumulation_steps=1 and raise "
        "per_device_train_batch_size": args.gradient_accumulation_steps > 1,
        "float16's loss scaler decides by values, behind the backward. Train in bfloat16": trainer._scales_loss,
        "on several GPUs it needs a model that is laid out as it is loaded. Pass distributed_setup= to "
        "from_pretrained": args.n_gpu > 1 or (args.world_size > 1 and not laid_out),
    }


def refuse_to_release(trainer: Any) -> None:
    """Raise ValueError for what a Trainer is set up to do that cannot be done when gradients are released."""
    others = trainer._has_other_format
    reasons = {
        "DeepSpeed and Accelerate's FSDP update weights by themselves. Load the model with distributed_setup=": others,
        "auto_find_batch_size repeats steps, of which half may have been taken. Set a batch size": (
            trainer.args.auto_find_batch_size
        ),
    }
    for reason, holds in (reasons | whole_steps_only(trainer)).items():
        if holds:
            raise ValueError(f"Gradients cannot be released: {reason}, or set gradient_release=None.")
