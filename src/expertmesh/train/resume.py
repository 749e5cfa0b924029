"""Saving and resuming for transformers' Trainer, sharded models included.

transformers writes a checkpoint file by file under its final name, cannot resume a model that was sharded when it was
created, and looks for experts under names that differ from those on disk. Here a checkpoint is published atomically and
verified before it is loaded. Optimizer state is saved by parameter name, so that any layout can read it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from transformers.trainer_callback import TrainerState

from expertmesh.adapters.files import CONFIG
from expertmesh.checkpoint import optimizer as optimizer_state
from expertmesh.checkpoint.publish import checkpoints, is_complete, newest_complete, prune, publishing, verify
from expertmesh.parallel import ranks
from expertmesh.parallel.ranks import check_same_on_all_ranks
from expertmesh.weights.files import DamagedError, atomic_export, folder_lock
from expertmesh.weights.read import load_weights, weight_files

log = logging.getLogger(__name__)
# arguments that may differ between ranks: paths, reporting and data loading
_OWN = re.compile("dir$|rank|hub|report_to|run_name|project|trackio|tqdm|log_level|log_on|workers|pin_memory|prefetch")


class ResumableTrainer(transformers.Trainer):
    """transformers.Trainer with checkpoints that are written atomically, verified, and loadable under another layout.

    `train` raises DamagedError for a damaged checkpoint, FileExistsError before the first step if output_dir has
    checkpoints that the run would replace later, and FolderInUseError if another run trains there. DeepSpeed and
    Accelerate's FSDP keep their own checkpoint format.
    """

    model: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.is_distributed_loading_by_transformers = self._is_sharded
        self._staging: Path | None = None
        self._published_step: int | None = None

    def _validate_args(self) -> None:
        super()._validate_args()
        self._is_sharded = self.is_distributed_loading_by_transformers
        self.is_distributed_loading_by_transformers = False  # else transformers raises, as it cannot resume such models

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any):
        """As in transformers. `resume_from_checkpoint=True` takes the newest complete checkpoint in output_dir."""
        checkpoint = resume_from_checkpoint or None
        if isinstance(checkpoint, str):
            checkpoint = os.path.expanduser(checkpoint)
        with folder_lock(self.args.output_dir or "."):
            if not self._has_other_format:
                if checkpoint is True:
                    checkpoint = self._newest()
                if trial is None:
                    refuse_to_replace(str(self.args.output_dir), checkpoint)
            self._published_step = None
            refuse_different_ranks(self, checkpoint)
            return super().train(checkpoint, trial, *args, **kwargs)

    @property
    def _has_other_format(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _newest(self) -> str:
        output_dir = str(self.args.output_dir)
        newest = newest_complete(output_dir)
        if newest is None:
            raise ValueError(f"There is no complete checkpoint in {output_dir}: start without resume_from_checkpoint.")
        ranks.barrier()  # all ranks must have searched the folder before anything is renamed
        with ranks.fail_together():
            for step, path in checkpoints(output_dir) if ranks.rank() == 0 else ():
                if step > _step_of(newest) and not is_complete(path):
                    log.warning("%s is incomplete: it is moved aside.", path)
                    aside = path.with_name(f"{path.name}.incomplete")
                    while os.path.lexists(aside):  # from an earlier run
                        aside = aside.with_name(f"{aside.name}-")
                    path.rename(aside)
        return str(newest)

    def _save_checkpoint(self, model, trial):
        if self._has_other_format:
            return super()._save_checkpoint(model, trial)
        step, run_dir = self.state.global_step, Path(super()._get_output_dir(trial))
        if step == self._published_step:
            return  # this step is already saved
        with publishing(run_dir, step) as folder:
            self._staging = folder
            try:
                with ranks.fail_together():
                    super()._save_checkpoint(model, trial)  # into folder/checkpoint-<step>
            finally:
                self._staging = None
            inner, best = folder / f"checkpoint-{step}", self.state.best_global_step
            # transformers searches the best checkpoint in the folder of the one that it writes
            if best and (best == step or (run_dir / f"checkpoint-{best}").exists()):
                self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
            with ranks.fail_together():
                if ranks.rank() == 0:
                    self.state.save_to_json(str(inner / "trainer_state.json"))
                    for path in inner.iterdir():
                        path.rename(folder / path.name)
                    inner.rmdir()
        self._published_step = step
        if self.args.save_total_limit and ranks.rank() == 0:
            prune(run_dir, self.args.save_total_limit, [self.state.best_model_checkpoint or ""])
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / f"checkpoint-{step}"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        # in a checkpoint, a collective save of the optimizer follows: no rank may enter it if another one failed here
        with nullcontext() if self._staging is None else ranks.fail_together():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._staging is not None or not self.args.should_save or not is_peft_model(self.model):
            return super()._save(output_dir, state_dict)
        with replacing_adapter(output_dir or str(self.args.output_dir), ranks.ALONE) as staging:
            super()._save(str(staging), state_dict)

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else `_save_checkpoint` pushes after publishing
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._has_other_format or not optimizer_state.is_of(self.model, self._torch_optimizer):
            return super()._save_optimizer_and_scheduler(output_dir)
        Path(output_dir).mkdir(exist_ok=True)
        optimizer_state.write_optimizer(Path(output_dir), *optimizer_state.state_of(self.model, self._torch_optimizer))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer  # Accelerate's wrapper
        return getattr(wrapped, "optimizer", wrapped)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Verify the files, then load the weights in place. Raise ValueError if a weight is missing."""
        folder = Path(resume_from_checkpoint)
        if is_complete(folder):
            verify(folder)
        else:
            log.warning("%s has no checkpoint.sha256, so its files cannot be checked.", folder)
        is_own_format = isinstance(self.model, transformers.PreTrainedModel) and not self._has_other_format
        if not is_own_format or not weight_files(folder):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, folder)

    def _load_best_model(self):
        if isinstance(self.model, transformers.PreTrainedModel) and not self._has_other_format:
            return self._load_from_checkpoint(self.state.best_model_checkpoint)
        return super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not Path(checkpoint, optimizer_state.FOLDER).is_dir():
            return super()._load_optimizer_and_scheduler(checkpoint)
        order = optimizer_state.load_optimizer(Path(checkpoint), self.model, self._torch_optimizer)
        state = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(optimizer_state.regrouped(state, order))


