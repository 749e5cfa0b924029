"""Selective recompute: which saved tensors a layer's backward recomputes, by level. And replay of routing decisions.

none      nothing
light     memory-bound outputs: of norms, of qk-norm with RoPE, of MLA's RoPE and of dense activations
experts   also the up-projection of routed experts: one of their six matmuls runs twice, no communication does
full      everything but the layer's input, with torch.utils.checkpoint
offload   as full, and the layer's input is kept in host memory

For light and experts the layer's forward runs in `save_less`, and functions register their outputs with
`mark_recomputable`. When any autograd function saves such an output, a saved-tensor hook stores a recipe instead. The
first reader in the backward recomputes the output with the same kernel from the same inputs, so the result is equal bit
for bit. The last reader frees it. A recipe's inputs may be recipes themselves.

Routing must not be recomputed: a router that runs again can flip near-ties and send tokens to other experts than the
forward did. Checkpointing then fails ("recomputed tensors have different metadata") or gradients are silently wrong.
`replayed` records a decision in the forward and returns it in the recompute. This needs `keep_routing` as `context_fn`
of `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; fused models pass it.
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
"""A level, True for "full", False for "none", or {level: n}: the first n layers at this level, the others one below."""

LEVELS = ("none", "light", "experts", "full", "offload")
POLICIES = "true, false, light, experts, full, offload, or one of these four for the first n layers, as {'experts': n}"


def is_policy(policy: Any) -> bool:
    """Whether `policy` is a valid `Policy`. The level "none" is spelled False, and n must be at least 1."""
    level, first = policy, 1
    if type(policy) is dict and len(policy) == 1:
        ((level, first),) = policy.items()
    is_level = type(level) is str and level in LEVELS[1:]
    return type(policy) is bool or (is_level and type(first) is int and first > 0)


def check_policy(policy: Any) -> Any:
    """Return `policy`, or raise ValueError if it is not valid."""
    if not is_policy(policy):
        raise ValueError(f"it must be {POLICIES}")
    return policy


def levels_of(policy: Policy, count: int) -> list[str]:
    """Return the level of each of `count` layers. Raise ValueError if `policy` is not valid."""
    level, first = (
        next(iter(check_policy(policy).items())) if isinstance(policy, dict) else (check_policy(policy), count)
    )
    index = LEVELS.index("full" if level is True else level or "none")
    return [LEVELS[index if layer < first else index - 1] for layer in range(count)]


def _check_unchanged(x: torch.Tensor, version: int) -> torch.Tensor:
    """Return x if no in-place operation has changed it since the forward. Autograd skips this check under hooks."""
    if x._version != version:
        raise RuntimeError(
            f"A tensor {tuple(x.shape)} that a layer saved for its backward was changed in place after its forward: "
            f"change a copy, or wait until after the backward."
        )
    return x


class _Recipe:
    """A call to repeat in the backward. readers: saved tensors that have yet to be unpacked from its outputs."""

    def __init__(self, make: Callable[..., Any], inputs: list[Any]) -> None:
        self.make, self.inputs, self.readers = make, inputs, 0
        self._made: Any = None

    def __call__(self, index: int, *view: Any) -> torch.Tensor:
        """Return output `index` as a view of (size, stride, storage offset)."""
        made, self.readers = self._made, self.readers - 1
        if made is None:
            with torch.no_grad():
                made = self.make(*(None if x is None else x() for x in self.inputs))
        self._made = made if self.readers > 0 else None
        return made[index].as_strided(*view)


class _Layer:
    """One forward of a layer: maps storages of live outputs to their recipes. Tensors without a recipe go through the
    enclosing saved-tensor hooks, if any (activation offloading, a checkpoint of the whole model)."""

    def __init__(self, level: str) -> None:
        self.level, self.recipes = LEVELS.index(level), WeakIdKeyDictionary()
        self.outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Pack a saved tensor: return a function that returns it in the backward."""
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided
        recipe, *output = self.recipes.get(x.untyped_storage(), (None,)) if plain else (None,)
        if recipe is None or output[1:] != [x._version, x.dtype]:
            if self.outer_hooks is not None:
                return partial(self.outer_hooks[1], self.outer_hooks[0](x))
            return partial(_check_unchanged, x, x._version)
        if not recipe.readers:
            recipe.inputs = [None if x is None else self.pack(x) for x in recipe.inputs]
        recipe.readers += 1
        return partial(recipe, output[0], x.size(), x.stride(), x.storage_offset())


_layer: ContextVar[_Layer | None] = ContextVar("layer", default=None)


def mark_recomputable(
    outputs: tuple[torch.Tensor, ...], make: Callable[..., tuple], *inputs: torch.Tensor | None, level: str = "light"
) -> None:
    """Declare that `make(*inputs)` recomputes `outputs`, so that layers at `level` or higher need not save them.

    Each output must own its storage, and `make` must return the same layout. Autograd must save the inputs anyway.
    `make` must not hold a reference to a tensor that would otherwise be freed.
    """
    if torch.compiler.is_compiling() or (layer := _layer.get()) is None or layer.level < LEVELS.index(level):
        return
    if torch.is_grad_enabled() and not outputs[0].requires_grad:
        return  # autograd does not save the inputs; in an autograd function (no grad mode) this is not known yet
    recipe = _Recipe(make, [None if x is None else x.detach() for x in inputs])
    for index, out in enumerate(outputs):
        layer.recipes[out.untyped_storage()] = recipe, index, out._version, out.dtype


@graph_break(lambda level, function, *args: function(*args))
def save_less(level: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)`, a layer's forward, and save only what `level` does not recompute. A graph break."""
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
    """Context of one run of a checkpointed function. The forward and its recompute share the list of choices."""

    def __init__(self, choices: list[Any], replay: bool) -> None:
        self.choices, self.replay = choices, replay

    def __enter__(self) -> None:
        self._next, self._token = iter(self.choices), region.set(self)

    def __exit__(self, *_: object) -> None:
        region.reset(self._token)

    def next_choice(self) -> Any:
        """Return the forward's next choice in a recompute. Return None in a forward: the caller adds to `choices`."""
        return next(self._next) if self.replay else None


def keep_routing() -> tuple[Region, Region]:
    """Return (forward context, recompute context) for one call of `torch.utils.checkpoint.checkpoint`."""
    choices: list[Any] = []
    return Region(choices, replay=False), Region(choices, replay=True)


def replayed(decide: Callable[[], Any]) -> Any:
    """Return `decide()` in a forward, and in its recompute the same result without another call."""
    current = region.get()
    choice = None if current is None else current.next_choice()
    if choice is None:
        choice = decide()
        if current is not None:
            current.choices.append(choice)
    return choice
