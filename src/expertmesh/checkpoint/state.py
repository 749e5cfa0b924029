"""Save and resume training in a custom loop: model, optimizer, scheduler, random states, and the loop's own values.

A checkpoint is a model directory for `from_pretrained` with additional files:

    model*.safetensors, config.json   the weights, written by the ranks that hold them
    optimizer/                        torch.distributed.checkpoint, in safetensors, by parameter name
    run.pt                            step, scheduler, and random states and `extra` of all ranks; if its content
                                      changes, `load_checkpoint` must refuse older files
    checkpoint.sha256                 the SHA-256 of all of these

Any number of ranks can load it in any layout. On as many ranks as saved it, training continues bit for bit.
"""

import copy
import io
import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers import PreTrainedModel

from expertmesh.checkpoint.optimizer import load_optimizer, regrouped, state_of, write_optimizer
from expertmesh.checkpoint.publish import prune, publishing, verify
from expertmesh.parallel import ranks
from expertmesh.weights.read import load_weights
from expertmesh.weights.write import files_of, write_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The loop's state in a checkpoint.

    `step` and this rank's `extra` are the arguments of `save_checkpoint`. `extras` has all ranks' `extra` in rank
    order. `extra` is None if the number of ranks has changed: then make each rank's own from `extras`.
    """

    step: int
    extra: dict[str, Any] | None
    extras: list[dict[str, Any]]


def save_checkpoint(
    directory: str | Path, *, model: Any, optimizer: torch.optim.Optimizer, step: int, scheduler: Any = None,
    extra: dict[str, Any] | None = None, keep: int | None = None, saver: "BackgroundSaver | None" = None,
) -> Path:  # fmt: skip
    """Publish `directory/checkpoint-<step>` and return its path. All ranks must call it, on one file system.

    model: a Transformers model, sharded or not. extra: this rank's other values to save, such as the position in its
    data. keep: how many of the newest checkpoints stay; None keeps all. saver: writes the files in the background after
    this function has returned (`BackgroundSaver.save`). Raises FileExistsError if the checkpoint exists, and ValueError
    if `extra` has objects that cannot be loaded safely.
    """
    model, path, group = _unwrapped(model), Path(directory).expanduser() / f"checkpoint-{step}", None
    run, weights, (state, groups) = _run_file(step, scheduler, extra), files_of(model), state_of(model, optimizer)
    if saver is not None:
        group, weights = saver.group, iter(list(weights))
        state, groups = BlockingAsyncStager().stage(state), copy.deepcopy(groups)

    def write() -> Path:
        with publishing(directory, step, group) as folder:
            write_model(folder, model, weights, group)
            write_optimizer(folder, state, groups, group)
            if ranks.rank(group) == 0:
                (folder / "run.pt").write_bytes(run)
        if keep is not None and ranks.rank(group) == 0:
            prune(directory, keep)
        return path

    if saver is None:
        return write()
    saver.running = saver.pool.submit(write)
    return path


def load_checkpoint(checkpoint: str | Path, *, model: Any, optimizer: Any = None, scheduler: Any = None) -> Resumed:
    """Verify a checkpoint, then load it into an existing model and optimizer in place, under any layout.

    All ranks must call it. Raises DamagedError with the names of damaged files, FileNotFoundError if the checkpoint is
    incomplete, and ValueError if it is of another model, optimizer or format, or has no scheduler. All files are
    verified before anything changes, but an optimizer that does not fit raises only after the weights are loaded.
    """
    checkpoint, model = Path(checkpoint).expanduser(), _unwrapped(model)
    verify(checkpoint)
    file = checkpoint / "run.pt"
    run = torch.load(file, weights_only=True) if file.exists() else {}
    if "ranks" not in run:
        raise ValueError(
            f"{checkpoint} is not of this version's save_checkpoint: a Trainer's is resumed by the Trainer, an older "
            f"one by the expertmesh that wrote it; its weights alone are read by from_pretrained."
        )
    if scheduler is not None and run["scheduler"] is None:
        raise ValueError(f"{checkpoint} was saved without a scheduler: load it without one.")
    load_weights(model, checkpoint)
    order = None if optimizer is None else load_optimizer(checkpoint, model, optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(run["scheduler"] if order is None else regrouped(run["scheduler"], order))
    ranks.barrier()
    extras = [part["extra"] for part in run["ranks"]]
    if len(extras) != ranks.world_size():
        log.warning("%s was saved by %d ranks: random states are not restored.", checkpoint, len(extras))
        return Resumed(run["step"], None, extras)
    set_random_state(run["ranks"][ranks.rank()]["random"])
    return Resumed(run["step"], extras[ranks.rank()], extras)


class BackgroundSaver(AbstractContextManager):
    """Context manager to save while training continues: `save` returns when all is copied to host memory.

    A save waits for the previous one. Its error is raised by the next `save`, by `wait`, or at the end of the block.
    All ranks must create it together. A save needs host memory for this rank's weights and state.
    """

    def __init__(self) -> None:
        # a separate group, as its collectives run concurrently with those of training
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.running: Future[Path] | None = None

    def __exit__(self, kind: Any, *_: object) -> None:
        with self.pool:
            if kind is None:
                self.wait()

    def save(self, directory: str | Path, **options: Any) -> None:
        """Call `save_checkpoint` with these arguments; the files are written after this method returns."""
        self.wait()
        save_checkpoint(directory, **options, saver=self)

    def wait(self) -> Path | None:
        """Wait for the running save, if any, and return its checkpoint's path, else None."""
        running, self.running = self.running, None
        return running.result() if running else None


def random_state() -> dict[str, Any]:
    """Return the states of the random generators of this process: Python, NumPy, PyTorch's CPU and the current GPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _unwrapped(model: Any) -> PreTrainedModel:
    model = extract_model_from_parallel(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Checkpoints are of Transformers models, not of {type(model).__name__}. With PEFT, save the adapter with "
            f"its save_pretrained, or train with expertmesh.Trainer."
        )
    return model


def _run_file(step: int, scheduler: Any, extra: dict[str, Any] | None) -> bytes:
    """Serialize the content of run.pt now, because the loop may change it before it is written. All ranks must call it,
    because it all-gathers; rank 0 writes its result.
    """
    of_ranks = ranks.all_gather_object({"random": random_state(), "extra": extra or {}})
    state = None if scheduler is None else scheduler.state_dict()
    buffer = io.BytesIO()
    torch.save({"step": step, "scheduler": state, "ranks": of_ranks}, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"run.pt could not be read back: `extra` and the scheduler's state may hold numbers, text, tensors, lists "
            f"and dicts, not other objects ({str(error).split('.')[0]})."
        ) from error
    return buffer.getvalue()
