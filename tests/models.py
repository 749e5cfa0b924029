"""Tiny models that the tests share: made and saved once per process, loaded by stock Transformers and by expertmesh."""

import functools
import os
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import expertmesh
from expertmesh.bench.tiny import tiny_model

#: what the storms of kills, damages and starts draw from (the slow tests)
SEED = int(os.environ.get("STORM_SEED", "0"))
_FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-models-")


@functools.cache
def saved(family: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of one family's tiny checkpoint, as stock Transformers saves it. Do not write into it."""
    folder = Path(_FOLDERS.name, f"{family}-{dtype}")
    with torch.random.fork_rng(devices=[]):  # what a test draws does not depend on which test came first
        model = tiny_model(family) if dtype == torch.float32 else load_stock(family, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def load_stock(family: str, **options) -> PreTrainedModel:
    """A fresh stock model of the family; weights as in `load_ours`."""
    return transformers.AutoModelForCausalLM.from_pretrained(saved(family), **{"dtype": torch.float32} | options)


def load_ours(family: str, **options) -> PreTrainedModel:
    """A fresh expertmesh model of the family; weights as in `load_stock`."""
    return expertmesh.AutoModelForCausalLM.from_pretrained(saved(family), **{"dtype": torch.float32} | options)


@functools.cache
def shared_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(stock, ours), shared by many tests: leave both as you found them."""
    return load_stock(family), load_ours(family)
