"""What can go wrong in a run, and how it is said: one paragraph that names the fix. Imports nothing heavy."""

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

#: 75: EX_TEMPFAIL, "put me in the queue again"; SIGHUP: the terminal was closed
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
OPTIONAL = ("trl", "peft", "datasets", "matplotlib", "tensorboard")


class ConfigError(ValueError):
    """A configuration or command line that cannot be run. Its text is one paragraph that names the key and the fix."""


def explain(error: Exception) -> str | None:
    """One paragraph for an error that a user can mend, None for what looks like a defect of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return f"{error.name} is not installed: {install(error.name)} adds it."
    if is_disk_full(error):
        return (
            "The disk is full. Free room on it, or set save.output_dir to another one; a run that has saved a "
            f"checkpoint goes on from there with save.resume_from_checkpoint=auto. ({text[:200]})"
        )
    if type(error).__module__.startswith("expertmesh."):
        return text
    if is_out_of_memory(error):
        advice = getattr(error, "__notes__", [])[-1:] or (  # of the plan (planned.py)
            "In this order: halve train.per_device_train_batch_size and double train.gradient_accumulation_steps (or "
            "leave that at 1 and set train.gradient_release=running), set train.activation_checkpointing=experts (true "
            "and offload keep less), lower data.max_length, or train adapters only with lora={}.",
        )
        return f"The GPU ran out of memory ({text.split('.')[0]}). {advice[0]}"
    if isinstance(error, ImportError | ValueError | OSError) and not isinstance(error, ModuleNotFoundError):
        return f"{text} (EXPERTMESH_DEBUG=1 shows where this comes from.)"
    return None


def install(*names: str) -> str:
    """The command that installs packages, in the versions that expertmesh asks for."""
    try:
        wanted = importlib.metadata.requires("expertmesh") or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        wanted = []
    versions = {re.split(r"[^\w.-]", line)[0]: line.split(";")[0].strip() for line in reversed(wanted)}
    return f"`{shlex.join(['pip', 'install', *(versions.get(name, name) for name in names)])}`"


def short_message(error: BaseException) -> str:
    """What an error of somebody else says, on one line, not too long, and without a full stop."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...").rstrip(".: ")


def first_numbers(numbers: Sequence[int]) -> str:
    """The first 16 of some numbers, and how many more there are."""
    return ", ".join(map(str, numbers[:16])) + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Turns whatever goes wrong inside, in code of others, into a ConfigError that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {short_message(error)}.") from error


def check_choice(key: str, value: str, names: Sequence[str]) -> None:
    """Raises ConfigError if the value of a key is none of `names`."""
    if value not in names:
        near = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(value, names, n=1))
        raise ConfigError(f"{key}: there is no {value!r}{near or '.'} Known: {', '.join(names)}.")


def signal_handler(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Let `handler` answer the signals that end a run, and return what answered before; who ignored one still does."""
    numbers = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full: told by PyTorch's allocator, CUDA or a library of it."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk, or the user's share of it, is full: told by Python, PyTorch, safetensors or another rank."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    words = ("No space left on device", "Disk quota exceeded", "unexpected pos")  # the last is PyTorch's
    said = any(word in str(error) for word in words)
    return full or said or is_disk_full(error.__cause__ or error.__context__)
