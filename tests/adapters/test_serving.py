"""Adapters as servers read them: nothing is lost in silence. Public bugs of servers stand by their numbers.

The servers are not installed here: their documented names are tested, and that their own tables are asked where they
are.
"""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from expertmesh import cli
from expertmesh.adapters.files import AdapterError
from expertmesh.adapters.layouts import read_adapter
from expertmesh.adapters.slots import lost, rewrite
from tests.adapters.test_merge import (
    FAMILIES,
    GATED,
    QKVO,
    TARGETS,
    adapter_of,
    base_of,
    copied,
    made,
    same_deltas,
    tensors_of,
    wrapped,
)
from tests.models import saved

MIXER = ["mixer.experts.up_proj", "mixer.experts.down_proj"]


def experts_only(family):
    return made(family, target_modules=(), target_parameters=tuple(MIXER if family == "nemotron_h" else GATED))[0]


def names(folder):
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors_of(folder)}


@pytest.mark.parametrize("reader", ["vllm", "sglang", "peft"])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_what_is_written_for_a_server_has_a_slot_and_the_same_products(family, reader, tmp_path):
    targets, model = dict(TARGETS[family]), base_of(family)
    targets["target_parameters"] = [name for name in targets["target_parameters"] if "gate.w" not in name]
    if reader == "sglang":  # which adapts no routers, and no experts of GPT-OSS
        targets["target_parameters"] = [name for name in targets["target_parameters"] if "router" not in name]
        if family == "gpt_oss":
            targets["target_parameters"] = None
    folder, _ = made.__wrapped__(family, **targets)
    rewrite(folder, model, tmp_path / "served", reader)
    assert same_deltas(read_adapter(tmp_path / "served", model), read_adapter(folder, model), model)
    if reader != "peft":
        told, count, source = lost(tmp_path / "served", model, reader)
        assert not told and count == len(names(tmp_path / "served")) and source.startswith("documented names")
    written = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    ranks = {value.shape[0] for key, value in tensors_of(tmp_path / "served").items() if "lora_A" in key}
    assert reader == "peft" or family == "gpt_oss" or ranks == {written["r"]}


@pytest.mark.parametrize(
    ("family", "server", "expected"),
    [
        ("qwen3_moe", "vllm", "model.layers.0.mlp.experts.3.gate_proj"),
        ("deepseek_v3", "sglang", "model.layers.1.mlp.experts.3.up_proj"),
        ("mixtral", "vllm", "model.layers.0.block_sparse_moe.experts.3.w1"),
        ("nemotron_h", "vllm", "backbone.layers.1.mixer.experts.3.up_proj"),
        ("nemotron_h", "sglang", "backbone.layers.1.mixer.experts.3.gate_proj"),
        ("gpt_oss", "vllm", "model.layers.0.mlp.experts.base_layer"),
    ],
)
def test_the_names_are_those_of_the_published_checkpoint(family, server, expected, tmp_path):
    rewrite(experts_only(family), base_of(family), tmp_path / "served", server)
    assert expected in names(tmp_path / "served")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_vllm_makes_of_its_file_is_the_change_that_peft_makes(family, tmp_path):
    """By its own arithmetic (pack_moe, _stack_moe_lora_weights), against `get_delta_weight`."""
    model = wrapped(family, target_modules=(), target_parameters=MIXER if family == "nemotron_h" else GATED)
    model.save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", base_of(family), tmp_path / "served", "vllm")
    tensors, config = tensors_of(tmp_path / "served"), json.loads((tmp_path / "served/adapter_config.json").read_text())
    scaling, compared = config["lora_alpha"] / config["r"], 0
    for path, module in model.base_model.model.named_modules():
        if type(module).__name__ != "ParamWrapper":
            continue
        delta = module.get_delta_weight("default").detach()
        experts, name = path.replace(".base_layer", ""), module.parameter_name
        if family == "nemotron_h":
            experts = experts.replace("model.", "backbone.")
        if family == "gpt_oss":
            where = f"base_model.model.{experts}{'.base_layer' if name == 'gate_up_proj' else ''}.lora_"
            A, B = tensors[f"{where}A.weight"], tensors[f"{where}B.weight"]
            B_EOr = B.reshape(B.shape[0], -1, 8).permute(2, 0, 1)
            served = (B_EOr @ A.reshape(8, -1, A.shape[1])).transpose(1, 2)
        else:
            parts = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
            pairs = [[f"base_model.model.{experts}.{e}.{part}.lora_" for part in parts] for e in range(8)]
            products = [[tensors[f"{pair}B.weight"] @ tensors[f"{pair}A.weight"] for pair in of_e] for of_e in pairs]
            served = torch.stack([torch.cat(of_e) for of_e in products])
        torch.testing.assert_close(scaling * served, delta, rtol=1e-5, atol=1e-6)
        compared += 1
    assert compared == 4


