"""Layers that recompute pieces: loss and gradients bit for bit those of layers that keep all, and what is refused."""

import functools

import pytest
import torch
import transformers

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.tiny import tiny_config, tiny_model
from expertmesh.kernels.recompute import save_less
from expertmesh.memory.offload import Offload
from expertmesh.parallel.setup import DistributedSetup, recompute

POLICIES = "light", "experts", {"experts": 1}, {"full": 1}, "offload", {"offload": 1}


def step(model: torch.nn.Module, packed: bool = True) -> list[torch.Tensor]:
    """Loss and gradients of a row of two documents, or of one."""
    ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    rows = {"position_ids": torch.cat([torch.arange(7), torch.arange(9)])[None]} if packed else {}
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **rows).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_next"])
def test_loss_and_gradients_are_bit_for_bit_those_without(family):
    model, packed = fuse(tiny_model(family)).train(), family != "qwen3_next"  # whose mixers know no documents
    want = step(model, packed)
    for policy in POLICIES:
        recompute(model, policy)
        assert_equal(step(model, packed), want)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert_equal(step(model, packed), want)


def test_adapters_on_experts_and_attention():
    peft = pytest.importorskip("peft")
    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, init_lora_weights=False, **targets)
    model = peft.get_peft_model(fuse(tiny_model("qwen3_moe")), config).train()
    want = step(model)
    for policy in POLICIES:
        recompute(model, policy)
        assert_equal(step(model), want)


def test_the_first_layers_have_the_level_and_others_the_one_below():
    model = fuse(tiny_model("qwen3_moe"))

    def levels() -> list[str]:
        functions = [
            layer.gradient_checkpointing and layer._gradient_checkpointing_func for layer in model.model.layers
        ]
        kinds = {Offload: "offload", functools.partial: "full", bool: "none"}
        return [f.args[0] if getattr(f, "func", None) is save_less else kinds[type(f)] for f in functions]

    model.activation_checkpointing_enable({"recompute": {"full": 2}})
    assert levels() == ["full", "full", "experts"]
    model.activation_checkpointing_enable({"recompute": {"light": 1}})
    assert levels() == ["light", "none", "none"]
    model.activation_checkpointing_enable({"recompute": {"offload": 1}})
    assert levels() == ["offload", "full", "full"]
    DistributedSetup(activation_checkpointing={"experts": 1}).apply_to(model)
    assert levels() == ["experts", "light", "light"]
    model.gradient_checkpointing_enable()  # as ever
    assert levels() == ["full"] * 3


def test_compiled_layers_are_called_whole():
    model = fuse(tiny_model("qwen3_moe")).train()
    want = step(model)
    recompute(model, "experts")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert_equal(step(model), want)


def test_a_model_without_a_piece_is_refused():
    with pytest.raises(ValueError, match="no fusion"):
        recompute(fuse(tiny_model("qwen3_moe"), fused={"experts": False}), "experts")
    bare = dict.fromkeys(("rms_norm", "swiglu"), False)
    with pytest.raises(ValueError, match="no fusion"):
        recompute(fuse(tiny_model("mixtral"), fused=bare), "light")
    with pytest.raises(ValueError, match="needs a fused model"):
        recompute(tiny_model("mixtral"), "light")
    dense = transformers.Qwen3Config(**tiny_config("qwen3_moe").to_dict() | {"architectures": None})
    with pytest.raises(ValueError, match="needs a fused model"):
        recompute(AutoModelForCausalLM.from_config(dense), {"light": 1})


@pytest.mark.parametrize(
    ("options", "why"), [({"every_n_layers": 2}, "every_n_layers"), ({"offload": True}, "offload")], ids=str
)
def test_transformers_own_ways_to_keep_more_are_not_mixed_with_ours(options, why):
    enable = functools.partial(fuse(tiny_model("qwen3_moe")).activation_checkpointing_enable, {"recompute": "light"})
    with pytest.raises(ValueError, match=why):
        enable(**options)