@contextmanager
def replacing_adapter(folder: str | Path, group: Any = None) -> Iterator[Path]:
    """`atomic_export` for a PEFT adapter. An existing model card is copied first, because PEFT extends it.

    Record the layout of the experts' lora_B in the adapter's config, as Unsloth does: the shape does not show it.
    """
    with atomic_export(folder, group) as staging:
        card = Path(folder, "README.md")
        if ranks.rank(group) == 0 and card.is_file():
            shutil.copy(card, staging)
        yield staging
        for path in Path(staging).rglob(CONFIG) if ranks.rank(group) == 0 else ():
            settings = json.loads(path.read_text())
            if settings.get("target_parameters"):  # tools have written lora_B of experts in two layouts
                path.write_text(json.dumps(settings | {"lora_B_layout": "rank_major"}, indent=2, sort_keys=True))


def refuse_to_replace(output_dir: str, checkpoint: str | None) -> None:
    """Raise FileExistsError at the start if a run from `checkpoint` would later replace an existing checkpoint."""
    step = -1 if checkpoint is None else _step_of(Path(checkpoint))
    if later := [path for number, path in checkpoints(output_dir) if number > step]:
        raise FileExistsError(
            f"{later[-1]} exists, and this run would later replace it. Resume from it (resume_from_checkpoint=True, "
            f"in a configuration save.resume_from_checkpoint=auto), choose another folder, or move it away."
        )


def refuse_different_ranks(trainer: transformers.Trainer, checkpoint: Any) -> None:
    """Raise RanksError, on every rank, if ranks differ in arguments, rows of data, parameters, or where they resume."""
    values = {name: value for name, value in trainer.args.to_dict().items() if not _OWN.search(name)}
    data = trainer.train_dataset
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    values["rows of training data"] = len(data) if isinstance(data, Sized) else "unknown"
    values["trained parameters"] = f"{len(trained)} tensors, {sum(trained)} numbers"
    values["checkpoint"] = Path(str(checkpoint)).name
    check_same_on_all_ranks("what they train, or how", values)


def _step_of(checkpoint: Path) -> int:
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint of a Trainer: it has no trainer_state.json.")
    try:
        return TrainerState.load_from_json(str(state)).global_step
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{state} cannot be read ({error}). Restore it from a copy, or move {checkpoint} away and resume from an "
            f"earlier one."
        ) from None
