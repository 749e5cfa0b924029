"""LoRA adapters merged into their base, in every layout that tools write, and proved; what does not fit is refused.

The adapters are PEFT's own, on stock models, with random factors. Public bugs stand by their names.
"""

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh.adapters import merge as merging
from expertmesh.adapters.files import Adapter, AdapterError
from expertmesh.adapters.layouts import EXPERT_MAJOR, RANK_MAJOR, read_adapter, skeleton
from expertmesh.adapters.merge import NotEqualError, merge, packed
from expertmesh.adapters.slots import rewrite
from expertmesh.bench.export import configurations, layout
from tests.models import load_stock, saved
from tests.weights.test_mxfp4 import published, value_of  # noqa: F401 (a fixture)
from tests.weights.test_quantized import checkpoints

IDS = torch.arange(3, 27).view(2, 12)
GATED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: attention, routed experts, routers and shared experts, as PEFT takes them
TARGETS = {
    "qwen3_moe": {"target_modules": QKVO, "target_parameters": [*GATED, "mlp.gate.weight"]},
    "gpt_oss": {"target_modules": QKVO, "target_parameters": [*GATED, "mlp.router.weight"]},
    "deepseek_v3": {
        "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
        "target_parameters": [*GATED, "mlp.gate.weight", "shared_experts.up_proj.weight"],
    },
    "nemotron_h": {
        "target_modules": [*QKVO, "in_proj", "fc1_latent_proj"],
        "target_parameters": ["mixer.experts.up_proj", "mixer.experts.down_proj", "shared_experts.up_proj.weight"],
    },
    "mixtral": {"target_modules": QKVO, "target_parameters": GATED},
}
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"]
_FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-adapters-")


def wrapped(family, **options):
    """A stock model with an adapter of PEFT's that does much."""
    model = peft.get_peft_model(load_stock(family), peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@functools.cache
def made(family, **options):
    """(folder of an adapter, logits of its base with it). Do not write into it."""
    folder = Path(_FOLDERS.name, f"{family}-{len(list(Path(_FOLDERS.name).iterdir()))}")
    model = wrapped(family, **options)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(folder)
    return folder, logits


@functools.cache
def adapter_of(family):
    """As `made`, with the family's `TARGETS`."""
    return made.__wrapped__(family, **TARGETS[family])


def copied(source, folder, tensors=None, **config):
    """A copy of an adapter, with other tensors, or with keys of its configuration changed."""
    shutil.copytree(source, folder)
    if tensors is not None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def base_of(family):
    return skeleton(transformers.AutoConfig.from_pretrained(saved(family)))


@torch.no_grad()
def logits_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def same_deltas(found, expected, model):
    """Whether two adapters add the same to every parameter."""
    names = found.changes.keys() | expected.changes.keys()
    shapes = {name: model.get_parameter(name).shape for name in names}
    both = [
        [a.delta(name, shapes[name]) if name in a.changes else torch.zeros(shapes[name]) for a in (found, expected)]
        for name in names
    ]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in both)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_an_ordinary_export_with_the_logits_of_base_and_adapter(family, tmp_path):
    folder, logits = adapter_of(family)
    proof = merge(folder, str(saved(family)), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)
    assert layout(tmp_path / "merged") == layout(saved(family))
    assert configurations(tmp_path / "merged") == configurations(saved(family))
    assert proof.error <= 1e-5 < 0.1 < proof.effect and proof.layout == RANK_MAJOR and proof.changed[1] == 4
    assert re.fullmatch(r"PEFT [\d.]+", proof.by)  # which has read the folder by itself
    assert sorted(path.name for path in (tmp_path / "merged").iterdir() if path.is_dir()) == []


