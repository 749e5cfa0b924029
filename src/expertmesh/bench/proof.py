"""The check before a benchmark times anything: every arm computes the same as stock Transformers in float32.

It uses a few layers at the work's widths (`Work.proof` has exceptions), with the same weights and tokens in every arm.
On a GPU the arms run in bfloat16, and an arm's gradient errors are given as multiples of stock's own. On the CPU
everything is float32.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from expertmesh.bench.arms import ARMS, Arm, model_of
from expertmesh.bench.steps import release
from expertmesh.bench.works import Work, config_of
from expertmesh.train.routing import routers


class Proof:
    """The float32 reference of one work: weights, tokens, and stock's loss and gradients."""

    def __init__(self, work: Work, device: str, tokens: int, tiny: bool) -> None:
        self.work, self.device, self.tiny = work, device, tiny
        self._run_exact(tokens)
        self.stock = self.errors(ARMS["stock"])

    def compare(self, arm: Arm) -> dict[str, Any]:
        """Return the relative error of the loss and of each gradient (norm of the difference over the norm). On a GPU,
        add the largest ratio to stock's error (`worst_ratio`) and its parameter (`worst_tensor`).
        """
        found = self.stock if arm.name == "stock" else self.errors(arm)
        if self.device == "cpu":
            return found
        stock = self.stock["gradient_errors"]
        ratios = {name: error / stock[name] for name, error in found["gradient_errors"].items() if stock[name]}
        worst = max(ratios, key=lambda name: ratios[name])
        return found | {"worst_ratio": ratios[worst], "worst_tensor": worst}

    def errors(self, arm: Arm) -> dict[str, Any]:
        """Return the relative errors of one arm, in the dtype in which it is timed."""
        release()
        with self._built(arm, torch.float32 if self.device == "cpu" else torch.bfloat16) as model:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.weights[name])
            loss, got = _gradients(model, self.ids)
            errors = {name: _error(got.pop(name), want) for name, want in self.gradients.items()}
        return {"loss_error": abs(loss - self.loss) / self.loss, "gradient_errors": errors}

    def _run_exact(self, tokens: int) -> None:
        """Compute the reference and move it to the CPU, because the arms need the GPU's memory."""
        with self._built(ARMS["stock"], torch.float32, experts_implementation="eager") as model:
            _prepare(model)
            self.weights = {name: parameter.detach().bfloat16().cpu() for name, parameter in model.named_parameters()}
            generator = torch.Generator().manual_seed(2)
            self.ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
            self.loss, gradients = _gradients(model, self.ids)
            self.gradients = {name: gradient.cpu() for name, gradient in gradients.items()}

    def _built(self, arm: Arm, dtype: torch.dtype, **options: Any) -> Any:
        attention = None if self.device == "cpu" or dtype == torch.float32 else self.work.attention
        changes = options if self.tiny else self.work.proof | options
        config = config_of(self.work, self.work.proof_layers, self.tiny, **changes)
        return model_of(arm, config, dtype, self.device, attention)


@torch.no_grad()
def _prepare(model: PreTrainedModel) -> None:
    """Round weights to bfloat16, and avoid near-ties of routers, whose flips in bfloat16 would hide other errors."""
    for _, router in routers(model):
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
    """Return norm(got - want) / norm(want), slice by slice, because a float32 copy of a layer's experts is large."""
    difference = size = 0.0
    for some, wanted in zip(got.flatten().split(piece), want.flatten().split(piece), strict=True):
        wanted = wanted.to(got.device)
        difference += float((some.float() - wanted).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
    return (difference / size) ** 0.5 if size else difference**0.5
