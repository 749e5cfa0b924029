"""The ranks of a run train the same model on the same data in the same way: asked once, before the first step.

A rank with fewer batches, or another learning rate, would be found out when the others wait for it, or never.
"""

import re
from collections.abc import Sized
from pathlib import Path
from typing import Any

import transformers

from expertmesh.parallel.ranks import refuse_differences

# arguments that may differ: where files are, and what is told about the run
_OWN = re.compile("dir$|rank|hub|report_to|run_name|project|trackio|tqdm|log_level|log_on|workers|pin_memory|prefetch")


def refuse_different_ranks(trainer: transformers.Trainer, checkpoint: Any) -> None:
    """Raise RanksError, on every rank, if ranks differ in arguments, rows of data, parameters, or where they resume."""
    told = {name: value for name, value in trainer.args.to_dict().items() if not _OWN.search(name)}
    refuse_differences("their training arguments", told)
    data = trainer.train_dataset
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    found = {
        "rows of training data": len(data) if isinstance(data, Sized) else "unknown",
        "trained parameters": f"{len(trained)} tensors, {sum(trained)} numbers",
        "checkpoint": Path(str(checkpoint)).name,
    }
    refuse_differences("what they train", found)
