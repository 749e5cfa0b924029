"""The search over layouts, the time of a step, and exchanges without partners."""

from dataclasses import replace

import pytest
import torch

from expertmesh.bench.flops import forward_flops
from expertmesh.bench.tiny import tiny_config
from expertmesh.plan import layouts, plan
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.layouts import ep_sizes, layout_of, search
from expertmesh.plan.memory import CONTEXT, Job, trace
from expertmesh.plan.speed import FIRST, INPUTS, speed_of

H200 = GPUS["h200"]
QWEN = Job(tiny_config("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[]), seq=64, world_size=2)


def test_layouts_fit_and_the_fastest_comes_first():
    small = replace(H200, memory=int(CONTEXT) + 42 * 2**20)
    found = search(QWEN, small)
    assert {layout.job.ep_size for layout in found} == {1, 2} and not any(layout.job.recompute for layout in found)
    assert all(layout.fits(small) for layout in found)
    speeds = [layout.speed.tokens_per_second for layout in found]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1]
    assert search(QWEN, replace(H200, memory=int(CONTEXT))) == []


def test_layers_recompute_as_little_as_fits(monkeypatch):
    monkeypatch.setattr(layouts, "MOST_ROWS", 1)
    job = replace(QWEN, config=tiny_config("qwen3_moe", mlp_only_layers=[]), seq=1024, world_size=1)
    for policy in ({"experts": 2}, True):
        least = layout_of(replace(job, recompute=policy), H200).memory.needed
        (found,) = search(replace(job, optimizer="adamw-8bit"), replace(H200, memory=least))
        assert found.job.recompute == policy


def test_only_sizes_that_divide_experts_and_ranks_are_tried():
    assert ep_sizes(replace(QWEN, world_size=12)) == [1, 2, 4]
    assert ep_sizes(replace(QWEN, world_size=16, dp_replicate_size=4)) == [1, 2, 4]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_the_products_of_a_step_are_those_of_the_formula(family):
    config = tiny_config(family, hidden_size=256)
    found = trace(Job(config, seq=512), H200.memory)
    wanted = forward_flops(config, 1, 512)
    scan = sum(flops for name, flops in wanted.items() if name == "Mamba2 scan")
    core = wanted["attention core"]
    # attention's backward has five products to the forward's two, or seven where our kernels make some of them twice
    least, most = 3 * (sum(wanted.values()) - scan) + 0.5 * core, 3 * (sum(wanted.values()) - scan) + 1.5 * core
    assert 0.98 * least <= sum(work.flops for work in found.work.values()) <= 1.02 * most


def test_a_layer_that_is_recomputed_takes_less_memory_and_more_time():
    job = replace(QWEN, batch=8, world_size=1)
    once, again = (trace(replace(job, recompute=recompute), H200.memory) for recompute in (False, True))
    assert sum(again.kept.values()) < 0.8 * sum(once.kept.values())
    assert speed_of(job, again, H200).step > speed_of(job, once, H200).step


def test_copies_to_the_host_take_time_where_they_are_slower_than_layers():
    job = replace(QWEN, config=tiny_config("qwen3_moe"), batch=8, world_size=1, recompute="offload")
    fast, slow = (layout_of(job, replace(H200, host=rate)) for rate in (50e9, 1e7))
    assert fast.speed.seconds[INPUTS] == 0 < slow.speed.seconds[INPUTS]
    copied = (2 * fast.memory.host["layer inputs"] - 8 * 64 * 32 * 2) / 1e7  # all but the last come back
    computed = fast.speed.step - fast.speed.seconds["optimizer and clipping"]
    assert slow.speed.seconds[INPUTS] == pytest.approx(copied - computed)


def test_exact_clipping_takes_a_forward_and_backward_more_and_no_memory():
    job = replace(QWEN, world_size=2, ep_size=2)
    running, exact = (layout_of(replace(job, released=how), H200) for how in ("running", "exact"))
    assert exact.memory == running.memory
    optimizer = running.speed.seconds["optimizer and clipping"]
    assert exact.speed.seconds[FIRST] == pytest.approx(running.speed.step - optimizer)
    assert exact.speed.step == pytest.approx(2 * running.speed.step - optimizer)


def test_tokens_go_once_to_every_rank_that_needs_them():
    job = replace(QWEN, config=tiny_config("qwen3_moe", num_experts=16, mlp_only_layers=[], num_hidden_layers=1))
    near, far = (trace(replace(job, world_size=16, ep_size=16, per_node=n), H200.memory).work for n in (16, 8))
    assert "network" not in near  # more than 8 ranks never gather
    assert far["network"].bytes == pytest.approx(near["wire"].bytes * 8 / 15)
    assert far["wire"].bytes + far["network"].bytes == pytest.approx(near["wire"].bytes)
    gather = trace(replace(job, world_size=4, ep_size=4), H200.memory).work["wire"].bytes
    tokens = 64 * 32 * 2  # rows of 32 bfloat16 numbers
    assert gather == pytest.approx(4 * 3 * tokens, rel=0.5)  # there and back, in both directions, to three others
    rows = 64 * 16 * (1 - (15 / 16) ** 2)  # two of 16 experts, each on a rank of its own
    assert near["wire"].bytes == pytest.approx(4 * rows * 15 / 16 * 64, rel=0.5)


def test_a_plan_says_what_is_left_or_lacks():
    job = replace(QWEN, world_size=1)
    assert plan(job, H200).fits and plan(job, H200).left > 0
    lacking = plan(job, replace(H200, memory=2**29))
    assert not lacking.fits and lacking.left < 0


def test_a_model_that_looks_at_values_is_refused():
    def looking(model):
        model.register_forward_pre_hook(lambda *_: torch.empty((), device="meta").item())
        return model

    with pytest.raises(ValueError, match="reads values of tensors"):
        trace(replace(QWEN, adapt=looking), H200.memory)
