"""The trained model on the disk: is there room for it, and is it all written?"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expertmesh.parallel import ranks
from expertmesh.train.config import ConfigError
from expertmesh.train.errors import explain, is_disk_full
from expertmesh.weights.files import replacing

log = logging.getLogger(__name__)

WAIT_FOR_ROOM = 3600  # seconds, on a full disk


def check_room(model: torch.nn.Module, output_dir: Path) -> None:
    """Raises ConfigError, before the first step, if the trained model would not fit on the disk."""
    adapters = hasattr(model, "peft_config")
    need = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad or not adapters)
    free = shutil.disk_usage(output_dir).free
    if need > free:
        raise ConfigError(
            f"save.output_dir: the trained model takes {need / 1e9:.1f} GB, and {output_dir} has {free / 1e9:.1f} GB "
            f"left. Free the rest, or set save.output_dir to another disk."
        )


@contextmanager
def replacing_adapter(folder: str | Path, group: Any = None) -> Iterator[Path]:
    """`replacing` for an adapter: PEFT writes file by file, and goes on in the model card that it finds."""
    with replacing(folder, group) as staging:
        card = Path(folder, "README.md")
        if ranks.rank(group) == 0 and card.is_file():
            shutil.copy(card, staging)
        yield staging


def save_final(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer, from all ranks. Where the disk is full it waits for room: the model is only here."""
    deadline = time.monotonic() + WAIT_FOR_ROOM
    while True:
        try:
            if hasattr(model, "peft_config"):
                with replacing_adapter(folder) as staging:
                    model.save_pretrained(staging, is_main_process=ranks.rank() == 0)
            else:
                model.save_pretrained(folder)
            with ranks.together():
                if ranks.rank() == 0:
                    tokenizer.save_pretrained(folder)
            return
        except Exception as error:
            if not is_disk_full(error) or time.monotonic() > deadline:
                raise
            log.warning("%s The trained model is kept in memory, and written when there is room.", explain(error))
        time.sleep(30)
