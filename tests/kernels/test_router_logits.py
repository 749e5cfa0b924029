"""The router's logits on tensor cores: what the float32 product gives, on bfloat16 inputs."""

import torch

from expertmesh.kernels.router_logits import RouterLogits, router_logits
from tests.kernels.compare import error, leaf, outputs_and_grads


def test_logits_are_those_of_a_float32_product_and_gradients_round_once():
    x, weight = (leaf(*shape).detach().bfloat16().requires_grad_() for shape in ((70, 64), (24, 64)))
    expected = outputs_and_grads(lambda x, w: torch.nn.functional.linear(x.float(), w.float()), x, weight)
    got = outputs_and_grads(RouterLogits.apply, x, weight)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert error(got[0], expected[0]) < 1e-6
    exact = outputs_and_grads(torch.nn.functional.linear, x.detach().double().requires_grad_(), weight.double())
    assert error(got[1], exact[1]) < 2**-8 and error(got[2], expected[2]) < 2**-8


def test_elsewhere_transformers_product_runs():
    x, weight = leaf(7, 24), leaf(5, 24)
    assert torch.equal(router_logits(x, weight), torch.nn.functional.linear(x, weight))
    assert router_logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32