@pytest.mark.parametrize(("server", "bug"), [("vllm", "vllm#41384"), ("sglang", "sglang#25528")])
def test_one_pair_for_all_experts_is_told_where_the_server_drops_it(server, bug, tmp_path):
    folder, _ = adapter_of("qwen3_moe")
    told = {one.path: one.why for one in lost(folder, base_of("qwen3_moe"), server)[0]}
    for layer in (0, 2):
        for path in ("experts.base_layer", "experts"):
            assert "one pair for all experts" in told[f"model.layers.{layer}.mlp.{path}"], bug
    assert not [path for path in told if "self_attn" in path]


def test_vllm_47088_experts_without_a_gate_need_names_of_their_own(tmp_path):
    model, folder = base_of("nemotron_h"), experts_only("nemotron_h")
    assert len(lost(folder, model, "vllm")[0]) == len(names(folder))
    rewrite(folder, model, tmp_path / "vllm", "vllm")
    (one, *_) = lost(tmp_path / "vllm", model, "sglang")[0]
    assert "which SGLang looks for as gate_proj" in one.why


def test_vllm_41754_what_servers_load_and_never_use_is_told(tmp_path):
    folder, _ = made("deepseek_v3", target_modules=("kv_b_proj", "o_proj"))
    told = lost(folder, base_of("deepseek_v3"), "vllm")[0]
    assert len(told) == 3 and all(one.path.endswith("kv_b_proj") and "never used" in one.why for one in told)
    assert not lost(folder, base_of("deepseek_v3"), "sglang")[0]
    with pytest.raises(AdapterError, match="vllm would not apply all.*kv_b_proj.*expertmesh merge"):
        rewrite(folder, base_of("deepseek_v3"), tmp_path / "served", "vllm")
    assert not (tmp_path / "served").exists()


def test_vllm_stops_at_half_of_a_pair_of_experts(tmp_path):
    model = base_of("gpt_oss")
    folder, _ = made("gpt_oss", target_modules=(), target_parameters=("mlp.experts.down_proj",))
    assert "lacks experts.base_layer" in lost(folder, model, "vllm")[0][0].why
    rewrite(folder, model, tmp_path / "both", "vllm")
    assert not lost(tmp_path / "both", model, "vllm")[0]
    assert same_deltas(read_adapter(tmp_path / "both", model), read_adapter(folder, model), model)


@pytest.mark.parametrize("how", ["rank_pattern", "use_rslora"])
def test_a_scaling_that_servers_do_not_read_is_told_and_mended(how, tmp_path):
    changes = {"use_rslora": True} if how == "use_rslora" else {"rank_pattern": {"q_proj": 2}}
    folder, _ = made.__wrapped__("qwen3_moe", target_modules=QKVO, **changes)
    model = base_of("qwen3_moe")
    told = {server: lost(folder, model, server)[0] for server in ("vllm", "sglang")}
    if how == "use_rslora":
        assert not told["vllm"] and "scaling 3 and would be served with 1.5" in told["sglang"][0].why
    else:
        assert "scaling 3 and would be served with 1.5" in told["vllm"][0].why and "rank 2" in told["sglang"][0].why
    for server in told:
        rewrite(folder, model, tmp_path / server, server)
        assert not lost(tmp_path / server, model, server)[0]
        assert same_deltas(read_adapter(tmp_path / server, model), read_adapter(folder, model), model)


def test_sglang_gets_the_query_and_value_that_it_stops_without(tmp_path):
    folder, _ = made("qwen3_moe", target_modules=("q_proj",))
    assert "lacks its q_proj or v_proj" in lost(folder, base_of("qwen3_moe"), "sglang")[0][0].why
    rewrite(folder, base_of("qwen3_moe"), tmp_path / "served", "sglang")
    assert "model.layers.0.self_attn.v_proj" in names(tmp_path / "served")


def test_the_servers_own_tables_are_asked_where_it_can_be_imported(monkeypatch):
    def module(name, **content):
        made = ModuleType(name)
        vars(made).update(content, __spec__=SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, made)

    class Qwen3MoeForCausalLM:
        is_3d_moe_weight = True
        lora_skip_prefixes = ["model.layers.2."]

    for name in ("vllm", "vllm.lora", "vllm.model_executor", "vllm.model_executor.models"):
        module(name)
    registry = SimpleNamespace(_try_load_model_cls=lambda name: {"Qwen3MoeForCausalLM": Qwen3MoeForCausalLM}[name])
    module("vllm.model_executor.models.registry", ModelRegistry=registry)

    def parse(name, mapper):
        return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), True

    module("vllm.lora.utils", parse_fine_tuned_lora_name=parse)
    for name in ("sglang", "sglang.srt", "sglang.srt.lora"):
        module(name)
    module("sglang.srt.lora.utils", _KNOWN_LORA_TARGET_MODULES={"o_proj"})
    folder, model = adapter_of("qwen3_moe")[0], base_of("qwen3_moe")
    told, _, source = lost(folder, model, "vllm")
    assert source.startswith("vLLM's own") and told and all(".layers.2." in one.path for one in told)
    told, _, source = lost(folder, model, "sglang")
    assert source.startswith("SGLang's own") and {one.path.rpartition(".")[2] for one in told} >= {"q_proj", "gate"}
    assert not [one for one in told if one.path.endswith("o_proj")]


