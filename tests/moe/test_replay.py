"""The experts chosen in the forward are those of the recompute, even if the router would choose others then."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expertmesh import AutoModelForCausalLM, keep_routing
from expertmesh.bench.tiny import tiny_config
from expertmesh.kernels.recompute import replayed


def test_a_recompute_gets_the_recorded_choices_in_order():
    fresh = iter(range(100))
    seen = []

    def region(x):
        for _ in range(2):
            seen.append(replayed(lambda: next(fresh)))
        return (x * 2).sin()

    inputs = [torch.ones(1, requires_grad=True) for _ in range(3)]
    outputs = [checkpoint(region, x, use_reentrant=False, context_fn=keep_routing) for x in inputs]
    assert seen == [0, 1, 2, 3, 4, 5]
    seen.clear()
    outputs[1].backward()  # in any order, and some never
    outputs[0].backward(retain_graph=True)
    outputs[0].backward()
    assert seen == [2, 3, 0, 1, 0, 1]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_a_router_that_changes_its_mind_does_not_change_the_gradients(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    model.activation_checkpointing_enable()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    routers = [m for n, m in model.named_modules() if type(m).__name__.lower().endswith("router")]
    saved = [r.weight.detach().clone() for r in routers]
    for router, weight in zip(
        routers, saved, strict=True
    ):  # other logits in the recompute: other choices, if made anew
        router.weight.data = weight.flip(0)
    _expect_replayed_choices(routers, loss.backward)
    for router, weight in zip(routers, saved, strict=True):
        router.weight.data = weight
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, grad in want.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-5, atol=1e-7)


def _expect_replayed_choices(routers, run):
    """While `run` recomputes, the routers must return the forward's choices, not what their logits say now."""
    replayed = []

    def compare(router, args, output):
        logits, _, ids = output
        own = torch.topk(logits.detach(), ids.shape[-1], dim=-1).indices
        replayed.append(not torch.equal(ids.sort(-1).values, own.sort(-1).values))

    handles = [router.register_forward_hook(compare) for router in routers]
    run()
    for handle in handles:
        handle.remove()
    assert len(replayed) == len(routers), "the layers were not recomputed"
    assert any(replayed), "the recompute chose anew"
