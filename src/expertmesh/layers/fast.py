"""What every fast twin of a Transformers class has in common.

A twin is made on the fly: a subclass of the HF class, with the HF class' name and module kept, whose `forward` comes from
a `Fast` mixin. Instances are converted by `module.__class__ = twin`: parameters, hooks, names and isinstance tests stay.
"""

import functools
from typing import TYPE_CHECKING, Any


class Fast:
    """Base of the mixins that carry fast forwards. Its twins pickle and deep-copy like their HF class."""

    __stock__: type
    __fast__: type

    if TYPE_CHECKING:  # a mixin's attributes and super() are those of the HF class it is mixed into

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).__stock__, type(self).__fast__), *state)


@functools.cache
def twin(stock: type, fast: type) -> type:
    """The subclass of the HF class `stock` that runs the mixin `fast`; one per pair."""
    return type(
        stock.__name__,
        (fast, stock),
        {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "__stock__": stock,
            "__fast__": fast,
        },
    )


def _rebuild(stock: type, fast: type) -> Any:
    cls = twin(stock, fast)
    return cls.__new__(cls)
