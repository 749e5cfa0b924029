"""Errors of a run and their messages: one paragraph that names the fix. Imports nothing heavy."""

import difflib
import errno
import importlib.metadata
import re
import shlex
import signal
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: 75 is EX_TEMPFAIL, which asks a scheduler to requeue the job; SIGHUP means the terminal was closed
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
OPTIONAL = ("trl", "peft", "datasets", "matplotlib", "tensorboard")


class ConfigError(ValueError):
    """Raised for a configuration or command line that cannot run. The message names the key and the fix."""


def explain(error: Exception) -> str | None:
    """Return a paragraph for an error that the user can fix, None for one that looks like a bug of expertmesh."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return f"{error.name} is not installed: {install(error.name)} adds it."
    if is_disk_full(error):
        return (
            "The disk is full. Free space on it, or set save.output_dir to another one; a run that has saved a "
            f"checkpoint resumes from it with save.resume_from_checkpoint=auto. ({text[:200]})"
        )
    if type(error).__module__.startswith("expertmesh."):
        return text
    if is_out_of_memory(error):
        advice = getattr(error, "__notes__", [])[-1:] or (  # the note is from planned.py
            "In this order: halve train.per_device_train_batch_size and double train.gradient_accumulation_steps (or "
            "leave that at 1 and set train.gradient_release=running), set train.activation_checkpointing=experts (true "
            "and offload save more), lower data.max_length, or train adapters only with lora={}.",
        )
        return f"The GPU ran out of memory ({text.split('.')[0]}). {advice[0]}"
    if isinstance(error, ImportError | ValueError | OSError) and not isinstance(error, ModuleNotFoundError):
        return f"{text} (EXPERTMESH_DEBUG=1 shows where this comes from.)"
    return None


def install(*names: str) -> str:
    """Return the command that installs packages in the versions that expertmesh requires."""
    try:
        requirements = importlib.metadata.requires("expertmesh") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree, not installed
        requirements = []
    versions = {re.split(r"[^\w.-]", line)[0]: line.split(";")[0].strip() for line in reversed(requirements)}
    return f"`{shlex.join(['pip', 'install', *(versions.get(name, name) for name in names)])}`"


def short_message(error: BaseException) -> str:
    """Return the message of another library's error, on one line, shortened, without a full stop."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...").rstrip(".: ")


def first_numbers(numbers: Sequence[int]) -> str:
    """Return the first 16 numbers as text, and how many more there are."""
    return ", ".join(map(str, numbers[:16])) + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Context manager that turns any exception into a ConfigError whose message begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {short_message(error)}.") from error


def check_choice(key: str, value: str, names: Sequence[str]) -> None:
    """Raise ConfigError if the value of a key is not in `names`."""
    if value not in names:
        near = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(value, names, n=1))
        raise ConfigError(f"{key}: there is no {value!r}{near or '.'} Known: {', '.join(names)}.")


def signal_handler(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Install `handler` for the signals that end a run and return the old handlers. Ignored signals stay ignored."""
    numbers = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch's allocator, CUDA or a CUDA library means that the GPU's memory is full."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error of Python, PyTorch, safetensors or another rank means that the disk or a quota is full."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    words = ("No space left on device", "Disk quota exceeded", "unexpected pos")  # the last is PyTorch's
    matches = any(word in str(error) for word in words)
    return full or matches or is_disk_full(error.__cause__ or error.__context__)
