"""What a plan says of adapters and of experts in 4 bits: bytes of the real model, and of real shards."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.bench.loops import adapted
from expertmesh.bench.works import WORKS, config_of
from expertmesh.kernels.packed import packed_in
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.memory import GIB, Job, memory_of, model_of, trace
from expertmesh.plan.shards import shares_by_rule
from expertmesh.plan.simulate import real_shares, simulate
from tests.moe.test_four_bit import config

H100 = GPUS["h100-80gb"]
#: names of attention and of experts' weights as the loops of the benchmarks have them
FAMILIES = ["qwen3_moe", "gpt_oss"]
FORMATS = [None, "nf4"]


def job_of(family, format, **sizes):
    return Job(config(family), seq=32, adapt=adapted, experts=format, **sizes)


def bytes_of(parameter):
    """What a parameter of a real model takes, packed or not."""
    held = packed_in(parameter)
    return parameter.nbytes if held is None else held.codes.nbytes + held.scales.nbytes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_real_model_and_only_adapters_have_gradients_and_states(family, format):
    options = {} if format is None else {"quantization_config": ExpertsQuantConfig(format)}
    real = adapted(AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16, **options))
    found = simulate(job_of(family, format), H100)
    assert found.held["parameters"] == sum(map(bytes_of, real.parameters()))
    learning = [parameter for parameter in real.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learning} == {torch.float32}  # which PEFT makes of them
    assert found.held["gradients"] == sum(parameter.nbytes for parameter in learning)
    assert found.held["optimizer states"] == 2 * found.held["gradients"]
    pieces = found.plan.layout.memory.pieces
    buffers = sum(buffer.nbytes for buffer in real.buffers())
    assert pieces["parameters"] == found.held["parameters"] + buffers
    if format is not None:
        largest = max(p.numel() for p in real.parameters() if packed_in(p) is not None)
        assert pieces["decoded experts"] == 2 * largest
    assert ("decoded experts" in pieces) == (format is not None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("memory", [2**20, 2**40], ids=["large", "small"])
def test_the_rules_of_ranks_are_what_the_real_layout_does_with_adapters_behind_it(memory, format):
    layouts = [{}, {"ep_size": 2}, {"ep_size": 4}, {"ep_size": 2, "dp_replicate_size": 2}, {"dp_replicate_size": 4}]
    for family, sizes in [("qwen3_moe", sizes) for sizes in layouts] + [("gpt_oss", {"ep_size": 2})]:
        job = job_of(family, format, world_size=4, per_node=2, **sizes)
        real, total = real_shares(job, memory)
        assert total == sum(parameter.numel() for parameter in model_of(replace(job, adapt=None)).parameters())
        planned = shares_by_rule(model_of(job), job, memory)
        assert {name: replace(share, unit="") for name, share in planned.items()} == {
            name: replace(share, unit="") for name, share in real.items()
        }, sizes
        whole = {name: p.numel() for name, p in model_of(job).named_parameters()}
        ep = sizes.get("ep_size", 1)
        for name, share in real.items():
            if "lora_" in name:
                assert share.elements == whole[name] and share.copies.size == 4
            elif ".experts." in name and "bias" not in name and format is not None:
                assert share.elements == whole[name] // ep and not share.gathered


@pytest.mark.slow
def test_the_page_of_adapters_has_what_is_planned():
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (bf16|nf4|mxfp4) \| ([\d.]+) \| \d+ GB", page, re.MULTILINE)
    assert len(rows) == 4
    for model, format, gib in rows:
        layers = {"qwen3-30b-a3b": 48, "gpt-oss-20b": 24}[model]
        experts = None if format == "bf16" else format
        job = Job(config_of(WORKS[model], layers), seq=4096, recompute=True, adapt=adapted, experts=experts)
        assert memory_of(job, trace(job, H100.memory)).needed / GIB == pytest.approx(float(gib), rel=0.01)


def test_a_rank_with_half_of_the_experts_holds_and_decodes_half():
    alone, two = (job_of("qwen3_moe", "nf4", world_size=size, ep_size=size) for size in (1, 2))
    one, other = (memory_of(job, trace(job, H100.memory)).pieces["decoded experts"] for job in (alone, two))
    assert one == 2 * other


def test_tensor_parallelism_of_experts_in_4_bits_is_not_planned():
    job = job_of("qwen3_moe", "nf4", world_size=2, tp_size=2)
    for plan in (trace, lambda job, memory: simulate(job, H100)):
        with pytest.raises(ValueError, match="cannot be split by tp_size=2"):
            plan(job, H100.memory)
