"""How a family says which of its classes have fast twins.

A rule names the HF code it replaces, which families share, by a fingerprint of it. That does not see what cannot change
a result: comments, annotations, decorators, and the cache's name, which Transformers changed in 5.24. Code that no
fingerprint knows is probed (probe.py).
"""

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from expertmesh.twins import CACHES


@dataclass(frozen=True)
class Rule:
    """Modules whose code has the fingerprint `code` become twins of the mixin `fast`, if the switch `fusion` is on.

    like: an HF class, as "model_type.Class", that has this code: for readers, and for the test that keeps it true.
    """

    fusion: str
    fast: Any
    like: str
    code: str

    def matches(self, cls: type) -> bool:
        """Whether the class runs exactly the code this rule replaces."""
        return fingerprint(cls, self.fast.stands_for) == self.code


@functools.cache
def fingerprint(cls: type, names: tuple[str, ...] = ("forward",)) -> str | None:
    """Hash of these methods of the class and functions of its module, whose order counts.

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
