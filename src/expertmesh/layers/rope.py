"""Fast twin of any attention that turns its queries and keys by one of Transformers' `apply_rotary_pos_emb`.

The twin runs the HF class' own forward; only the name `apply_rotary_pos_emb` stands for another function in it. So one
rule serves the attention of all families with the same RoPE, whatever else they do.
"""

import functools
import inspect
import types
from typing import Any

import torch

from expertmesh.backends import use_triton
from expertmesh.kernels.rope import rotary
from expertmesh.twins import Fast

_NAME = "apply_rotary_pos_emb"


class FastRoPE(Fast):
    """HF's forward with a kernel for RoPE of halves, of the whole width of a head (Mixtral) or a part (GLM)."""

    stands_for: tuple[str, ...] = (_NAME, "rotate_half")
    probed = False
    _interleaved = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__stock__" in vars(cls):  # a twin is made
            stock = inspect.unwrap(cls.__stock__.forward)  # type: ignore[attr-defined]
            scope = stock.__globals__ | {_NAME: functools.partial(cls.turn, stock.__globals__[_NAME])}
            del scope["__name__"]  # by which torch.compile would look the names up in the HF module
            forward = types.FunctionType(stock.__code__, scope, None, stock.__defaults__, stock.__closure__)
            forward.__kwdefaults__ = stock.__kwdefaults__
            cls.forward = functools.wraps(stock)(forward)

    @classmethod
    def turn(
        cls, stock: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What runs in place of `stock`, the function of this name in the HF class' module."""
        if unsqueeze_dim != 1 or cos.ndim != 3 or not use_triton(q):  # heads elsewhere than in the kernel's layout
            return stock(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin, cls._interleaved)

    @staticmethod
    def why_not(attention: Any) -> str | None:
        names = inspect.unwrap(type(attention).forward).__code__.co_names
        others = [name for name in names if "rotary_pos_emb" in name and name != _NAME]
        return f"its forward also calls {others[0]}" if others else None


class FastInterleavedRoPE(FastRoPE):
    """The same for RoPE of even and odd elements (ERNIE 4.5)."""

    _interleaved = True
