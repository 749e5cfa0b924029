"""How a family says which of its classes have fast twins.

A rule names the HF code it replaces by a fingerprint of that code. Families share code: one fingerprint covers the
RMSNorm of fifty families. A fingerprint does not see what cannot change a result: comments, annotations, decorators,
and the cache's name, which Transformers changed in 5.24. Code that no fingerprint knows is probed (probe.py).
"""

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from expertmesh.twins import CACHES


def never(module: nn.Module) -> None:
    """The `why_not` of rules that hold for every instance."""


@dataclass(frozen=True)
class Rule:
    """Modules whose code has this fingerprint become twins of `fast`.

    fusion: the switch it belongs to. fast: a mixin, subclass of `Fast`. like: an HF class, as "model_type.Class", whose
    code the twin equals (for readers, and for the test that keeps fingerprints honest). code: the fingerprint of that
    code. also: methods, or functions of the class' module, that belong to the code. calls: the twin replaces this
    function alone, in a forward that calls it and is HF's own; then the code is that of `also`. why_not: the reason why
    one instance must stay stock, or None. probed: whether code of no known fingerprint may be proven equal by a probe;
    not where a twin runs HF's code on CPUs, or when called as HF calls it.
    """

    fusion: str
    fast: Any
    like: str
    code: str
    also: tuple[str, ...] = ()
    calls: str | None = None
    why_not: Callable[[nn.Module], str | None] = never
    probed: bool = True

    def matches(self, cls: type) -> bool:
        """Whether the class runs exactly the code this rule replaces."""
        return fingerprint(cls, self.also, self.calls) == self.code


@functools.cache
def fingerprint(cls: type, also: tuple[str, ...] = (), calls: str | None = None) -> str | None:
    """Hash of the class' `forward` and what else is named; comments, docstrings, annotations, decorators left out.

    With `calls` it is the hash of what else is named; None if `forward` does not call this.
    """
    forward: Any = getattr(cls, "forward", None)
    forward = forward and inspect.unwrap(forward)
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if calls is not None and not (code is not None and calls in code.co_names and calls in scope):
        return None
    functions: list[Any] = [forward] if calls is None else []
    for name in also:
        functions.append(getattr(cls, name, None) or getattr(sys.modules[cls.__module__], name, None))
    if any(function is None for function in functions):
        return None
    try:
        sources = [textwrap.dedent(inspect.getsource(inspect.unwrap(function))) for function in functions]
    except (OSError, TypeError):  # no source file, as in a frozen application: nothing can be recognised
        return None
    text = "\n".join(_normalized(ast.parse(source).body[0]) for source in sources)
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def _normalized(node: ast.AST) -> str:
    """The tree as text, without what does not compute and without fields that vary between Python versions."""
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
        parts = [_normalized(v) if isinstance(v, ast.AST) else repr(_today(v)) for v in values if v is not None]
        if parts and name not in ("ctx", "type_comment", "type_params", "kind", "lineno"):
            fields.append(f"{name}={','.join(parts)}")
    return f"{type(node).__name__}({';'.join(fields)})"


def _today(value: Any) -> Any:
    return CACHES[0] if isinstance(value, str) and value in CACHES else value
