"""A twin does by itself what its submodules do, but not where somebody hooked them, or put others in their place."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from expertmesh.bench.rows import relative_error
from tests.models import load_ours, load_stock

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen2_moe")
IDS = torch.arange(2 * 12).view(2, 12) * 7 % 128


def step(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Loss, logits and all gradients."""
    model.zero_grad()
    outputs = model(input_ids=IDS, labels=IDS)
    outputs.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **grads}


def assert_same(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == stock.keys()
    for name, value in ours.items():
        assert relative_error(value, stock[name], floor=1e-3) < 2e-5, name


def watched_step(model: PreTrainedModel, kind: str) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Which hooks on modules of this kind fired in a step, and what it gave."""
    fired: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if type(module).__name__ == kind:
                for when in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
                    register = getattr(module, f"register_{when}_hook")
                    hooks.enter_context(register(lambda *_, fires=f"{when} {name}": fired.add(fires)))
        return fired, step(model)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return load_stock(request.param).train(), load_ours(request.param).train()


def test_hooks_fire_wherever_they_fire_in_stock(pair):
    """On one kind of module after the other, as hooks on a block also change the way around what is in it."""
    for kind in {type(module).__name__ for module in pair[0].modules()} - {"ModuleList"}:
        (stock_fired, stock), (fired, ours) = (watched_step(model, kind) for model in pair)
        assert fired == stock_fired, kind
        assert_same(ours, stock)


class Own(nn.Module):
    """Not what any twin computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 0.7


def subclass_of(module: nn.Module) -> None:
    """Let the module be of a class of the user's own."""

    def forward(self, *args, **kwargs):
        return cls.forward(self, *args, **kwargs) * 0.9

    cls = type(module)
    module.__class__ = type("Mine", (cls,), {"forward": forward, "__module__": __name__})


def replaced(model: PreTrainedModel, name: str, make: Callable[[], nn.Module]) -> None:
    for module in model.modules():
        if isinstance(getattr(module, name, None), nn.Module):
            setattr(module, name, make())


CHANGES = {
    "activations": lambda model: (replaced(model, "act_fn", Own), replaced(model, "act", Own)),
    "learning activations": lambda model: replaced(model, "act_fn", nn.PReLU),
    "norms of a class of one's own": lambda model: [
        subclass_of(module) for module in model.modules() if type(module).__name__.endswith("Norm")
    ],
    "a parametrized weight": lambda model: [
        torch.nn.utils.parametrizations.weight_norm(module)
        for name, module in model.named_modules()
        if name.endswith(("norm", "lm_head", "o_proj", "conv1d"))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_what_is_put_in_the_place_of_a_submodule_after_fusing_is_what_runs(family, change):
    stock, ours = load_stock(family).train(), load_ours(family).train()
    before = step(ours)["loss"]
    for model in (stock, ours):
        CHANGES[change](model)
    after = step(ours)
    assert_same(after, step(stock))
    assert change == "a parametrized weight" or relative_error(after["loss"], before) > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_an_attribute_that_is_set_later_counts(family):
    """Transformers' own tests set every epsilon that a norm has to 1."""
    stock, ours = load_stock(family), load_ours(family)
    for model in (stock, ours):
        for module in model.modules():
            for name in ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps"):
                if hasattr(module, name):
                    setattr(module, name, 1.0)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