def test_shards_dtypes_tokenizer_and_what_no_adapter_changes_stay(tmp_path):
    base, out = tmp_path / "base", tmp_path / "merged"
    load_stock("qwen3_moe", dtype=torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    proof = merge(adapter_of("qwen3_moe")[0], str(base), out)
    assert 1e-5 < proof.rounding < 0.1 and proof.error <= 1e-5
    names = {path.name for path in base.iterdir()}
    assert len(names) > 5 and {path.name for path in out.iterdir()} == names | {"SHA256SUMS"}
    for name in names - {"model.safetensors.index.json"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
            continue
        before, after = load_file(base / name), load_file(out / name)
        assert [(k, v.dtype, v.shape) for k, v in before.items()] == [(k, v.dtype, v.shape) for k, v in after.items()]
        for key in before:
            changed = any(part in key for part in ("_proj", "mlp.gate.")) and ".layers.1.mlp" not in key
            assert torch.equal(before[key], after[key]) != changed, key
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (base, out)]
    assert maps[0] == maps[1]


def test_a_router_that_models_keep_in_float32_stays_in_bfloat16_on_disk(tmp_path):
    """Transformers 5.24 loads DeepSeek V3's routers in float32, whatever the checkpoint has."""
    base = tmp_path / "base"
    shutil.copytree(saved("deepseek_v3", torch.bfloat16), base, ignore=shutil.ignore_patterns("SHA256SUMS"))
    weights = {key: value.bfloat16() for key, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter_of("deepseek_v3")[0], str(base), tmp_path / "merged")
    assert layout(tmp_path / "merged") == layout(base)


@pytest.mark.parametrize("scheme", ["mxfp4", "fp8"])
def test_a_quantized_base_is_merged_in_bfloat16(scheme, tmp_path, request):
    if scheme == "mxfp4":
        base, targets = request.getfixturevalue("published"), TARGETS["gpt_oss"]
    else:
        base, targets = checkpoints(False)[0], TARGETS["deepseek_v3"]
    config = transformers.AutoConfig.from_pretrained(base)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    proof = merge(tmp_path / "adapter", str(base), tmp_path / "merged")
    assert proof.dequantized == scheme and proof.error <= 1e-5
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written and not any("_scale" in key for key in layout(tmp_path / "merged"))
    assert logits_of(tmp_path / "merged").isfinite().all()


def test_experts_in_mxfp4_are_packed_again_and_the_error_is_measured(tmp_path, published):  # noqa: F811
    config = transformers.AutoConfig.from_pretrained(published)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    targets = {"target_modules": [], "target_parameters": ["layers.0.mlp.experts.gate_up_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", str(published), tmp_path / "bf16")
    proof = merge(tmp_path / "adapter", str(published), tmp_path / "packed", pack=True)
    assert proof.error <= 1e-5 < 1e-3 < proof.rounding < proof.effect
    assert layout(tmp_path / "packed") == layout(published)
    assert configurations(tmp_path / "packed") == configurations(published)
    before, after, whole = (
        load_file(f / "model.safetensors") for f in (published, tmp_path / "packed", tmp_path / "bf16")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert changed == {f"{name}_blocks", f"{name}_scales"}
    found, exact = value_of(after[f"{name}_blocks"], after[f"{name}_scales"]), whole[name].float()
    assert 0.02 < (found - exact).norm() / exact.norm() < 0.12  # four bits
    again = packed(value_of(before[f"{name}_blocks"], before[f"{name}_scales"]))
    assert torch.equal(value_of(*again), value_of(before[f"{name}_blocks"], before[f"{name}_scales"]))
    with pytest.raises(AdapterError, match="not in MXFP4.*leave out --mxfp4"):
        merge(adapter_of("qwen3_moe")[0], str(saved("qwen3_moe")), tmp_path / "none", pack=True)


def test_routers_that_are_saved_whole_are_put_in(tmp_path):
    model = wrapped("qwen3_moe", target_modules=QKVO, modules_to_save=["mlp.gate"])
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name:
            parameter.data.mul_(1.5)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", str(saved("qwen3_moe")), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_vllm_43254_a_pair_is_named_after_the_module_whichever_parameter_it_is_of(only, tmp_path):
    folder, logits = made("gpt_oss", target_modules=(), target_parameters=(f"mlp.experts.{only}",))
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.weight" in tensors_of(folder)
    merge(folder, str(saved("gpt_oss")), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)


def expert_major(folder):
    """The same adapter with B as Unsloth laid it out: the expert slowest."""
    tensors = tensors_of(folder)
    for key in [key for key in tensors if ".experts." in key and "lora_B" in key]:
        out = tensors[key].shape[0]
        tensors[key] = tensors[key].reshape(out, -1, 8).transpose(1, 2).reshape(out, -1)
    return tensors


def test_unsloth_6930_expert_major_adapters_are_merged_right_where_they_say_so_and_else_refused(tmp_path):
    folder, logits = adapter_of("qwen3_moe")
    recorded = copied(
        folder,
        tmp_path / "recorded",
        expert_major(folder),
        lora_B_layout="grouped_by_expert",
        base_model_name_or_path="unsloth/Qwen3-30B-A3B",
    )
    proof = merge(recorded, str(saved("qwen3_moe")), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)
    assert proof.layout == EXPERT_MAJOR and "from its own layout" in proof.by
    silent = copied(folder, tmp_path / "silent", expert_major(folder), auto_mapping={"unsloth_fixed": True})
    model = base_of("qwen3_moe")
    with pytest.raises(AdapterError, match="cannot be told: Unsloth .* --layout"):
        read_adapter(silent, model)
    expected = read_adapter(folder, model)
    assert same_deltas(read_adapter(silent, model, EXPERT_MAJOR), expected, model)
    assert not same_deltas(read_adapter(silent, model, RANK_MAJOR), expected, model)
    with pytest.raises(AdapterError, match="Leave out --layout"):
        read_adapter(recorded, model, RANK_MAJOR)
    rewrite(recorded, model, tmp_path / "peft", "peft")
    again = read_adapter(tmp_path / "peft", model)
    assert same_deltas(again, expected, model) and again.layout == RANK_MAJOR


@pytest.mark.parametrize("square", [True, False])
def test_factors_of_transposed_weights_as_peft_wrote_them_are_read_by_version_or_shape(square, tmp_path):
    """NVIDIA-NeMo/Automodel#3626."""
    model, name = base_of("qwen3_moe"), f"mlp.experts.{'gate_up' if square else 'down'}_proj"
    folder = made("qwen3_moe", target_modules=(), target_parameters=(name,))[0]
    tensors, E = tensors_of(folder), 8
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        A_ErI, B_EOr = A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1)
        tensors[key] = B_EOr.transpose(1, 2).flatten(0, 1)  # its `in` is what the weight puts out
        tensors[key.replace("lora_A", "lora_B")] = A_ErI.permute(2, 1, 0).flatten(1)
    old = copied(folder, tmp_path / "old", tensors, peft_version="0.18.1")
    expected = read_adapter(folder, model)
    found = read_adapter(old, model)
    assert same_deltas(found, expected, model) and not found.native
    unknown = copied(folder, tmp_path / "unknown", tensors, peft_version=None)
    if square:
        with pytest.raises(AdapterError, match="square weights.*peft_version"):
            read_adapter(unknown, model)
    else:
        assert same_deltas(read_adapter(unknown, model), expected, model)


def test_experts_of_gpt_oss_that_were_trained_in_4_bits_are_merged(tmp_path):
    """unsloth#6936: `gate_up_projs.3`, rows interleaved as in the base."""
    folder, _ = made("gpt_oss", target_modules=(), target_parameters=tuple(GATED))
    model, tensors = base_of("gpt_oss"), {}
    expected = read_adapter(folder, model)
    for name, (change,) in expected.changes.items():
        module, _, parameter = name.rpartition(".")
        for e in range(8):
            path = f"base_model.model.{module}.{parameter}s.{e}"
            tensors |= {f"{path}.lora_A.weight": change.A[e].clone(), f"{path}.lora_B.weight": change.B[e].clone()}
    found = read_adapter(copied(folder, tmp_path / "unpacked", tensors, target_parameters=None), model)
    assert same_deltas(found, expected, model)


def test_experts_without_a_pair_keep_their_weights(tmp_path):
    folder, _ = made("qwen3_moe", target_modules=("q_proj",))
    path = "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_"
    A, B = torch.randn(4, 32), torch.randn(16, 4)
    few = copied(folder, tmp_path / "few", {f"{path}A.weight": A, f"{path}B.weight": B})
    merge(few, str(saved("qwen3_moe")), tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (saved("qwen3_moe"), tmp_path / "merged"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] + 1.5 * B @ A)


def test_a_merge_that_does_not_compute_base_and_adapter_leaves_nothing(tmp_path, monkeypatch):
    folder, _ = adapter_of("qwen3_moe")
    delta, revert = Adapter.delta, merging.revert_weight_conversion
    monkeypatch.setattr(Adapter, "delta", lambda self, name, shape: 1.01 * delta(self, name, shape))
    with pytest.raises(NotEqualError, match="other logits.*Nothing was written"):
        merge(folder, str(saved("qwen3_moe")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(Adapter, "delta", delta)

    def swapped(model, state):
        pieces = revert(model, state)
        return dict(zip(pieces, reversed(pieces.values()), strict=True))

    monkeypatch.setattr(merging, "revert_weight_conversion", swapped)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("stays")
    with pytest.raises(NotEqualError, match=r"experts\..* is not what base and adapter give"):
        merge(folder, str(saved("qwen3_moe")), tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_embeddings_and_heads_are_merged_where_they_are_two(end, tmp_path):
    folder, logits = made("qwen3_moe", target_modules=(end,))
    proof = merge(folder, str(saved("qwen3_moe")), tmp_path / "merged")
    assert_same(logits_of(tmp_path / "merged"), logits)
    assert proof.changed == (1, 0)
    config = transformers.AutoConfig.from_pretrained(saved("qwen3_moe"), tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=f"{end}.weight, which the base ties"):
        read_adapter(folder, skeleton(config))
