"""How errors are told: a paragraph where a user can do something, nothing where the traceback is what helps."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from expertmesh.timeouts import RanksError
from expertmesh.train.errors import OPTIONAL, ConfigError, explain, install, is_disk_full
from expertmesh.train.guard import NonFiniteError


def test_our_own_errors_are_told_as_they_are(tmp_path):
    assert explain(ConfigError("`x` is\n  wrong.")) == "`x` is wrong."
    assert explain(NonFiniteError("Step 1.", 1, "loss", None, tmp_path)) == "Step 1."


def test_errors_of_libraries_point_to_the_traceback():
    assert explain(OSError("disk full")) == "disk full (EXPERTMESH_DEBUG=1 shows where this comes from.)"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 987904 vs 987824"),
        RanksError("rank 1: OSError: [Errno 28] No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_paragraph(error):
    for shown in (error, caused_by(error)):
        assert explain(shown).startswith("The disk is full. Free space on it")
    assert not is_disk_full(OSError(2, "No such file or directory"))


def caused_by(error):
    other = RuntimeError("something failed")
    other.__cause__ = error
    return other


def test_a_missing_extra_is_named():
    assert explain(ModuleNotFoundError("No module named 'trl'", name="trl")) == (
        "trl is not installed: `pip install 'trl>=1.16'` adds it."
    )


def test_what_is_told_to_be_installed_is_on_an_index():
    """Which expertmesh is not yet, nor with extras."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = [line.split(";")[0].strip() for lines in project["optional-dependencies"].values() for line in lines]
    for name in OPTIONAL:
        (command,) = re.fullmatch(r"`(.*)`", install(name)).groups()
        assert shlex.split(command)[:2] == ["pip", "install"] and shlex.split(command)[2] in wanted
    assert install("wandb", "matplotlib") == "`pip install wandb 'matplotlib>=3.9'`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_out_of_memory_names_the_settings_to_change(error):
    told = explain(error)
    assert told is not None
    for key in (
        "train.per_device_train_batch_size",
        "train.activation_checkpointing=experts",
        "data.max_length",
        "lora={}",
    ):
        assert key in told


def test_defects_keep_their_traceback():
    assert explain(KeyError("key")) is None
    assert explain(ModuleNotFoundError("No module named 'x'", name="x")) is None
