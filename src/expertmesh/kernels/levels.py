"""How much layers recompute in the backward instead of keeping it: levels, and policies that say which layer has which.

none      nothing
light     what takes a pass over memory and no product: outputs of norms, of RoPE behind norms, of dense activations
experts   and the up-projection of routed experts: one of their six products runs twice; no exchange does
full      all but the layer's input, by torch.utils.checkpoint
offload   the same, and the input waits in host memory
"""

from typing import Any

Policy = bool | str | dict[str, int]
"""A level, True for "full", False for "none"; or {level: n}: that of the first n layers, others have the one below."""

LEVELS = ("none", "light", "experts", "full", "offload")
POLICIES = "true, false, light, experts, full, offload, or one of these four for the first n layers, as {'experts': n}"


def is_policy(policy: Any) -> bool:
    """Whether it is a `Policy`: with levels but "none", and n at least 1."""
    level, first = policy, 1
    if type(policy) is dict and len(policy) == 1:
        ((level, first),) = policy.items()
    known = type(level) is str and level in LEVELS[1:]
    return type(policy) is bool or (known and type(first) is int and first > 0)


def checked(policy: Any) -> Any:
    """The policy itself. Raises ValueError for what is none."""
    if not is_policy(policy):
        raise ValueError(f"it must be {POLICIES}")
    return policy


def levels_of(policy: Policy, count: int) -> list[str]:
    """The level of each of `count` layers. Raises ValueError as `checked`."""
    level, first = next(iter(checked(policy).items())) if isinstance(policy, dict) else (checked(policy), count)
    at = LEVELS.index("full" if level is True else level or "none")
    return [LEVELS[at if number < first else at - 1] for number in range(count)]
