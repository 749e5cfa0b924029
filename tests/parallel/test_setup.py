"""A `DistributedSetup` fits the ranks or says what to change; NeMo's keys are mapped or refused, none is dropped."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import replicate

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.tiny import tiny_config
from expertmesh.kernels.recompute import is_policy
from expertmesh.nemo import NeMoAutoModelForCausalLM
from expertmesh.parallel import setup as setups
from expertmesh.parallel.clip import clip_grad_norm
from expertmesh.parallel.setup import DistributedSetup, create_distributed_setup_from_config

LAYOUTS = [
    (sizes, world)
    for world in (1, 2, 4, 6, 8, 16)
    for tp in (1, 2)
    for replicas in (1, 2)
    for ep in (1, 2, 4, 8)
    if world % (tp * replicas) == 0 and (ep == 1 or ((world // replicas) % ep == 0 and ep % tp == 0))
    for sizes in [{"tp_size": tp, "dp_replicate_size": replicas, "ep_size": ep}]
]


@pytest.mark.parametrize(("sizes", "world"), LAYOUTS, ids=str)
def test_sizes_that_fit_become_the_meshes_of_transformers(sizes, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    setup = DistributedSetup(**sizes)
    config = setup.to_transformers()
    assert setup.dp_size == config.dp_size == world // sizes["tp_size"]
    assert config.pp_size * config.dp_replicate_size * config.fsdp_size * config.tp_size == world
    assert config.dp_replicate_size * config.efsdp_size * config.ep_size == world
    assert config.ep_implementation == "expertmesh"


@pytest.mark.parametrize(
    ("sizes", "says"),
    {
        "tp": ({"tp_size": 3}, "tp_size=3 does not divide the 8 ranks. Set tp_size to 1, 2, 4 or 8."),
        "dp": ({"dp_size": 3, "tp_size": 2}, "Leave dp_size out (it then is 4), or start 6 ranks."),
        "replicas": ({"dp_replicate_size": 3}, "Set dp_replicate_size to 1, 2, 4 or 8."),
        "ep": ({"ep_size": 3}, "Set ep_size to 1, 2, 4 or 8."),
        "ep over replicas": ({"ep_size": 8, "dp_replicate_size": 2}, "Set ep_size to 1, 2 or 4."),
        "ep below tp": ({"ep_size": 2, "tp_size": 4}, "Set ep_size to 1, 4 or 8."),
        "zero": ({"ep_size": 0}, "ep_size must be a whole number from 1 to 1,000,000, not 0."),
        "text": ({"tp_size": "2"}, "tp_size must be a whole number from 1 to 1,000,000, not '2'."),
        "strategy": ({"strategy": "fsdp3"}, "strategy must be 'fsdp2'"),
        "dispatch": ({"dispatch": "push"}, "dispatch must be one of auto, all_to_all, gather, not 'push'."),
    }.values(),
)
def test_sizes_that_do_not_fit_are_errors_that_name_what_fits(sizes, says):
    with pytest.raises(ValueError) as error:
        DistributedSetup(**sizes, world_size=8)
    assert says in str(error.value)


def test_the_dispatch_is_named_to_transformers():
    setup = create_distributed_setup_from_config({"dispatch": "gather"}, world_size=1)
    assert setup.dispatch == "gather" and setup.to_transformers().ep_implementation == "expertmesh-gather"


@pytest.mark.parametrize(
    ("gpus", "per_node", "ep_size", "dispatch"),
    [(True, 8, 2, "gather"), (True, 8, 4, "gather"), (True, 6, 6, "gather"), (True, 8, 8, "gather"),
     (True, 24, 12, "all_to_all"), (True, 4, 8, "all_to_all"), (True, 1, 2, "all_to_all"), (True, 6, 4, "all_to_all"),
     (False, 8, 2, "all_to_all")],
)  # fmt: skip
def test_gather_is_chosen_for_few_gpus_of_one_node(monkeypatch, gpus, per_node, ep_size, dispatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", "24")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    names = {"gather": "expertmesh-gather", "all_to_all": "expertmesh"}
    for asked, chosen in (("auto", dispatch), *zip(names, names, strict=True)):
        made = DistributedSetup(ep_size=ep_size, dispatch=asked).to_transformers()
        assert made.ep_implementation == names[chosen]


def test_a_stock_model_refuses_our_dispatch_instead_of_ignoring_it():
    with pytest.raises(ValueError, match="leave dispatch='gather' out"):
        AutoModelForCausalLM.from_config(
            tiny_config("qwen3_moe"), fused=False, distributed_setup={"dispatch": "gather", "ep_size": 1}
        )


def test_a_setup_for_other_ranks_than_run_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="is for 8 ranks, but 2 are running"):
        DistributedSetup(world_size=8).to_transformers()


def test_the_picture_shows_who_holds_what():
    setup = DistributedSetup(ep_size=4, tp_size=2, world_size=8)
    assert str(setup).splitlines() == [
        "8 ranks: dp_size=4 (dp_replicate_size=1 x fsdp 4), tp_size=2, ep_size=4",
        "         rank  0 1 2 3 4 5 6 7",
        "        batch  0 0 1 1 2 2 3 3",
        "      tp part  0 1 0 1 0 1 0 1",
        "      experts  0 1 2 3 0 1 2 3",
        "shard of them  0 0 0 0 1 1 1 1",
    ]


def test_the_section_of_a_nemo_script():
    setup = create_distributed_setup_from_config({"strategy": "fsdp2", "ep_size": 8}, world_size=8)
    assert setup == DistributedSetup(ep_size=8, dp_size=8, world_size=8)
    section = {
        "strategy": "fsdp2",
        "dp_size": None,
        "tp_size": 1,
        "cp_size": 1,
        "pp_size": 1,
        "ep_size": 4,
        "dp_replicate_size": 2,
        "sequence_parallel": False,
        "tp_plan": None,
        "patch_is_packed_sequence": True,
        "activation_checkpointing": True,
        "moe": {"ignore_router_for_ac": True, "reshard_after_forward": False, "wrap_outer_model": True},
    }
    want = DistributedSetup(
        ep_size=4, dp_replicate_size=2, activation_checkpointing=True, reshard_experts=False, world_size=8
    )
    assert create_distributed_setup_from_config(section, world_size=8) == want
    assert create_distributed_setup_from_config(world_size=8, **section) == want


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"ep_sise": 2}, "Did you mean 'ep_size'?"),
        ({"moe": {"reshard_after_foward": True}}, "Did you mean 'moe.reshard_after_forward'?"),
        ({"pp_size": 2}, "pp_size=2 is NeMo AutoModel's and not supported here: leave it out."),
        ({"cp_size": 2}, "cp_size=2"),
        ({"pipeline": {"pp_schedule": "1f1b"}}, "There is no distributed setting 'pipeline'. Settings:"),
        ({"strategy": "ddp"}, "dp_replicate_size"),
        ({"strategy": "megatron_fsdp"}, "strategy must be 'fsdp2'"),
        ({"sequence_parallel": True}, "sequence_parallel=True"),
        ({"activation_checkpointing": "selective"}, "activation_checkpointing must be true, false, light"),
        ({"timeout_minutes": 0}, "timeout_minutes must be a number of minutes above 0, not 0"),
        ({"moe": {"lm_head_precision": "float32"}}, "There is no distributed setting 'moe.lm_head_precision'"),
        (
            {"moe": {"reshard_after_forward": "no"}},
            "true or false (a section says moe.reshard_after_forward), not 'no'",
        ),
    ],
    ids=str,
)
def test_no_setting_is_dropped_in_silence(section, says):
    with pytest.raises(ValueError) as error:
        create_distributed_setup_from_config(section, world_size=8)
    assert says in str(error.value)


STRANGE = [
    None, True, False, 0, 1, 2, 3, -1, 8, 10**12, 1.0, float("nan"), float("inf"), "2", "false", "full", "gather", "",
    [], [2], {}, {"reshard_after_forward": "false"}, {2: 3}, (1,), b"2", object(), torch.ones(2), "fsdp2",
]  # fmt: skip


def test_any_section_is_a_setup_of_proper_values_or_a_value_error_that_names_a_key():
    draw, made = random.Random(0), 0
    ours = ["moe", *(key for key in setups._OURS if "." not in key)]
    known = [*ours, *(key for key in setups._THEIRS if "." not in key), "pipeline", "tp_plan"]
    for _ in range(1000):
        keys = draw.choices([*known, *ours * 4, "ep_sise", 3, None, ("a",)], k=draw.randint(1, 3))
        section = {key: draw.choice(STRANGE) for key in keys}
        try:
            setup = create_distributed_setup_from_config(section, world_size=draw.choice((8, 8, 8, 2, 10**12, "8")))
        except ValueError as error:
            assert any(str(key) in str(error) for key in (*section, "world_size")), (section, error)
            continue
        made += 1
        assert type(setup.reshard_experts) is bool and is_policy(setup.activation_checkpointing)
        assert all(type(getattr(setup, name)) is int for name in ("ep_size", "tp_size", "dp_size", "world_size"))
    assert made > 10
    for section in ([], 3, "fsdp2", {1}):
        with pytest.raises(ValueError, match="must be a dict of settings"):
            create_distributed_setup_from_config(section)


def test_one_process_takes_a_setup_too_and_initialises_by_the_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(
            NeMoAutoModelForCausalLM.from_config(tiny_config("deepseek_v3"), distributed_setup={"ep_size": 1})
        )
    first, again, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert all(torch.isfinite(b).all() for b in models[0].buffers())
    stock = NeMoAutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    for name, param in stock.named_parameters():
        torch.testing.assert_close(first[name].std(), param.std(), rtol=0.5, atol=1e-3)
    for (name, want), (_, got) in zip(stock.named_buffers(), models[0].named_buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_a_setup_and_a_device_map_together_are_an_error():
    with pytest.raises(ValueError, match="leave device_map= out"):
        NeMoAutoModelForCausalLM.from_config(tiny_config("mixtral"), distributed_setup={}, device_map="auto")
    with pytest.raises(TypeError, match="DistributedSetup or a dict, not int"):
        NeMoAutoModelForCausalLM.from_config(tiny_config("mixtral"), distributed_setup=8)


@pytest.mark.parametrize("max_norm", [0.1, 1e9], ids=["clips", "leaves"])
def test_clipping_without_ranks_equals_torch(max_norm):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_grad_norm(iter(ours), max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert clip_grad_norm([torch.nn.Parameter(torch.ones(1))], 1.0) == 0


@pytest.mark.parametrize(
    "part",
    [lambda m: m, lambda m: torch.nn.Sequential(torch.nn.Linear(1, 1), m), lambda m: m.model],
    ids=["model", "inside another module", "base model"],
)
def test_several_gpus_in_one_process_are_an_error_that_says_how_to_start_ranks(monkeypatch, part):
    """By nn.DataParallel's own way to its copies, whose weights alone are faked: they need GPUs."""
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    module = part(model)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, fake in {
        "_get_device_index": lambda device, optional: device,
        "_broadcast_coalesced_reshape": lambda tensors, devices, detach=False: [tensors for _ in devices],
    }.items():
        monkeypatch.setitem(replicate.__globals__, name, fake)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 4 script\.py.*CUDA_VISIBLE_DEVICES=0"):
        replicate(module, range(4))


def test_stock_models_are_copied_to_several_gpus_as_ever():
    stock = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), fused=False)
    assert type(stock._replicate_for_data_parallel()) is type(stock)


@pytest.mark.parametrize("reshard", [True, False])
def test_experts_are_freed_behind_the_forward_as_asked_and_dense_layers_are_left_alone(monkeypatch, reshard):
    class Sharded(torch.nn.Module):
        asked: bool | None = None

        def set_reshard_after_forward(self, on):
            self.asked = on

        def _get_fsdp_state(self):
            return SimpleNamespace()

    class Model(torch.nn.ModuleList):
        base_model = property(lambda self: self)

    monkeypatch.setattr("expertmesh.parallel.layout.FSDPModule", Sharded)
    monkeypatch.setattr("expertmesh.parallel.setup.current_world_size", lambda: 2)
    monkeypatch.setattr("expertmesh.parallel.setup.timeouts", SimpleNamespace())
    dense, experts = Sharded(), Sharded()
    experts._is_expert_parallel = True
    DistributedSetup(reshard_experts=reshard, world_size=2).apply_to(Model([dense, experts]))
    assert experts.asked is reshard and dense.asked is None
