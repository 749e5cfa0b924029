"""What every fast twin of a Transformers class has in common.

A twin is made on the fly: a subclass of the HF class, of the same name and module, whose `forward` comes from a `Fast`
mixin. Instances are converted by `module.__class__ = twin`: parameters, hooks, names and isinstance tests stay. Which
code a twin equals a fingerprint of that code says.
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

# to the type checker a mixin's attributes and super() are those of whatever HF class it is mixed into
_Stock: Any = Any if TYPE_CHECKING else object


class Fast(_Stock):
    """Base of the mixins that carry fast forwards. Its twins pickle and deep-copy like their HF class.

    stands_for: the methods of the HF class and functions of its module that the twin must equal; fingerprints are taken
    of these. Without "forward" among them the twin runs HF's forward, which calls the first. probed: whether a probe
    may prove the twin equal to unknown code; not if the twin runs HF's code on CPUs, where probes run.
    """

    __stock__: type
    __fast__: type
    stands_for: tuple[str, ...] = ("forward",)
    probed = True

    @staticmethod
    def why_not(module: Any) -> str | None:
        """Why this module must stay stock, or None."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).__stock__, type(self).__fast__), *state)


#: a cache's name as a keyword of forwards, and its names before Transformers 5.24
CACHES = ("cache", "past_key_values", "cache_params")


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of a forward's keywords, whatever its name."""
    found = [kwargs.pop(name, None) for name in CACHES]
    return next((cache for cache in found if cache is not None), None)


def is_unmodified(*modules: nn.Module, kind: type | tuple[type, ...] = nn.Module) -> bool:
    """Whether calls of these, of this kind, run the forward of PyTorch, Transformers or a twin, and nobody watches
    them, so that a kernel may stand for them. Parallelism replaces instances' forward; users put hooks and classes.
    """
    for m in modules:
        cls: Any = type(m)
        if not isinstance(m, kind) or not _is_known(cls) or "forward" in vars(m):
            return False
        # as `has_hooks`, which would be a call more: a layer asks often
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


@functools.cache
def _is_known(cls: Any) -> bool:
    return cls.__module__.startswith(("torch.", "transformers."))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody put a hook on it."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_traced() -> bool:
    """Whether this runs under torch.compile, torch.export, torch.jit.trace or a transform of torch.func."""
    traces = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traces or torch._C._are_functorch_transforms_active()


@functools.cache
def twin(stock: Any, fast: Any) -> Any:
    """The subclass of the HF class `stock` that runs the mixin `fast`; one per pair."""
    kept = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (fast, stock), kept | {"__stock__": stock, "__fast__": fast})


def _rebuild(stock: Any, fast: Any) -> Any:
    cls = twin(stock, fast)
    return cls.__new__(cls)


@functools.cache
def fingerprint(cls: type, names: tuple[str, ...] = ("forward",)) -> str | None:
    """Hash of these methods of the class and functions of its module, whose order counts. It does not see what cannot
    change a result: comments, annotations, decorators, and the cache's name, which Transformers changed in 5.24.

    None if one is missing or, where "forward" is not among them, if the class' forward does not call the first.
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
    except (OSError, TypeError):  # no source file, as in a frozen application: nothing can be recognised
        return None
    text = "\n".join(_normalized(ast.parse(source).body[0]) for source in sources)
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def _normalized(node: Any) -> str:
    """The tree as text, without what does not compute and without fields that vary between Python versions."""
    if not isinstance(node, ast.AST):
        return repr(CACHES[0] if node in CACHES else node)
    if isinstance(node, ast.FunctionDef):
        node.decorator_list, node.returns = [], None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            del node.body[0]
    if isinstance(node, ast.arg):
        node.annotation = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "kwargs"]  # a cache's, from 5.24 on
    fields = []
    for name, value in ast.iter_fields(node):
        values = value if isinstance(value, list) else [value]
        parts = [_normalized(v) for v in values if v is not None]
        if parts and name not in ("ctx", "type_comment", "type_params", "kind", "lineno"):
            fields.append(f"{name}={','.join(parts)}")
    return f"{type(node).__name__}({';'.join(fields)})"
