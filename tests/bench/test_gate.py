"""A benchmark's routing is what it says, on every arm."""

import pytest
import torch

from expertmesh.bench.arms import ARMS, model_of
from expertmesh.bench.gate import LARGEST_SHARE, set_routing, zipf_shares
from expertmesh.bench.works import WORKS, config_of, top_k_and_experts
from expertmesh.train.routing import routers


def choices(name, arm, routing, **changes):
    """(ids [T, K] by router, the gradient's norm of each router's weight), after one step."""
    config = config_of(WORKS[name], tiny=True, **changes)
    top_k, _ = top_k_and_experts(config)
    with model_of(ARMS[arm], config, torch.float32, "cpu") as model:
        set_routing(model, routing, top_k)
        seen = {}
        for place, router in routers(model):
            router.register_forward_hook(lambda module, args, output, place=place: seen.update({place: output[2]}))
        ids = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))
        model(input_ids=ids, labels=ids).loss.backward()
        return seen, [float(router.weight.grad.norm()) for _, router in routers(model)]


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("arm", ["stock", "expertmesh"])
def test_a_balanced_gate_gives_every_expert_the_same_number_of_rows_and_trains_the_router(name, arm):
    seen, gradients = choices(name, arm, "balanced")
    assert seen and all(gradient > 0 for gradient in gradients)
    for ids_TK in seen.values():
        assert len(set(torch.bincount(ids_TK.flatten(), minlength=8).tolist())) == 1
        assert all(len(set(row)) == len(row) for row in ids_TK.tolist())


@pytest.mark.parametrize("name", WORKS)
def test_skewed_routing_is_the_same_on_both_sides(name):
    stock, _ = choices(name, "stock", "skewed")
    ours, _ = choices(name, "expertmesh", "skewed")
    assert stock.keys() == ours.keys() and stock
    for place, ids_TK in stock.items():
        assert torch.equal(ids_TK.sort().values, ours[place].sort().values)


def test_skewed_routing_follows_the_stated_law():
    experts, top_k = 64, 4
    config = config_of(
        WORKS["qwen3-30b-a3b"], 1, tiny=True, hidden_size=256, num_experts=experts, num_experts_per_tok=top_k
    )
    with model_of(ARMS["stock"], config, torch.float32, "cpu") as model:
        set_routing(model, "skewed", top_k)
        ((_, router),) = routers(model)
        x_TH = torch.randn(8192, 256, generator=torch.Generator().manual_seed(0))
        loads = torch.bincount(router(x_TH)[2].flatten(), minlength=experts) / len(x_TH)
    shares = torch.tensor(zipf_shares(experts, top_k))
    assert float(loads.max() / loads.mean()) > 4
    assert torch.allclose(loads.sort(descending=True).values, shares, atol=0.05)


def test_shares_add_up_to_the_experts_of_a_token():
    shares = zipf_shares(128, 8)
    assert (
        sum(shares) == pytest.approx(8)
        and max(shares) == LARGEST_SHARE
        and shares[99] == pytest.approx(shares[49] / 2, rel=0.02)
    )
