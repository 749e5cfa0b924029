"""How much each layer of a fused model keeps for its backward, as `activation_checkpointing_enable` is asked."""

import functools
from collections import Counter
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from expertmesh.backends import logger
from expertmesh.kernels.recompute import Policy, keep_routing, levels_of, save_less
from expertmesh.memory.offload import Offload

LIGHT = {"rms_norm", "qk_norm_rope", "mla_rope", "swiglu"}  # fusions whose outputs come again without a product


def without_policy(checkpointed: Any) -> tuple[Any, Any]:
    """(the policy, None without one; what runs a whole layer checkpointed) of the function that Transformers made of
    the keywords of `activation_checkpointing_enable`. Raises ValueError for a policy beside `offload`.
    """
    options = dict(getattr(checkpointed, "keywords", {}))
    policy = options.pop("recompute", None)
    if policy is not None:
        if checkpointed.func is not checkpoint:
            raise ValueError("recompute and offload: leave one of them out; {'recompute': 'offload'} does both.")
        checkpointed = functools.partial(checkpoint, **{"use_reentrant": False} | options)
    if options.get("use_reentrant", policy is None) is False and "context_fn" not in options:
        checkpointed = functools.partial(checkpointed, context_fn=keep_routing)
    return policy, checkpointed


def set_levels(model: Any, policy: Policy, checkpointed: Any, every_n_layers: int = 1) -> None:
    """Give every decoder layer its level of `levels_of`. checkpointed: runs a layer of level "full".

    Raises ValueError for no policy, for one that this model has nothing for, and beside Transformers' every_n_layers.
    """
    if every_n_layers != 1:
        raise ValueError("recompute and every_n_layers both say which layers: leave one of them out.")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    levels, on = levels_of(policy, len(layers)), {row.name for row in model.fusion_report() if row.on}
    pieces = {"light": sorted(on & LIGHT), "experts": sorted(on & {*LIGHT, "experts"}), "full": ["all"]}
    pieces["offload"] = ["all, from inputs in host memory"]
    if ("light" in levels and not pieces["light"]) or ("experts" in levels and "experts" not in on):
        raise ValueError(
            f"{type(model).__name__} has no fusion that activation_checkpointing={policy!r} recomputes: set it to "
            f"true, or leave the fusions on."
        )
    whole = {"full": checkpointed, "offload": Offload(checkpointed)}
    for layer, level in zip(layers, levels, strict=True):
        layer.gradient_checkpointing = level != "none"
        layer._gradient_checkpointing_func = whole.get(level) or functools.partial(save_less, level)
    counts = [f"{', '.join(pieces[level])} in {n} layers" for level, n in Counter(levels).items() if level != "none"]
    logger().info(f"expertmesh: recomputed in the backward: {'; '.join(counts) or 'nothing'}.")
