"""Fast twins: subclasses of Transformers classes with a faster `forward`.

`twin` creates a subclass of an HF class at run time, with the same name and module and the `forward` of a `Fast` mixin.
`module.__class__ = twin` converts an instance and keeps its parameters, hooks, names and isinstance checks. A
fingerprint of the HF source code identifies the code that a twin must equal.
"""

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# for the type checker: attributes and super() of a mixin are those of the HF class that it is mixed into
_Stock: Any = Any if TYPE_CHECKING else object


class Fast(_Stock):
    """Base class of the mixins with fast forwards. Twins can be pickled and deep-copied like their HF class.

    stands_for: the methods of the HF class and functions of its module that the twin must equal; these are hashed.
    Without "forward" in it, the twin keeps HF's forward, which must call the first. probed: whether a numerical probe
    may show that the twin equals unknown code. It is False if the twin runs HF's code on CPUs, where probes run.
    """

    __stock__: type
    __fast__: type
    stands_for: tuple[str, ...] = ("forward",)
    probed = True

    @staticmethod
    def why_not(module: Any) -> str | None:
        """Return why this module must keep its HF class, or None."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).__stock__, type(self).__fast__), *state)


#: keyword arguments that hold the cache: the name in Transformers 5.24, then older names
CACHES = ("cache", "past_key_values", "cache_params")


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from a forward's keyword arguments, under any of its names, and return it or None."""
    caches = [kwargs.pop(name, None) for name in CACHES]
    return next((cache for cache in caches if cache is not None), None)


def is_unmodified(*modules: nn.Module, kind: type | tuple[type, ...] = nn.Module) -> bool:
    """Return whether a kernel may replace calls of these modules: all are of this kind, run the forward of a PyTorch,
    Transformers or twin class, and have no hooks. Parallelism replaces the `forward` of instances, users add hooks.
    """
    for m in modules:
        cls: Any = type(m)
        if not isinstance(m, kind) or not _is_library_class(cls) or "forward" in vars(m):
            return False
        # inlined `has_hooks`: layers check this often
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


@functools.cache
def _is_library_class(cls: Any) -> bool:
    return cls.__module__.startswith(("torch.", "transformers."))


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module has forward or backward hooks."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_traced() -> bool:
    """Return whether this runs under torch.compile, torch.export, torch.jit.trace or a transform of torch.func."""
    traces = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traces or torch._C._are_functorch_transforms_active()


@functools.cache
def twin(stock: Any, fast: Any) -> Any:
    """Return the subclass of the HF class `stock` with the mixin `fast`, always the same class for a pair."""
    copied = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (fast, stock), copied | {"__stock__": stock, "__fast__": fast})


def _rebuild(stock: Any, fast: Any) -> Any:
    cls = twin(stock, fast)
    return cls.__new__(cls)


@functools.cache
def fingerprint(cls: type, names: tuple[str, ...] = ("forward",)) -> str | None:
    """Return a hash of these methods of the class and functions of its module, in this order. It ignores what cannot
    change a result: comments, annotations, decorators, and the cache's name, which Transformers changed in 5.24.
    Return None if one is missing or, without "forward" in `names`, if the class's forward does not call the first.
    """
    module = sys.modules.get(cls.__module__)
    functions: Any = [getattr(cls, name, getattr(module, name, None)) for name in names]
    if "forward" not in names:
        forward: Any = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
        if names[0] not in getattr(forward, "__globals__", ()) or names[0] not in forward.__code__.co_names:
            return None
    if None in functions:
        return None
    try:
        sources = [textwrap.dedent(inspect.getsource(inspect.unwrap(function))) for function in functions]
    except (OSError, TypeError):  # no source file, as in a frozen application
        return None
    text = "\n".join(_normalized(ast.parse(source).body[0]) for source in sources)
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def _normalized(node: Any) -> str:
    """Return the syntax tree as text, without parts that do not affect results or that vary between Python versions."""
    if not isinstance(node, ast.AST):
        return repr(CACHES[0] if node in CACHES else node)
    if isinstance(node, ast.FunctionDef):
        node.decorator_list, node.returns = [], None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            del node.body[0]
    if isinstance(node, ast.arg):
        node.annotation = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "kwargs"]  # a cache's, added in 5.24
    fields = []
    for name, value in ast.iter_fields(node):
        values = value if isinstance(value, list) else [value]
        parts = [_normalized(v) for v in values if v is not None]
        if parts and name not in ("ctx", "type_comment", "type_params", "kind", "lineno"):
            fields.append(f"{name}={','.join(parts)}")
    return f"{type(node).__name__}({';'.join(fields)})"
