"""What a benchmark proves before it times: every arm computes the model that stock Transformers computes in float32.

A few layers at the work's widths (`Work.proof` names what is smaller), the same weights and tokens in every arm. On a
GPU the arms run in bfloat16, and an arm's gradient errors are told as multiples of stock's own; on the CPU everything
is float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from expertmesh.bench.arms import ARMS, Arm, model_of
from expertmesh.bench.gate import routers
from expertmesh.bench.steps import release
from expertmesh.bench.works import Work, config_of


def parity(work: Work, arms: Sequence[Arm], device: str, tokens: int, tiny: bool) -> dict[str, Any]:
    """By arm: the loss' relative error, each gradient's (norm of the difference over the norm), and how the worst
    compares with stock's: `worst_ratio` in `worst_tensor` (on a GPU only).
    """
    changes = {} if tiny else work.proof

    def built(arm: Arm, dtype: torch.dtype, **options: Any) -> Any:
        attention = None if device == "cpu" or dtype == torch.float32 else work.attention
        config = config_of(work, work.proof_layers, tiny, **changes | options)
        return model_of(arm, config, dtype, device, attention)

    with built(ARMS["stock"], torch.float32, experts_implementation="eager") as reference:
        _prepare(reference)
        weights = {name: parameter.detach().bfloat16().cpu() for name, parameter in reference.named_parameters()}
        ids = torch.randint(0, reference.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(2))
        exact_loss, exact = _gradients(reference, ids)
        exact = {name: gradient.cpu() for name, gradient in exact.items()}
    del reference
    release()
    found: dict[str, Any] = {}
    for arm in (ARMS["stock"], *(arm for arm in arms if arm.name != "stock")):
        with built(arm, torch.float32 if device == "cpu" else torch.bfloat16) as model:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
            loss, got = _gradients(model, ids)
            errors = {name: _error(got.pop(name), want) for name, want in exact.items()}
        del model, got
        release()
        found[arm.name] = {"loss_error": abs(loss - exact_loss) / exact_loss, "gradient_errors": errors}
        if device != "cpu":
            found[arm.name] |= _against_stock(errors, found["stock"]["gradient_errors"])
    return found


@torch.no_grad()
def _prepare(model: PreTrainedModel) -> None:
    """Weights that bfloat16 can hold, and clear choices: near-ties that flip in bfloat16 would hide the rest."""
    for router in routers(model).values():
        weight: Any = router.weight
        torch.nn.init.normal_(weight, std=0.3)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _gradients(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    ids = ids.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), gradients


def _error(got: torch.Tensor, want: torch.Tensor, piece: int = 2**26) -> float:
    """Norm of the difference over the norm, piece by piece: a float32 copy of a layer's experts would be large."""
    difference = size = 0.0
    for some, wanted in zip(got.flatten().split(piece), want.flatten().split(piece), strict=True):
        wanted = wanted.to(got.device)
        difference += float((some.float() - wanted).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
    return (difference / size) ** 0.5 if size else difference**0.5


def _against_stock(errors: dict[str, float], stock: dict[str, float]) -> dict[str, Any]:
    ratios = {name: error / stock[name] for name, error in errors.items() if stock[name]}
    worst = max(ratios, key=lambda name: ratios[name])
    return {"worst_ratio": ratios[worst], "worst_tensor": worst}
