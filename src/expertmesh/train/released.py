"""Steps of a `Trainer` that update weights within backward: what cannot be combined with that, and the check before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from expertmesh.memory.release import GradientRelease


def refuse_to_release(trainer: Any) -> None:
    """Raise ValueError for what a Trainer is set up to do that cannot be done when gradients are released."""
    args = trainer.args
    reasons = {
        "gradients are accumulated over several microbatches, which keeps them. Set gradient_accumulation_steps=1 and "
        "raise per_device_train_batch_size": args.gradient_accumulation_steps > 1,
        "float16's loss scaler looks at gradients after backward. Train in bfloat16": trainer._scales_loss,
        "DeepSpeed and Accelerate's FSDP update weights by themselves. Load the model with distributed_setup=": (
            trainer._has_other_format
        ),
        "on several GPUs it needs a model that is laid out as it is loaded, as DistributedDataParallel averages "
        "gradients later. Pass distributed_setup= to from_pretrained": args.n_gpu > 1
        or (args.world_size > 1 and not trainer.is_sharded),
        "auto_find_batch_size repeats steps, of which half may have been taken. Set a batch size": (
            args.auto_find_batch_size
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"Gradients cannot be released: {reason}, or set gradient_release=None.")


@contextmanager
def checking(accelerator: Any, release: GradientRelease, num_items: torch.Tensor | int | None) -> Iterator[None]:
    """Within, `accelerator.backward(loss)` has the loss checked first. A step without a label counts as not finite."""
    backward = accelerator.backward

    def checked(loss: torch.Tensor, **options: Any) -> None:
        seen = loss.detach()
        if num_items is not None:
            items = torch.as_tensor(num_items).to(seen.device, non_blocking=True)
            seen = torch.where(items > 0, seen, torch.nan)
        release.check(seen)
        backward(loss, **options)

    accelerator.backward = checked
    try:
        yield
    finally:
        del accelerator.backward
