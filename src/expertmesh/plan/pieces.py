"""Attribute an allocation to a part of the model by walking the call stack."""

import sys
from typing import Any

from torch import nn

#: stem of an expertmesh file, such as kernels/router.py -> part of the model
PIECES = {
    "rms_norm": "norms",
    "router": "router",
    "experts": "experts",
    "linear_cross_entropy": "head",
    "head": "head",
    "mamba2": "Mamba2",
    "wire": "dispatch",
    "offload": "layer inputs",
}
#: word in the name of a module's class -> part of the model
MODULES = {
    "Delta": "attention",
    "Norm": "norms",
    "Router": "router",
    "Gate": "router",
    "Experts": "experts",
    "Attention": "attention",
}
MODULES |= {"Mamba": "Mamba2", "MLP": "dense MLPs", "Embedding": "embedding"}


def piece_of_caller() -> str:
    """Return the part of the nearest caller that has one, or "in passing" for PyTorch's own allocations."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "expertmesh" in code.co_filename:
            stem = code.co_filename.rpartition("/")[2].removesuffix(".py")
            if stem in PIECES:
                return PIECES[stem]
        module = frame.f_locals.get("self") if code.co_name in ("forward", "_call_impl") else None
        if isinstance(module, nn.Module):
            for word, piece in MODULES.items():
                if word in type(module).__name__:
                    return piece
        frame = frame.f_back
    return "in passing"
