"""What layers need not keep for their backward: how much each recomputes, and how.

none      nothing
light     what takes a pass over memory and no product: outputs of norms, of RoPE behind norms, of dense activations
experts   and the up-projection of routed experts: one of their six products runs twice; no exchange does
full      all but the layer's input, by torch.utils.checkpoint
offload   the same, and the input waits in host memory

For light and experts a layer's forward runs in `save_less`, and functions that make such outputs call
`mark_recomputable`. Whatever autograd then saves of an output, for any function (a Linear, an adapter, attention of a
library), is replaced by a recipe. In the backward the first reader recomputes it, by the same kernel from the same
inputs, so bit for bit; it is freed after the last reader. A recipe's inputs may be recipes themselves.

Which experts tokens go to is decided once: a router that runs again can flip near-ties, and the recomputed layer then
sends tokens elsewhere than the forward did, which breaks checkpointing ("recomputed tensors have different metadata")
or, worse, the gradients. What is `replayed` in a checkpointed layer's forward is replayed when that is recomputed:
`keep_routing` is the `context_fn` of `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; fused models pass it.
"""

import operator
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from expertmesh.backends import graph_break

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


def check_policy(policy: Any) -> Any:
    """The policy itself. Raises ValueError for what is none."""
    if not is_policy(policy):
        raise ValueError(f"it must be {POLICIES}")
    return policy


def levels_of(policy: Policy, count: int) -> list[str]:
    """The level of each of `count` layers. Raises ValueError as `check_policy`."""
    level, first = (
        next(iter(check_policy(policy).items())) if isinstance(policy, dict) else (check_policy(policy), count)
    )
    at = LEVELS.index("full" if level is True else level or "none")
    return [LEVELS[at if number < first else at - 1] for number in range(count)]


def _unchanged(x: torch.Tensor, version: int) -> torch.Tensor:
    """A tensor that stays: autograd leaves the check that it has not changed to the hooks."""
    if x._version != version:
        raise RuntimeError(
            f"A tensor {tuple(x.shape)} that a layer keeps for its backward was changed in place since its forward: "
            f"change a copy, or after the backward."
        )
    return x


class _Recipe:
    """A call that is made again. readers: how many have yet to read its outputs."""

    def __init__(self, make: Callable[..., Any], inputs: list[Any]) -> None:
        self.make, self.inputs, self.readers = make, inputs, 0
        self._made: Any = None

    def __call__(self, index: int, *view: Any) -> torch.Tensor:
        """A view of an output."""
        made, self.readers = self._made, self.readers - 1
        if made is None:
            with torch.no_grad():
                made = self.make(*(None if x is None else x() for x in self.inputs))
        self._made = made if self.readers > 0 else None
        return made[index].as_strided(*view)


class _Layer:
    """One forward of a layer: the recipes of outputs that are alive, by their storages. What stays passes the hooks
    around the layer (activation offloading, a checkpoint around the model), if there are any.
    """

    def __init__(self, level: str) -> None:
        self.level, self.recipes = LEVELS.index(level), WeakIdKeyDictionary()
        self.around = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What gives this tensor in the backward."""
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided
        recipe, *output = self.recipes.get(x.untyped_storage(), (None,)) if plain else (None,)
        if recipe is None or output[1:] != [x._version, x.dtype]:
            if self.around is not None:
                return partial(self.around[1], self.around[0](x))
            return partial(_unchanged, x, x._version)
        if not recipe.readers:
            recipe.inputs = [None if one is None else self.pack(one) for one in recipe.inputs]
        recipe.readers += 1
        return partial(recipe, output[0], x.size(), x.stride(), x.storage_offset())


_layer: ContextVar[_Layer | None] = ContextVar("layer", default=None)


def mark_recomputable(
    outputs: tuple[torch.Tensor, ...], make: Callable[..., tuple], *inputs: torch.Tensor | None, level: str = "light"
) -> None:
    """Say that `make(*inputs)` gives these outputs, each with a storage of its own and laid out as here; that its
    inputs are kept for the backward anyway; and from which level on the outputs need not be. `make` must hold no tensor
    that would not be kept.
    """
    if torch.compiler.is_compiling() or (layer := _layer.get()) is None or layer.level < LEVELS.index(level):
        return
    if torch.is_grad_enabled() and not outputs[0].requires_grad:  # the inputs are not kept; within a function of
        return  # autograd's nobody knows yet
    recipe = _Recipe(make, [None if x is None else x.detach() for x in inputs])
    for index, out in enumerate(outputs):
        layer.recipes[out.untyped_storage()] = recipe, index, out._version, out.dtype


@graph_break(lambda level, function, *args: function(*args))
def save_less(level: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, a layer's forward, which keeps for its backward what its level leaves; opaque if compiled."""
    if not torch.is_grad_enabled():
        return function(*args)
    layer = _Layer(level)
    token = _layer.set(layer)
    try:
        with torch.autograd.graph.saved_tensors_hooks(layer.pack, operator.call):
            return function(*args)
    finally:
        _layer.reset(token)
        layer.recipes.clear()


region: ContextVar["Region | None"] = ContextVar("region", default=None)


class Region:
    """One run, first or repeated, of a checkpointed function; the runs of one call share the list of choices."""

    def __init__(self, choices: list[Any], replay: bool) -> None:
        self.choices, self.replay = choices, replay

    def __enter__(self) -> None:
        self._next, self._token = iter(self.choices), region.set(self)

    def __exit__(self, *_: object) -> None:
        region.reset(self._token)

    def known(self) -> Any:
        """In a recompute the forward's next choice; else None, and it is to be put among the `choices`."""
        return next(self._next) if self.replay else None


def keep_routing() -> tuple[Region, Region]:
    """(forward context, recompute context) for one call of `torch.utils.checkpoint.checkpoint`."""
    choices: list[Any] = []
    return Region(choices, replay=False), Region(choices, replay=True)


def replayed(decide: Callable[[], Any]) -> Any:
    """`decide()`; in a recompute what it returned in the forward, without calling it again."""
    here = region.get()
    known = None if here is None else here.known()
    if known is None:
        known = decide()
        if here is not None:
            here.choices.append(known)
    return known
