"""expertmesh: one import line makes Hugging Face Mixture-of-Experts fine-tuning faster and lighter."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AutoModelForCausalLM": "expertmesh.auto",
    "fuse": "expertmesh.fuse",
    "keep_routing": "expertmesh.memory.recompute",
    "Trainer": "expertmesh.train.trainer",
    "SFTTrainer": "expertmesh.train.sft",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'expertmesh' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
