"""What can go wrong in a run, and how it is told: one paragraph that names the fix. Imports nothing heavy."""

import signal

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75: EX_TEMPFAIL, "put me in the queue again"
EXTRAS = {"trl": "train", "peft": "train", "datasets": "train", "matplotlib": "plots", "tensorboard": "track"}


class ConfigError(ValueError):
    """A configuration or command line that cannot be run. Its text is one paragraph that names the key and the fix."""


def explain(error: Exception) -> str | None:
    """One paragraph for an error that a user can mend, None for what looks like a defect of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: `pip install 'expertmesh[{EXTRAS[error.name]}]'` adds it."
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"The GPU ran out of memory ({text.split('.')[0]}). In this order: halve train.per_device_train_batch_size "
            "and double train.gradient_accumulation_steps, set train.activation_checkpointing=true, lower "
            "data.max_length, or train adapters only with lora={}."
        )
    if type(error).__module__.startswith("expertmesh."):
        return text
    if isinstance(error, ValueError | OSError):
        return f"{text} (EXPERTMESH_DEBUG=1 shows where this comes from.)"
    return None
