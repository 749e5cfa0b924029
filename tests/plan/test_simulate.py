"""A simulated rank holds what the real layout gives it, and sends what a real rank sends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from expertmesh.bench.tiny import tiny_config
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.links import Group, Sent, group_of
from expertmesh.plan.memory import Job, model_of, trace
from expertmesh.plan.ranks import lay_out, rank_of
from expertmesh.plan.shards import shares_by_rule
from expertmesh.plan.simulate import real_shares, simulate
from tests.distributed.ranks import on_the_same_ranks
from tests.plan import traffic

H100 = GPUS["h100-80gb"]
MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
LAYOUTS = (
    {},
    {"ep_size": 2},
    {"ep_size": 4},
    {"ep_size": 2, "dp_replicate_size": 2},
    {"dp_replicate_size": 4},
    {"tp_size": 2},
    {"tp_size": 2, "ep_size": 4},
)
LARGE = {
    "nemotron-3-ultra-550b": (549.3, {"world_size": 128, "ep_size": 64, "batch": 2}),
    "deepseek-v3": (671.0, {"world_size": 256, "ep_size": 64}),
}


def held_by(job, rank):
    """Bytes of the shards of one rank, added up."""
    with rank_of(job.world_size, rank):
        model = lay_out(model_of(job), job.setup(), H100.memory)
        return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())


def buffers(job):
    """Bytes of what every rank has whole."""
    return sum(buffer.nbytes for buffer in model_of(job).buffers())


@pytest.mark.parametrize(
    ("family", "memory"),
    [
        ("qwen3_moe", 2**20),  # dense weights are gathered for each use; else once, as they are small
        ("qwen3_moe", 2**40),
        ("nemotron_h", 2**20),
    ],
)
def test_the_rules_of_a_plan_are_what_the_real_layout_does(family, memory):
    for sizes in LAYOUTS:
        job = Job(tiny_config(family), seq=32, world_size=4, per_node=2, **sizes)
        real, total = real_shares(job, memory)
        assert total == sum(p.numel() for p in model_of(job).parameters())
        if job.tp_size == 1:
            planned = shares_by_rule(model_of(job), job, memory)
        else:
            with rank_of(job.tp_size):
                setup = replace(job.setup(), world_size=2, dp_size=1, ep_size=1)
                planned = shares_by_rule(lay_out(model_of(job), setup, memory), job, memory)
        assert {name: replace(share, unit="") for name, share in planned.items()} == {
            name: replace(share, unit="") for name, share in real.items()
        }, sizes


@pytest.mark.parametrize("sizes", [{"ep_size": 2}, {"ep_size": 2, "dp_replicate_size": 2}, {"tp_size": 2}], ids=str)
def test_the_bytes_of_all_ranks_are_those_of_the_model(sizes):
    job = Job(tiny_config("qwen3_moe", vocab_size=131), seq=32, world_size=4, dtype=torch.float32, **sizes)
    found = [real_shares(job, H100.memory, rank) for rank in range(4)]
    whole = {name: parameter.numel() for name, parameter in model_of(job).named_parameters()}
    for name, numel in whole.items():
        held = [shares[name].elements for shares, _ in found]
        copies, rest = divmod(sum(held), numel)
        assert rest == 0 and copies in (1, job.dp_replicate_size, job.tp_size) and held[0] == max(held), name
    assert 4 * sum(share.elements for share in found[3][0].values()) == held_by(job, 3)


def test_what_stands_is_what_the_shards_are():
    job = Job(tiny_config("nemotron_h", num_nextn_predict_layers=1), seq=32, world_size=4, ep_size=2, mtp=True)
    found = simulate(job, H100)
    assert found.held["parameters"] == found.plan.layout.memory.pieces["parameters"] - buffers(job) == held_by(job, 0)
    assert found.held["optimizer states"] == 2 * found.held["gradients"] < 2 * found.held["parameters"]
    released, exact = (simulate(replace(job, released=how), H100) for how in ("running", "exact"))
    assert released.held["gradients"] == 0 and exact.sent["weights and gradients"].wire == pytest.approx(
        2 * released.sent["weights and gradients"].wire
    )
    assert exact.seconds_hidden == pytest.approx(2 * released.seconds_hidden)


def test_a_ring_leaves_a_node_once_for_each_of_its_members():
    everywhere = group_of(range(16), per_node=8)
    assert everywhere == Group(16, near=8)
    assert everywhere.ring(16.0) == Sent(wire=15 * 7 / 8, network=15 / 8)
    assert group_of(range(0, 16, 8), per_node=8).ring(16.0) == Sent(wire=0.0, network=8.0)
    assert group_of(range(8), per_node=8).ring(16.0) == Sent(wire=14.0, network=0.0)
    assert everywhere.pairs(16.0) == Sent(wire=7.0, network=8.0)


def test_a_slow_network_makes_a_step_longer_and_nothing_else():
    job = Job(tiny_config("qwen3_moe", **traffic.SMALL), seq=64, world_size=4, ep_size=4, per_node=2)
    fast, slow = (simulate(job, replace(H100, network=rate)) for rate in (40e9, 1e9))
    assert fast.sent == slow.sent and fast.sent["weights and gradients"].network > 0
    by = {
        name: slow.plan.layout.speed.seconds[name] / seconds for name, seconds in fast.plan.layout.speed.seconds.items()
    }
    assert all(factor == pytest.approx(40 if name.startswith("network") else 1) for name, factor in by.items())
    assert 0 < slow.seconds_hidden < slow.plan.layout.speed.step


def test_where_ranks_run_already_none_are_simulated():
    with rank_of(2), pytest.raises(ValueError, match="torch.distributed is initialized"):
        simulate(Job(tiny_config("qwen3_moe"), seq=32, world_size=2), H100)


def planned_traffic(sizes):
    """Bytes that a plan says a rank sends, by what they are for, as `traffic.sent`."""
    job = Job(tiny_config("qwen3_moe", **traffic.SMALL), seq=traffic.SEQ, world_size=4, per_node=1, **sizes)
    work = trace(replace(job, dtype=torch.float32), 2**40).work
    return {
        what: sum(work[link + (what and f", {what}")].bytes for link in Sent._fields) for what in ("", "FSDP", "TP")
    }


@pytest.mark.parametrize("sizes", [{}, {"dp_replicate_size": 2}, {"tp_size": 2}], ids=str)
def test_a_real_step_sends_what_is_planned(sizes, monkeypatch):
    monkeypatch.setattr("expertmesh.parallel.setup.check_same_on_all_ranks", lambda *_: None)
    monkeypatch.setattr("expertmesh.parallel.layout.gather_on_hosts", lambda *_: None)
    with rank_of(4):
        real = traffic.sent(0, sizes)
    planned = planned_traffic(sizes)
    assert {kind: real.get(kind, 0) for kind in planned} == pytest.approx(planned, rel=0.001)


@pytest.mark.slow
def test_real_ranks_send_what_is_planned():
    several = [{"ep_size": 2}, {"tp_size": 2}]
    for sizes, ranks in zip(several, on_the_same_ranks(4, traffic.sent, [(sizes,) for sizes in several]), strict=True):
        planned = planned_traffic(sizes)
        for real in ranks:
            assert real["FSDP"] == pytest.approx(planned["FSDP"], rel=0.001), sizes
            assert real.get("TP", 0) == pytest.approx(planned["TP"], rel=0.001), sizes
        # experts are not balanced here, and each rank sends what its own tokens ask for
        assert sum(real.get("", 0) for real in ranks) == pytest.approx(4 * planned[""], rel=0.1), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_models_hold_what_their_shards_are(name):
    billions, sizes = LARGE[name]
    job = Job(AutoConfig.from_pretrained(MODELS / name), recompute=True, mtp=True, **sizes)
    assert sum(p.numel() for p in model_of(replace(job, mtp=False)).parameters()) / 1e9 == pytest.approx(billions, 1e-3)
    found = simulate(job, H100)
    assert found.plan.fits and found.held["parameters"] == held_by(job, 0)
    assert found.held["parameters"] == found.plan.layout.memory.pieces["parameters"] - buffers(job)
    planned = trace(job, H100.memory).parameters
    for rank in (1, job.ep_size, job.world_size - 1):
        shares, total = real_shares(job, H100.memory, rank)
        held = sum(share.elements * planned[name][1] for name, share in shares.items())
        assert held == held_by(job, rank) <= found.held["parameters"]
        assert total == found.parameters
    assert job.world_size * found.held["parameters"] == pytest.approx(2 * found.parameters, rel=0.001)
