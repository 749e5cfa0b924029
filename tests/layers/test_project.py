"""Projections of one input equal the modules, and leave everything that is more than a bare weight to them."""

import pytest
import torch
from torch import nn

from expertmesh.layers.project import _is_bare, project
from tests.kernels.compare import assert_same


def linears(**kwargs: bool) -> list[nn.Linear]:
    return [nn.Linear(24, width, bias=False, **kwargs) for width in (40, 8, 8)]


def run(forward, modules, used=(0, 1, 2)):
    torch.manual_seed(1)
    x = torch.randn(2, 7, 24, requires_grad=True)
    weights = [module.weight for module in modules if module.weight.requires_grad]
    outputs = forward(x, *modules)
    loss = sum(outputs[i].square().sum() for i in used)
    grads = torch.autograd.grad(loss, [x, *weights], allow_unused=True)
    return [*outputs, *(torch.zeros(1) if grad is None else grad for grad in grads)]


def called(x, *modules):
    return tuple(module(x) for module in modules)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
def test_outputs_and_gradients_equal_those_of_the_modules(used, frozen):
    modules = linears()
    for i in frozen:
        modules[i].weight.requires_grad_(False)
    assert all(_is_bare(module, torch.randn(1)) for module in modules)
    assert_same(run(project, modules, used), run(called, modules, used))


def test_an_input_without_gradient_gets_none_and_weights_do():
    modules = linears()
    x = torch.randn(3, 24)
    grads = torch.autograd.grad(sum(y.sum() for y in project(x, *modules)), [module.weight for module in modules])
    assert all(torch.allclose(grad, x.sum(0).expand_as(grad)) for grad in grads)


def test_modules_that_are_more_than_a_weight_are_called():
    seen = []
    hooked, biased, replaced, other, wider = *linears()[:2], *linears()[:2], nn.Linear(24, 8, bias=False).double()
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    biased.bias = nn.Parameter(torch.randn(8))
    replaced.forward = lambda x: seen.append("forward") or nn.functional.linear(x, replaced.weight)
    other.__class__ = type("Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    x = torch.randn(5, 24)
    assert not any(_is_bare(module, x) for module in (hooked, biased, replaced, other, wider))
    assert_same(project(x, *linears(), hooked)[3:], [hooked(x)])
    assert_same(project(x, biased, replaced, other), called(x, biased, replaced, other))
    assert seen == ["hook"] * 2 + ["forward"] * 2


def test_under_autocast_the_modules_decide_the_dtype():
    modules = linears()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = run(project, modules), run(called, modules)
    assert got[0].dtype == torch.bfloat16
    assert_same(got, expected)
