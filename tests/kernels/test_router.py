"""The router kernel equals its PyTorch reference: weights, ids and gradients, for every kind."""

import pytest
import torch

from expertmesh import backends
from expertmesh.kernels.router import Routing, kernel_supports, route, route_reference

ROUTINGS = {
    "qwen": (Routing("softmax", 3, normalize=True), 8),
    "qwen, odd experts": (Routing("softmax", 3, normalize=True), 11),
    "olmoe": (Routing("softmax", 2), 8),
    "gpt-oss": (Routing("topk_softmax", 4), 16),
    "top-1": (Routing("topk_softmax", 1), 5),
    "deepseek": (Routing("sigmoid", 3, True, 2.5, num_groups=4, top_groups=2), 16),
    "deepseek, full size": (Routing("sigmoid", 8, True, 2.5, num_groups=8, top_groups=4), 256),
    "nemotron": (Routing("sigmoid", 3, False, 2.5), 10),
    "ernie": (Routing("softmax", 3, normalize=True, min_sum=0.7), 6),  # some sums are below, some above
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_router_kernel_equals_its_reference(name):
    torch.manual_seed(0)
    routing, num_experts = ROUTINGS[name]
    bias = torch.randn(num_experts) * 0.1 if routing.kind == "sigmoid" or name == "ernie" else None
    logits = torch.randn(13, num_experts, requires_grad=True)
    probe = torch.randn(13, num_experts)
    results = []
    for kernel in (True, False):
        if kernel:
            with backends.interpreted():
                weights, ids = route(logits, routing, bias)
                (grad,) = torch.autograd.grad((weights * probe.gather(1, ids)).sum(), logits)
        else:
            weights, ids = route_reference(logits, routing, bias)
            (grad,) = torch.autograd.grad((weights * probe.gather(1, ids)).sum(), logits)
        order = ids.argsort(-1)
        results.append((ids.gather(1, order), weights.gather(1, order), grad))
    (ids, weights, grad), (want_ids, want_weights, want_grad) = results
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUTINGS)
def test_given_ids_are_taken_and_only_the_weights_computed(name):
    routing, num_experts = ROUTINGS[name]
    logits = torch.randn(9, num_experts)
    given = torch.stack([torch.randperm(num_experts)[: routing.top_k] for _ in range(9)])
    want_weights, _ = route_reference(logits, routing, ids_TK=given)
    with backends.interpreted():
        weights, ids = route(logits, routing, ids_TK=given)
    assert torch.equal(ids, given)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-7)


def test_equal_logits_choose_distinct_experts_the_lower_ones_first():
    with backends.interpreted():
        _, ids = route(torch.zeros(3, 6), Routing("softmax", 4))
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


def test_groups_that_are_no_powers_of_two_are_declined():
    assert kernel_supports(Routing("sigmoid", 2, num_groups=4, top_groups=2), 16)
    assert kernel_supports(Routing("sigmoid", 2), 100)
    assert not kernel_supports(Routing("sigmoid", 2, num_groups=3, top_groups=2), 24)