def test_the_commands_say_what_they_did(tmp_path, capsys):
    folder, base = str(experts_only("qwen3_moe")), str(saved("qwen3_moe"))
    assert cli.run(["check", folder, "--serve", "vllm", "--base", base]) == 1
    said = capsys.readouterr().out
    assert "model.layers.0.mlp.experts.base_layer is one pair for all experts" in said
    assert (
        "vllm, by its documented names (vllm is not installed): 0 of 4 adapted modules have a slot, 4 do not." in said
    )
    assert cli.run(["adapter", folder, "--for", "vllm", "-o", str(tmp_path / "served"), "--base", base]) == 0
    assert "read as rank-major" in capsys.readouterr().out
    assert cli.run(["check", str(tmp_path / "served"), "--serve", "vllm"]) == 0  # it names its base
    assert "48 of 48 adapted modules have a slot" in capsys.readouterr().out
    assert cli.run(["merge", str(tmp_path / "served"), "--output", str(tmp_path / "merged")]) == 0
    assert "read as per expert" in (said := capsys.readouterr().out) and "weights were read back" in said


def damaged(what, folder):
    """An adapter with one fault; what is said of it."""
    source, tensors = adapter_of("qwen3_moe")[0], tensors_of(adapter_of("qwen3_moe")[0])
    first = next(key for key in tensors if "q_proj.lora_A" in key)
    if what == "pickled":
        copied(source, folder)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        return "a pickle"
    if what == "cut short":
        copied(source, folder)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return "is damaged"
    if what == "no configuration":
        copied(source, folder)
        (folder / "adapter_config.json").unlink()
        return "has no adapter_config.json"
    if what == "broken configuration":
        copied(source, folder)
        (folder / "adapter_config.json").write_text("{")
        return "cannot be read as a LoRA configuration"
    if what == "another family":
        shutil.copytree(adapter_of("deepseek_v3")[0], folder)
        return "cannot be read"
    changed, config, said = {
        "rank": (tensors, {"r": 3}, "has the shape"),
        "shape": (tensors | {first: torch.zeros(4, 33)}, {}, "has the shape (4, 33)"),
        "half": ({key: value for key, value in tensors.items() if key != first}, {}, "lora_B of"),
        "nothing": ({}, {}, "holds no tensors"),
        "not finite": (tensors | {first: torch.full((4, 32), torch.nan)}, {}, "not finite"),
        "unknown module": (tensors | {first.replace("q_proj", "z_proj"): torch.zeros(4, 32)}, {}, "lora_A of"),
        "dora": (tensors, {"use_dora": True}, "more than a low-rank product"),
        "pissa": (tensors, {"init_lora_weights": "pissa"}, "changes the base"),
        "ia3": (tensors, {"peft_type": "IA3"}, "kind IA3"),
        "unknown layout": (tensors, {"lora_B_layout": "diagonal"}, "which is unknown"),
    }[what]
    copied(source, folder, changed, **config)
    return said


FAULTS = [
    "pickled", "cut short", "no configuration", "broken configuration", "another family", "rank", "shape", "half",
    "nothing", "not finite", "unknown module", "dora", "pissa", "ia3", "unknown layout",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_cannot_be_read_is_refused_in_one_paragraph(fault, tmp_path, capsys):
    said = damaged(fault, tmp_path / "adapter")
    capsys.readouterr()
    base, out = str(saved("qwen3_moe")), tmp_path / "out"
    for verb in (["merge", "-o", str(out)], ["adapter", "--for", "vllm", "-o", str(out)], ["check", "--serve", "vllm"]):
        assert cli.run([verb[0], str(tmp_path / "adapter"), *verb[1:], "--base", base]) == 2
        error = capsys.readouterr().err
        assert error.startswith("expertmesh: error: ") and error.count("\n") == 1 and said in error
        assert not out.exists()


@pytest.mark.parametrize("fault", ["unnamed", "absent", "no weights", "cut short", "quantized", "the output"])
def test_a_base_that_cannot_be_merged_into_is_refused_in_one_paragraph(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(saved("qwen3_moe"), base)
    weights = base / "model.safetensors"
    if fault == "no weights":
        weights.unlink()
    if fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    if fault == "quantized":
        config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
        (base / "config.json").write_text(json.dumps(config))
    named = {"unnamed": [], "absent": ["--base", "nobody/nothing"]}.get(fault, ["--base", str(base)])
    out = base if fault == "the output" else out
    adapter = copied(adapter_of("qwen3_moe")[0], tmp_path / "adapter", base_model_name_or_path=None)
    assert cli.run(["merge", str(adapter), "--output", str(out), *named]) == 2
    error = capsys.readouterr().err
    assert error.startswith("expertmesh: error: ") and error.count("\n") == 1
    assert fault == "the output" or not out.exists()
