"""Router metrics: what is counted, and what the numbers mean."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expertmesh.bench.parity import top_k_of
from expertmesh.bench.tiny import FAMILIES, tiny_model
from expertmesh.moe.block import routers
from expertmesh.train.routing import RouterLoad, layer_metrics


def test_metrics_of_a_known_load():
    counts_LE = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    metrics = layer_metrics(counts_LE)
    np.testing.assert_allclose(metrics["load_cv"], [0, np.sqrt(3), 1, 0])
    np.testing.assert_allclose(metrics["max_vio"], [0, 3, 1, 0])
    np.testing.assert_allclose(metrics["dead_frac"], [0, 0.75, 0.5, 0])
    np.testing.assert_allclose(metrics["entropy"], [1, 0, 0.5, 1], atol=1e-12)
    assert "rank_vio" not in metrics
    np.testing.assert_allclose(layer_metrics(counts_LE, ranks=2)["rank_vio"], [0, 1, 1, 0])
    np.testing.assert_allclose(layer_metrics(counts_LE, ranks=4)["rank_vio"], [0, 3, 1, 0])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_routers_of_every_family_are_counted(family):
    model = tiny_model(family).train()
    load = RouterLoad(model)
    tokens = 2 * 9
    model(input_ids=torch.randint(3, 128, (2, 9)))
    assert set(load.window()) == {"moe/load_cv", "moe/max_vio", "moe/dead_frac", "moe/entropy"}
    assert load.last is not None
    assert (load.last.sum(1) == tokens * top_k_of(model)).all()
    assert len(load.layers) == len(load.last)


def test_counts_are_the_choices_of_the_routers():
    model = tiny_model("qwen3_moe").train()
    load, chosen = RouterLoad(model), {}
    for name, router in routers(model):
        router.register_forward_hook(lambda module, args, output, name=name: chosen.update({name: output[2]}))
    model(input_ids=torch.randint(3, 128, (2, 9)))
    load.window()
    assert load.last is not None
    for name, counts_E in zip(load.layers, load.last, strict=True):
        np.testing.assert_array_equal(counts_E, np.bincount(chosen[name].flatten(), minlength=len(counts_E)))


def test_ranks_that_share_out_the_experts_are_compared():
    model = tiny_model("qwen3_moe").train()
    model.config.distributed_config = SimpleNamespace(ep_size=2)
    load = RouterLoad(model)
    model(input_ids=torch.randint(3, 128, (2, 9)))
    found = load.window()["moe/rank_vio"]
    rows_LR = load.last.reshape(len(load.last), 2, -1).sum(2)
    np.testing.assert_allclose(found, (2 * rows_LR.max(1) / rows_LR.sum(1) - 1).mean())


def test_padding_and_evaluation_are_not_counted():
    model = tiny_model("qwen3_moe")
    load, input_ids = RouterLoad(model), torch.randint(3, 128, (2, 9))
    model.eval()(input_ids=input_ids)
    assert load.window() == {}
    load.mask = torch.ones_like(input_ids)
    load.mask[0, 4:] = 0
    model.train()(input_ids=input_ids, attention_mask=load.mask)
    load.window()
    assert load.last is not None and (load.last.sum(1) == 2 * (9 + 4)).all()


def test_windows_add_up():
    model = tiny_model("qwen3_moe").train()
    load = RouterLoad(model)
    for _ in range(3):
        model(input_ids=torch.randint(3, 128, (1, 8)))
        load.window()
    assert load.first is not None and load.last is not None and load.total is not None
    assert (load.total.sum(1) == 3 * 8 * 2).all()
    assert (load.first.sum(1) == 8 * 2).all() and (load.last.sum(1) == 8 * 2).all()


def test_a_model_without_experts_has_no_routers():
    assert list(routers(torch.nn.Linear(2, 2))) == []
    assert RouterLoad(torch.nn.Linear(2, 2)).window() == {}
