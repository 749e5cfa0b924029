"""Models without experts run as vanilla Hugging Face models, with Liger's kernels once they are on a GPU.

Liger patches a model in place, and its patches run on GPUs only, so they are applied at the first forward on a GPU.
Two things are kept from it: it would also replace classes in the modeling module, and so change every later model of
the process; and the MLP forwards of experts, and so delete their expert-parallel dispatch.
"""

import importlib
from typing import Any

from expertmesh.backends import logger


def why_not_liger(model: Any) -> str | None:
    """Why Liger cannot serve this model, or None."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "liger-kernel is not installed: pip install liger-kernel"
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for model type {model.config.model_type!r}"
    return None


def apply_liger_on_gpu(model: Any, args: Any) -> None:
    """Forward pre-hook that applies Liger's kernels at the first forward on a GPU and removes itself."""
    if next(model.parameters()).is_cuda:
        hooks = model._forward_pre_hooks
        del hooks[next(key for key, hook in hooks.items() if hook is apply_liger_on_gpu)]
        apply_liger(model)


def apply_liger(model: Any) -> None:
    """Apply Liger's kernels to this instance, and to nothing else."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    options = {"rope": False, "cross_entropy": False}  # these two exist only as patches of the module
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        options["swiglu"] = False
    if "forward" in vars(model):  # a trainer has put its own loss into this model's forward
        options["fused_linear_cross_entropy"] = False
    modeling = vars(importlib.import_module(type(model).__module__))
    before = dict(modeling)
    try:
        _apply_liger_kernel_to_instance(model, **options)
    finally:
        modeling.update(before)
        for name in modeling.keys() - before.keys():
            del modeling[name]
    logger().info("expertmesh: Liger kernels are on in this %s.", type(model).__name__)
