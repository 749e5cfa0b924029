"""Inputs of layers that wait in host memory: when they are copied, and what is refused. The CPU is its own host."""

import copy
import gc
from functools import partial, wraps

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.tiny import tiny_config, tiny_model
from expertmesh.memory.offload import Offload, _OnHost
from expertmesh.parallel.setup import recompute
from expertmesh.plan.memory import Job, memory_of, trace
from tests.families.test_recompute import assert_equal, step

WHOLE = partial(checkpoint, use_reentrant=False)


class Traced(Offload):
    """Writes down what is copied, and runs of layers between."""

    def __init__(self):
        super().__init__(WHOLE)
        self.said: list[str] = []

    def _pack(self, x):
        self.said.append(f"out {x[0].item():g}")
        return super()._pack(x)

    def _fetch(self, away):
        self.said.append(f"in {away.host[0].item():g}")
        return super()._fetch(away)

    def square(self, x):
        def layer(x):
            self.said.append(f"run {x[0].item():g}")
            return x * x

        return self(layer, x)


def in_host_memory() -> list[torch.Tensor]:
    gc.collect()
    return [one.host for one in gc.get_objects() if type(one) is _OnHost]


def test_an_input_leaves_beside_its_layer_and_comes_one_layer_ahead():
    offload, x = Traced(), torch.full((3,), 2.0, requires_grad=True)
    y = offload.square(offload.square(offload.square(x)))
    assert [word for word in offload.said if word != "out 0"] == "out 2,run 2,out 4,run 4,out 16,run 16".split(",")
    assert len(offload._on_device) == 1, "the last input is still here"
    offload.said.clear()
    y.sum().backward()
    assert offload.said == "in 4,run 16,in 2,run 4,run 2".split(","), "the last needs no copy, others come ahead"
    assert torch.equal(x.grad, torch.full((3,), 8 * 2.0**7)) and not offload._on_device


def test_graphs_that_are_dropped_kept_or_come_in_another_order_are_right():
    offload, x = Traced(), torch.ones(3, requires_grad=True)
    offload.square(offload.square(x))  # without a backward
    one, two = (offload.square(offload.square(n * x)) for n in (1, 3))
    for y, grad in ((one, 4.0), (two, 4.0 * 3**4), (two, 4.0 * 3**4), (one, 4.0)):
        (got,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(got, torch.full((3,), grad))
    assert len(in_host_memory()) == 4
    del one, two, y
    offload.square(x).sum().backward()
    assert not in_host_memory()


def test_an_input_that_is_changed_in_place_is_found():
    offload, x = Offload(WHOLE), torch.ones(3, requires_grad=True)
    middle = offload(torch.exp, x)
    y = offload(torch.sin, middle)
    with torch.no_grad():
        middle += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_transformers_offload_is_ours_in_a_fused_model():
    model = fuse(tiny_model("qwen3_moe")).train()
    want = step(model)
    model.activation_checkpointing_enable(offload=True)
    assert all(isinstance(layer._gradient_checkpointing_func, Offload) for layer in model.model.layers)
    assert_equal(step(model), want)
    again = copy.deepcopy(model)
    assert_equal(step(again), want)
    assert len({id(layer._gradient_checkpointing_func) for layer in (*again.model.layers, *model.model.layers)}) == 2
    model.activation_checkpointing_enable(offload=True, every_n_layers=2)  # as Transformers has it
    assert not any(isinstance(layer._gradient_checkpointing_func, Offload) for layer in model.model.layers)


@pytest.mark.parametrize("policy", ["offload", {"offload": 2}], ids=str)
def test_a_plan_knows_what_goes_to_the_host(policy, monkeypatch):
    config, hosts = tiny_config("qwen3_moe"), list[int]()
    original = Offload._copy

    @wraps(original)
    def copied(self, target, source):
        hosts.append(target.nbytes)
        return original(self, target, source)

    monkeypatch.setattr(Offload, "_copy", copied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    recompute(model, policy)
    ids = torch.randint(3, 100, (1, 16))
    loss, count = model(input_ids=ids, labels=ids).loss, config.num_hidden_layers if policy == "offload" else 2
    assert hosts == [16 * config.hidden_size * 4] * count
    loss.backward()
    assert len(hosts) == 2 * count - 1
    job = Job(config, seq=16, dtype=torch.float32, recompute=policy)
    assert memory_of(job, trace(job, 140 * 2**30)).host == {"layer inputs": sum(hosts[:count])}
