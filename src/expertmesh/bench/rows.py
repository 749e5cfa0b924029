"""The result type of the parity and export checks, and their error measures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One compared quantity. `error` and `limit` are relative errors, or counts if `limit` is 0."""

    case: str
    quantity: str
    error: float
    limit: float
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit. False for NaN."""
        return self.error <= self.limit


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Return max |found - expected| / max(max |expected|, floor): 0 for equal tensors, infinity if the shapes differ or
    if only one side has NaN or infinity.
    """
    if found.shape != expected.shape:
        return math.inf
    if torch.equal(found, expected):
        return 0.0
    worst = float((found.double() - expected.double()).abs().max())
    scale = max(float(expected.double().abs().max()), floor)
    return worst / scale if scale > 0.0 and math.isfinite(worst) else math.inf


def rms_errors(
    found: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None]
) -> dict[str, float]:
    """Return {name: rms(found - expected) / rms(expected)} with the floor of `worst_error`; infinity if one is None."""

    def rms(tensor: torch.Tensor) -> float:
        return float(tensor.double().square().mean().sqrt())

    sizes = {name: rms(tensor) for name, tensor in expected.items() if tensor is not None}
    floor = 0.01 * max(sizes.values(), default=0.0)
    errors = {}
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        if a is None or b is None:
            errors[name] = 0.0 if a is b else math.inf
        else:
            errors[name] = rms(a - b) / (max(sizes[name], floor) or 1.0)
    return errors


def worst_error(
    found: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None]
) -> tuple[float, str]:
    """Return the largest `relative_error` of two models' gradients, and its parameter. A gradient that exists on one
    side only has an infinite error.

    The floor is 1% of the model's largest gradient entry. Without it, rounding alone makes a tensor of a few small,
    cancelling entries (Qwen3-Next's `A_log`) differ by more than 1e-5 between two stock experts implementations.
    """
    floor = 0.01 * max((float(tensor.abs().max()) for tensor in expected.values() if tensor is not None), default=0.0)
    worst = (0.0, "")
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        alone = 0.0 if a is b else math.inf
        error = alone if a is None or b is None else relative_error(a, b, floor)
        worst = max(worst, (error, name))
    return worst
