"""The router's logits on tensor cores: what the float32 product gives, on bfloat16 hidden states."""

import pytest
import torch

from expertmesh.kernels.router import RouterLogits, router_logits
from tests.kernels.compare import error, leaf, outputs_and_grads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_exact_to_float32_and_gradients_to_their_dtype(dtype):
    x = leaf(70, 64).detach().bfloat16().requires_grad_()
    weight = leaf(24, 64).detach().to(dtype).requires_grad_()
    exact = outputs_and_grads(torch.nn.functional.linear, *(t.detach().double().requires_grad_() for t in (x, weight)))
    got = outputs_and_grads(RouterLogits.apply, x, weight)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, dtype]
    assert error(got[0], exact[0]) < 1e-6
    assert error(got[1], exact[1]) < 2**-8
    assert error(got[2], exact[2]) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(dtype, frozen):
    inputs = [leaf(7, 16).detach().bfloat16(), leaf(5, 16).detach().to(dtype)]
    both = outputs_and_grads(RouterLogits.apply, *(t.clone().requires_grad_() for t in inputs))
    inputs[1 - frozen].requires_grad_()
    assert torch.equal(outputs_and_grads(RouterLogits.apply, *inputs)[1], both[2 - frozen])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_and_small_weights_keep_their_digits(scale):
    x, weight = leaf(9, 16).detach().bfloat16(), leaf(5, 16, scale=scale).detach()
    assert error(RouterLogits.apply(x, weight), x.double() @ weight.double().t()) < 1e-6


def test_elsewhere_transformers_product_runs():
    x, weight = leaf(7, 24), leaf(5, 24)
    assert torch.equal(router_logits(x, weight), torch.nn.functional.linear(x, weight))
    assert router_logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32
    assert torch.equal(router_logits(x.bfloat16(), weight), torch.nn.functional.linear(x.bfloat16().float(), weight))
