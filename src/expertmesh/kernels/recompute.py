"""What a layer need not keep for its backward, as it comes again from what the layer keeps anyway.

The functions that make such outputs tell `again`, within the forward of a layer that runs in `keep_less`. Whatever
autograd then saves of them, for any function (a Linear, an adapter, attention of a library), is replaced by a recipe.
In the backward the first that reads it makes it again, by the same kernel from the same inputs, so bit for bit; it
stands until the last has read it. A recipe's inputs may be recipes themselves. Routing is always kept.
"""

import operator
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from expertmesh.backends import opaque
from expertmesh.kernels.levels import LEVELS

Saved = Any  # called without arguments, it gives the tensor


class _Kept(NamedTuple):
    """A tensor that stays, and its version: autograd leaves the check that it has not changed to the hooks."""

    tensor: torch.Tensor
    version: int

    def __call__(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor {tuple(self.tensor.shape)} that a layer keeps for its backward was changed in place since "
                f"its forward: change a copy, or after the backward."
            )
        return self.tensor


class _Recipe:
    """A call that is made again. readers: how many have yet to read its outputs."""

    def __init__(self, make: Callable[..., Any], inputs: list[Any]) -> None:
        self.make, self.inputs, self.readers = make, inputs, 0
        self._made: Any = None

    def __call__(self, index: int) -> torch.Tensor:
        made, self.readers = self._made, self.readers - 1
        if made is None:
            with torch.no_grad():
                made = self.make(*(None if x is None else x() for x in self.inputs))
        self._made = made if self.readers > 0 else None
        return made[index]


class _Piece(NamedTuple):
    """A view of an output of a recipe."""

    recipe: _Recipe
    output: int
    view: tuple[Any, ...]

    def __call__(self) -> torch.Tensor:
        return self.recipe(self.output).as_strided(*self.view)


class _Layer:
    """One forward of a layer: the recipes of outputs that are alive, by their storages. What stays passes the hooks
    around the layer (activation offloading, a checkpoint around the model), if there are any.
    """

    def __init__(self, level: str) -> None:
        self.level, self.recipes = LEVELS.index(level), WeakIdKeyDictionary()
        self.around = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def keep(self, x: torch.Tensor) -> Saved:
        return _Kept(x, x._version) if self.around is None else partial(self.around[1], self.around[0](x))

    def pack(self, x: torch.Tensor) -> Saved:
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided
        recipe, *output = self.recipes.get(x.untyped_storage(), (None,)) if plain else (None,)
        if recipe is None or output[1:] != [x._version, x.dtype]:
            return self.keep(x)
        if not recipe.readers:
            recipe.inputs = [None if one is None else self.pack(one) for one in recipe.inputs]
        recipe.readers += 1
        return _Piece(recipe, output[0], (x.size(), x.stride(), x.storage_offset()))


_layer: ContextVar[_Layer | None] = ContextVar("layer", default=None)


def again(
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


@opaque(lambda level, function, *args: function(*args))
def keep_less(level: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, the forward of a layer, which keeps for its backward what its level leaves.

    Compiled code calls it and does not look into it.
    """
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
