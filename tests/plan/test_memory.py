"""What a plan says of memory is what a real step keeps, and what real shards are."""

import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from expertmesh import AutoModelForCausalLM, backends
from expertmesh.bench.tiny import FAMILIES as FAMILIES_OF_TINY_MODELS
from expertmesh.bench.tiny import tiny_config
from expertmesh.bench.works import WORKS, config_of
from expertmesh.kernels import sink_attention
from expertmesh.kernels.recompute import LEVELS
from expertmesh.memory import states as states_of_adamw
from expertmesh.memory.states import STATES, bytes_kept, form_of
from expertmesh.parallel.setup import recompute
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.memory import OPTIMIZERS, Job, memory_of, model_of, trace
from expertmesh.plan.speed import STATES as STATES_OVER_PCIE
from expertmesh.plan.speed import speed_of

SEQ = 128
#: so wide that positions and ids, which a recomputed layer keeps past autograd, hardly count
WIDE = {"hidden_size": 1024, "vocab_size": 256, "intermediate_size": 64}
FAMILIES = {
    "qwen3_moe": WIDE | {"moe_intermediate_size": 64, "head_dim": 32},
    "gpt_oss": WIDE | {"head_dim": 32},
    # values as wide as keys: of others the CPU keeps more than a GPU
    "deepseek_v3": WIDE | {"moe_intermediate_size": 64, "v_head_dim": 24},
    "nemotron_h": WIDE | {"moe_intermediate_size": 64, "head_dim": 32, "moe_latent_size": 64},
}


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd saves in a forward on a GPU's way, each storage once, without parameters and buffers. Kernels
    are not launched, which changes values alone.
    """
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    launches: list[str] = []
    watching = (lambda kernel, *_, **__: launches.append(kernel)), 140 * 2**30
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with (
        mock.patch.object(backends, "watching", watching),
        mock.patch.object(sink_attention, "_is_for_flash_attention_2", lambda *_: True),
        mock.patch.object(sink_attention, "flash_forward", lambda q, *_: (torch.zeros_like(q), q[..., 0].t() * 0)),
        saving,
    ):
        loss = model(input_ids=ids, labels=ids).loss
    assert launches
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_plan_says_is_kept_is_what_autograd_saves(family):
    config, less = tiny_config(family, **FAMILIES[family]), []
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    ids = torch.randint(3, 256, (1, SEQ), generator=torch.Generator().manual_seed(0))
    for policy in (False, "light", {"experts": 2}, True):
        recompute(model, policy)
        real = saved_bytes(model, ids)
        planned = trace(Job(config, seq=SEQ, recompute=policy, dtype=torch.float32), 140 * 2**30)
        assert sum(planned.kept.values()) == pytest.approx(real, rel=0.05), planned.kept
        less.append(real)
    assert less == sorted(less, reverse=True) and len({*less}) == 4


def test_what_a_layer_of_qwen3_keeps_of_a_token_is_what_the_docs_say():
    """docs/train.md: bytes of a token in a layer of Qwen3-30B-A3B."""
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    said = {level: int(size.replace(",", "")) for level, size in re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", text, re.M)}
    for level in LEVELS:
        policy = False if level == "none" else level
        jobs = [Job(config_of(WORKS["qwen3-30b-a3b"], layers), seq=4096, recompute=policy) for layers in (1, 2)]
        one, two = (sum(trace(job, 140 * 2**30).kept.values()) for job in jobs)
        assert (two - one) / 4096 == pytest.approx(said[level], abs=1), level


def test_gradients_that_are_released_never_stand_together():
    config = tiny_config("qwen3_moe")
    held, gone = (trace(Job(config, seq=4, released=released), 140 * 2**30) for released in (False, True))
    size = sum(elements * size for elements, size, _ in held.parameters.values())
    assert held.peak["gradients"] == pytest.approx(size, rel=0.2) and "gradients" not in gone.peak


def test_states_are_counted_by_the_bytes_of_an_optimizer():
    config = tiny_config("qwen3_moe")
    found = trace(Job(config, seq=32), 140 * 2**30)
    elements = sum(elements for elements, _, _ in found.parameters.values())
    for optimizer, size in {"adamw": 4, "adamw-float32": 12, "adamw-8bit": 2 + 8 / 256, "sgd": 0}.items():
        assert memory_of(Job(config, optimizer=optimizer), found).pieces["optimizer states"] == int(elements * size)


def test_states_of_large_weights_lie_on_the_host_and_their_way_takes_time(monkeypatch):
    job = Job(tiny_config("qwen3_moe"), seq=32, optimizer="adamw-8bit", released="running")
    away, found = replace(job, offloaded=True), trace(job, 140 * 2**30)
    assert memory_of(away, found) == memory_of(job, found), "no weight is large enough"
    monkeypatch.setattr(states_of_adamw, "LARGE", 2048)
    all_here, here = memory_of(job, found), memory_of(away, found)
    far, kind = here.host["optimizer states"], "optimizer and clipping"
    assert 0 < far < all_here.pieces["optimizer states"]
    assert here.pieces["optimizer states"] + far == pytest.approx(all_here.pieces["optimizer states"], abs=99)
    once, apart = (speed_of(one, found, GPUS["h200"]).seconds for one in (job, away))
    assert apart[STATES_OVER_PCIE] == pytest.approx(far / GPUS["h200"].host, rel=0.01) and apart[kind] < once[kind]


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_memory_states_are_counted_as_adamw_counts_them(states, dtype):
    job = Job(tiny_config("qwen3_moe", hidden_size=512, moe_intermediate_size=256), 1, 32, dtype=dtype)
    parameters = list(model_of(job).parameters())
    real = sum(bytes_kept(p, form_of(p, states)) - p.nbytes for p in parameters)
    planned = sum(p.numel() * OPTIMIZERS[f"adamw-{states}"](p.element_size()) for p in parameters)
    assert planned == pytest.approx(real, rel=0.03)


def test_modules_for_multi_token_prediction_of_a_checkpoint_count_as_weights():
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    without, kept = (trace(Job(config, seq=32, mtp=mtp), 140 * 2**30) for mtp in (False, True))
    more = kept.parameters.keys() - without.parameters.keys()
    assert more and not any(kept.parameters[name][2] for name in more)
    assert sum(kept.kept.values()) == sum(without.kept.values())


@pytest.mark.parametrize("family", FAMILIES_OF_TINY_MODELS)
def test_every_family_can_be_planned(family):
    assert trace(Job(tiny_config(family), seq=32, recompute=True), 140 * 2**30).kept["head"]
