"""Activation checkpointing of a fused model: what each layer saves for its backward and what it recomputes."""

import functools
from collections import Counter
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from expertmesh.backends import logger
from expertmesh.kernels.recompute import Policy, keep_routing, levels_of, save_less
from expertmesh.memory.offload import Offload

LIGHT = {"rms_norm", "qk_norm_rope", "mla_rope", "swiglu"}  # fusions whose outputs are recomputed without a GEMM


def without_policy(checkpointed: Any) -> tuple[Any, Any]:
    """Split Transformers' checkpoint function into (our "recompute" policy or None, the function that checkpoints a
    whole layer). Raise ValueError if both a policy and `offload` were passed to `activation_checkpointing_enable`."""
    options = dict(getattr(checkpointed, "keywords", {}))
    policy = options.pop("recompute", None)
    if policy is not None:
        if checkpointed.func is not checkpoint:
            raise ValueError("recompute and offload exclude each other: {'recompute': 'offload'} does both.")
        checkpointed = functools.partial(checkpoint, **{"use_reentrant": False} | options)
    if options.get("use_reentrant", policy is None) is False and "context_fn" not in options:
        checkpointed = functools.partial(checkpointed, context_fn=keep_routing)
    return policy, checkpointed


def set_levels(model: Any, policy: Policy, checkpointed: Any, every_n_layers: int = 1) -> None:
    """Set the level of `levels_of` for every decoder layer; `checkpointed` runs a layer of level "full". Raise
    ValueError for an unknown policy, one without a matching fusion in this model, or with every_n_layers."""
    if every_n_layers != 1:
        raise ValueError("recompute and every_n_layers both select layers: leave one of them out.")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    levels, on = levels_of(policy, len(layers)), {row.name for row in model.fusion_report() if row.on}
    pieces = {"light": sorted(on & LIGHT), "experts": sorted(on & {*LIGHT, "experts"}), "full": ["all"]}
    pieces["offload"] = ["all, from inputs in host memory"]
    if ("light" in levels and not pieces["light"]) or ("experts" in levels and "experts" not in on):
        raise ValueError(
            f"{type(model).__name__} has no fusion that activation_checkpointing={policy!r} recomputes: "
            f"set it to true, or leave the fusions on."
        )
    whole = {"full": checkpointed, "offload": Offload(checkpointed)}
    for layer, level in zip(layers, levels, strict=True):
        layer.gradient_checkpointing = level != "none"
        layer._gradient_checkpointing_func = whole.get(level) or functools.partial(save_less, level)
    counts = [f"{', '.join(pieces[level])} in {n} layers" for level, n in Counter(levels).items() if level != "none"]
    logger().info(f"expertmesh: recomputed in the backward: {'; '.join(counts) or 'nothing'}.")
