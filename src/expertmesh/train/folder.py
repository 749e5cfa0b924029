"""The folder of a run: check it before anything is written, and save the trained model even if the disk is full."""

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

from expertmesh.checkpoint.publish import newest_complete
from expertmesh.parallel import ranks
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import as_config_error, explain, is_disk_full
from expertmesh.train.resume import refuse_to_replace, replacing_adapter

log = logging.getLogger(__name__)

WRITTEN = "final", "plots", "logs", "config.yaml", "env.json", "metrics.jsonl"  # names without a suffix are folders
WAIT_FOR_ROOM = 3600  # seconds to wait for free space on a full disk


def check_folder(config: Config) -> None:
    """Raise ConfigError if `save.output_dir` is not writable, or has checkpoints that the run would replace."""
    folder = Path(config.save.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    with as_config_error(f"save.output_dir: nothing can be written in {existing}, so choose another folder"):
        tempfile.TemporaryFile(dir=existing).close()
    for path in (folder / name for name in WRITTEN):
        if path.exists() and path.is_dir() == bool(path.suffix):
            raise ConfigError(f"save.output_dir: {path} is in the way of what the run writes there. Move it away.")
    checkpoint = starting_point(config)
    if checkpoint is not True:
        with as_config_error("save.output_dir" if checkpoint is None else "save.resume_from_checkpoint"):
            refuse_to_replace(str(folder), checkpoint)


def starting_point(config: Config) -> str | Literal[True] | None:
    """Return the checkpoint of `save.resume_from_checkpoint`: a path, True for the newest, None for a new run."""
    checkpoint = config.save.resume_from_checkpoint
    if checkpoint == "auto":  # True: the trainer resumes from the newest and moves later, incomplete ones aside
        return True if newest_complete(config.save.output_dir) else None
    return checkpoint


def check_room(model: torch.nn.Module, output_dir: Path) -> None:
    """Raise ConfigError, before the first step, if the trained model would not fit on the disk."""
    adapters = hasattr(model, "peft_config")
    need = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad or not adapters)
    free = shutil.disk_usage(output_dir).free
    if need > free:
        raise ConfigError(
            f"save.output_dir: the trained model takes {need / 1e9:.1f} GB, and {output_dir} has {free / 1e9:.1f} GB "
            f"left. Free some space, or set save.output_dir to another disk."
        )


def save_final(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer; all ranks must call it. Wait while the disk is full, as no other copy exists."""
    deadline = time.monotonic() + WAIT_FOR_ROOM
    while True:
        try:
            if hasattr(model, "peft_config"):
                with replacing_adapter(folder) as staging:
                    model.save_pretrained(staging, is_main_process=ranks.rank() == 0)
            else:
                model.save_pretrained(folder)
            with ranks.fail_together():
                if ranks.rank() == 0:
                    tokenizer.save_pretrained(folder)
            return
        except Exception as error:
            if not is_disk_full(error) or time.monotonic() > deadline:
                raise
            log.warning("%s The trained model stays in memory and is written once there is space.", explain(error))
        time.sleep(30)
