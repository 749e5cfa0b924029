"""One compared quantity with its limit, which parity and export checks return, and the two error measures they use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One compared quantity. `error` and `limit` are relative errors, or counts where `limit` is 0."""

    case: str
    quantity: str
    error: float
    limit: float
    where: str = ""

    @property
    def ok(self) -> bool:
        """NaN is never ok."""
        return self.error <= self.limit


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """max |found - expected| / max(max |expected|, floor). Equal is 0; another shape, or NaN or infinity on one side,
    is infinite.
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
    """Name -> rms(found - expected) / rms(expected), for noisy arithmetic. Floor and missing as in `worst_error`."""

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
    """The largest `relative_error` of two models' gradients, and the parameter it belongs to. A gradient only one side
    has is infinite.

    The floor is 1% of the model's largest gradient entry: a tensor of a few small, cancelling entries (Qwen3-Next's
    `A_log`) differs by more than 1e-5 of itself even between two stock implementations of the experts, by rounding
    alone.
    """
    floor = 0.01 * max((float(tensor.abs().max()) for tensor in expected.values() if tensor is not None), default=0.0)
    worst = (0.0, "")
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        alone = 0.0 if a is b else math.inf
        error = alone if a is None or b is None else relative_error(a, b, floor)
        worst = max(worst, (error, name))
    return worst
