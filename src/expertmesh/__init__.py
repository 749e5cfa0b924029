"""expertmesh: one import line makes Hugging Face Mixture-of-Experts fine-tuning faster and lighter."""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_MODULES = {
    "AutoModelForCausalLM": "expertmesh.auto",
    "fuse": "expertmesh.fuse",
    "DistributedSetup": "expertmesh.parallel.setup",
    "ExpertsQuantConfig": "expertmesh.weights.four_bit",
    "create_distributed_setup_from_config": "expertmesh.parallel.setup",
    "AdamW": "expertmesh.memory.adamw",
    "Muon": "expertmesh.memory.muon",
    "GradientRelease": "expertmesh.memory.release",
    "clip_grad_norm": "expertmesh.parallel.clip",
    "keep_routing": "expertmesh.kernels.recompute",
    "Trainer": "expertmesh.train.trainer",
    "SFTTrainer": "expertmesh.train.sft",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'expertmesh' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(ModuleType):
    """Importing a submodule sets it as an attribute of its package. This class keeps `expertmesh.fuse` the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
