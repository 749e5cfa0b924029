"""Every way in and out: we load and save the checkpoint itself, and stock Transformers reads what we saved."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.export import configurations, differing, differing_tensors, layout
from expertmesh.bench.parity import CASES, CPU_TOLERANCE, compare_case, make_batch
from expertmesh.bench.rows import relative_error
from expertmesh.bench.tiny import FAMILIES, tiny_config, tiny_model
from expertmesh.weights.files import SUMS
from tests.models import load_ours, load_stock, saved, shared_pair

StockAutoModelForCausalLM = transformers.AutoModelForCausalLM
ATTENTION = {"deepseek_v3": ["q_a_proj", "kv_b_proj", "o_proj"]}


def without_mtp(files: dict) -> dict:
    """Configurations as ours says them: stock's promise modules for multi-token prediction that are not there."""
    for content in files.values():
        for name in {"num_nextn_predict_layers", "mtp_num_hidden_layers"} & content.keys():
            content[name] = 0
    return files


def batch() -> dict[str, torch.Tensor]:
    return make_batch("left", 128, torch.device("cpu"))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    inputs = batch()
    del inputs["labels"]
    return model.eval()(**inputs).logits


def train_a_little(model) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_the_original_files_and_stock_reloads_them(family, dtype, tmp_path):
    original = saved(family, dtype)
    ours = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    ours.save_pretrained(tmp_path)
    assert not differing(layout(tmp_path), layout(original))
    assert not differing(configurations(tmp_path), without_mtp(configurations(original)))
    for file in sorted(tmp_path.glob("*.safetensors")):
        assert not differing_tensors(load_file(file), load_file(original / file.name))
    assert not any("expertmesh" in file.read_text().lower() for file in tmp_path.glob("*.json"))
    reloaded = StockAutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert not differing_tensors(reloaded.state_dict(), ours.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_weights_reach_stock_through_the_saved_files(family, tmp_path):
    ours = load_ours(family)
    before = logits_of(ours)
    train_a_little(ours)
    ours.save_pretrained(tmp_path)
    assert not differing(layout(tmp_path), layout(saved(family)))
    reloaded = StockAutoModelForCausalLM.from_pretrained(tmp_path)
    assert not differing_tensors(reloaded.state_dict(), ours.state_dict())
    assert relative_error(logits_of(reloaded), logits_of(ours)) <= CPU_TOLERANCE
    assert relative_error(logits_of(reloaded), before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_made_from_a_configuration_saves_like_stock(family, tmp_path):
    torch.manual_seed(0)
    stock = StockAutoModelForCausalLM.from_config(tiny_config(family))
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(tiny_config(family))
    assert not differing_tensors(ours.state_dict(), stock.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    assert not differing(layout(tmp_path / "ours"), layout(tmp_path / "stock"))
    assert not differing(configurations(tmp_path / "ours"), without_mtp(configurations(tmp_path / "stock")))


def test_saved_in_shards(tmp_path):
    stock, ours = shared_pair("qwen3_moe")
    stock.save_pretrained(tmp_path / "stock", max_shard_size="40KB")
    ours.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    files = sorted(file.name for file in (tmp_path / "stock").iterdir())
    assert sorted([*files, SUMS]) == sorted(file.name for file in (tmp_path / "ours").iterdir()) and len(files) > 4
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_saving_a_given_state_dict_in_another_dtype(tmp_path):
    _, ours = shared_pair("qwen3_moe")
    ours.save_pretrained(tmp_path, state_dict={key: value.bfloat16() for key, value in ours.state_dict().items()})
    assert {dtype for dtype, _ in layout(tmp_path).values()} == {"BF16"}


def test_push_to_hub_uploads_the_files_that_stock_would(monkeypatch):
    uploads = []

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, *args, **options):
        uploads.append({file.name: file.read_bytes() for file in Path(folder).iterdir() if file.suffix != ".md"})

    card = type("Card", (), {"save": lambda self, path: Path(path).touch()})()
    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    for model in shared_pair("qwen3_moe"):
        model.push_to_hub("somebody/something")
    assert uploads[0].keys() >= {"config.json", "model.safetensors"}
    assert uploads[1].pop(SUMS) and uploads[1] == uploads[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_lora_trained_on_ours_works_on_stock(family, tmp_path):
    """Adapter saved from ours, loaded onto the stock model by PEFT; and merged, saved, read by stock."""
    config = LoraConfig(
        r=4, target_modules=ATTENTION.get(family, ["q_proj", "v_proj", "o_proj"]), init_lora_weights=False
    )
    torch.manual_seed(1)
    ours = get_peft_model(load_ours(family), config)
    train_a_little(ours)
    ours.save_pretrained(tmp_path / "adapter")
    expected = logits_of(ours)
    stock = PeftModel.from_pretrained(load_stock(family), tmp_path / "adapter")
    assert relative_error(logits_of(stock), expected) <= CPU_TOLERANCE
    assert relative_error(logits_of(load_stock(family)), expected) > 1e-3
    assert "expertmesh" not in (tmp_path / "adapter" / "adapter_config.json").read_text().lower()

    ours.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not differing(layout(tmp_path / "merged"), layout(saved(family)))
    assert not differing(configurations(tmp_path / "merged"), without_mtp(configurations(saved(family))))
    merged = StockAutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(logits_of(merged), expected) <= CPU_TOLERANCE


def test_add_adapter_and_load_adapter(tmp_path):
    least = transformers.integrations.peft.MIN_PEFT_VERSION
    if Version(version("peft")) < Version(least):
        pytest.skip(f"this Transformers takes adapters of PEFT {least} only")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    ours = load_ours("qwen3_moe")
    ours.add_adapter(config)
    train_a_little(ours)
    ours.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    for other in (load_stock("qwen3_moe"), load_ours("qwen3_moe")):
        other.load_adapter(tmp_path)
        assert relative_error(logits_of(other), logits_of(ours)) <= CPU_TOLERANCE
    ours.disable_adapters()
    assert relative_error(logits_of(ours), logits_of(load_stock("qwen3_moe"))) <= CPU_TOLERANCE


def test_from_pretrained_takes_an_adapter_folder(tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_stock("qwen3_moe"), config)
    adapted.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits_of(ours), logits_of(adapted)) <= CPU_TOLERANCE


@pytest.mark.parametrize("size", [136, 100])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_resized_embeddings_train_and_save(family, size, tmp_path):
    stock, ours = load_stock(family), load_ours(family)
    kind = type(ours.get_output_embeddings())
    for model in (stock, ours):
        torch.manual_seed(2)
        model.resize_token_embeddings(size)
    assert type(ours.get_output_embeddings()) is kind, "as fast as before"
    assert not differing_tensors(ours.state_dict(), stock.state_dict())
    inputs = batch()
    inputs["input_ids"] %= size
    inputs["labels"][inputs["labels"] >= size] = size - 1
    losses = [model.train()(**inputs).loss.detach() for model in (stock, ours)]
    assert relative_error(losses[1], losses[0]) <= CPU_TOLERANCE
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert not differing(layout(tmp_path / "ours"), layout(tmp_path / "stock"))
    reloaded = StockAutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert not differing_tensors(reloaded.state_dict(), ours.state_dict())


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_tied_embeddings_stay_tied_and_are_saved_once(family, tmp_path):
    tiny_model(family, tie_word_embeddings=True).save_pretrained(tmp_path / "original")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    stock = StockAutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert not [row for row in compare_case(stock, ours, CASES[0]) if not row.ok]
    ours.save_pretrained(tmp_path / "ours")
    assert not differing(layout(tmp_path / "ours"), layout(tmp_path / "original"))
    assert not any("lm_head" in key for key in layout(tmp_path / "ours"))


@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_turns_a_loaded_stock_model_into_ours(family):
    stock, other = load_stock(family), load_stock(family)
    parameters = dict(other.named_parameters())
    assert fuse(other) is other
    assert type(other) is type(load_ours(family)) and type(other) is not type(stock)
    assert all(parameter is parameters[name] for name, parameter in other.named_parameters())
    for case in CASES[2:3]:
        assert not [row for row in compare_case(stock, other, case) if not row.ok]
    assert fuse(other) is other


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("qwen3_moe", name) for name in ("experts", "router", "rms_norm", "swiglu", "qk_norm_rope", "add_norm")),
        ("qwen3_moe", "linear_cross_entropy"),
        ("granitemoe", "rope"),
        ("granitemoe", "add_norm"),
    ],
)
def test_each_fusion_can_be_switched_off_alone_and_the_numbers_stay(family, name):
    ours = load_ours(family, fused={name: False})
    states = {row.name: row.on for row in ours.fusion_report()}
    assert states[name] is False and sum(states.values()) >= 4
    assert all(row.on or row.reason for row in ours.fusion_report())
    for case in CASES[1:2]:
        assert not [row for row in compare_case(load_stock(family), ours, case) if not row.ok]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_false_is_exactly_the_stock_class(family):
    for model in (
        load_ours(family, fused=False),
        AutoModelForCausalLM.from_config(tiny_config(family), fused=False),
    ):
        assert [type(module) for module in model.modules()] == [type(module) for module in load_stock(family).modules()]
        assert model.config._experts_implementation == load_stock(family).config._experts_implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_ours_in_every_family(family):
    ours = load_ours(family)
    report = {row.name: row for row in ours.fusion_report()}
    experts = [module for module in ours.modules() if hasattr(module, "_apply_gate")]
    assert report["experts"].on and report["experts"].count == len(experts) > 0
    assert report["linear_cross_entropy"].on
    assert all(row.on or row.reason for row in report.values())


def test_a_model_without_experts_is_stock(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    StockAutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stock = StockAutoModelForCausalLM.from_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is transformers.LlamaForCausalLM
    for case in CASES[:4]:
        assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    ours.save_pretrained(tmp_path / "again")
    assert not differing(layout(tmp_path / "again"), layout(tmp_path))


# --- arguments of from_pretrained and from_config


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, "bfloat16", torch.float64])
def test_dtype(dtype):
    ours, stock = (
        load(cls, dtype=dtype) for load, cls in ((_load, AutoModelForCausalLM), (_load, StockAutoModelForCausalLM))
    )
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
    assert ours.config.dtype == stock.config.dtype


def _load(cls, family: str = "qwen3_moe", **options):
    return cls.from_pretrained(saved(family), **options)


def test_device_map():
    ours, stock = _load(AutoModelForCausalLM, device_map="cpu"), _load(StockAutoModelForCausalLM, device_map="cpu")
    assert (ours.device, getattr(ours, "hf_device_map", None)) == (stock.device, getattr(stock, "hf_device_map", None))
    per_module = {"model": "cpu", "lm_head": "cpu"}
    assert _load(AutoModelForCausalLM, device_map=per_module).device == torch.device("cpu")


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_implementation(name):
    ours = _load(AutoModelForCausalLM, attn_implementation=name)
    assert ours.config._attn_implementation == ("expertmesh" if name == "sdpa" else name)
    if name != "flex_attention":
        stock = _load(StockAutoModelForCausalLM, attn_implementation=name)
        assert not [row for row in compare_case(stock, ours, CASES[1]) if not row.ok]


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation_asked_for_is_the_one_that_runs(name):
    ours, stock = (_load(cls, experts_implementation=name) for cls in (AutoModelForCausalLM, StockAutoModelForCausalLM))
    assert ours.config._experts_implementation == name
    report = {row.name: row for row in ours.fusion_report()}
    assert not report["experts"].on and name in report["experts"].reason
    assert not [row for row in compare_case(stock, ours, CASES[0]) if not row.ok]


def test_output_loading_info():
    _, ours = _load(AutoModelForCausalLM, output_loading_info=True)
    _, stock = _load(StockAutoModelForCausalLM, output_loading_info=True)
    assert ours == stock


def test_configuration_given_as_object_or_as_keys():
    config = transformers.AutoConfig.from_pretrained(saved("qwen3_moe"), num_experts_per_tok=3)
    for options in ({"config": config}, {"num_experts_per_tok": 3}):
        ours, stock = (_load(cls, **options) for cls in (AutoModelForCausalLM, StockAutoModelForCausalLM))
        assert ours.config.num_experts_per_tok == 3
        assert not [row for row in compare_case(stock, ours, CASES[0]) if not row.ok]


def test_harmless_arguments_are_taken(tmp_path):
    folder = tmp_path / "inner"
    shutil.copytree(saved("qwen3_moe"), folder)
    options = {"trust_remote_code": True, "revision": "main", "local_files_only": True, "use_safetensors": True}
    _load(AutoModelForCausalLM, **options, low_cpu_mem_usage=True, token=None, cache_dir=None, force_download=False)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert not differing_tensors(ours.state_dict(), load_stock("qwen3_moe").state_dict())


def test_key_mapping_given_by_the_caller(tmp_path):
    shutil.copytree(saved("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("model.norm.", "model.last_norm."): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={r"model\.last_norm": "model.norm"})
    assert not differing_tensors(ours.state_dict(), load_stock("qwen3_moe").state_dict())


@pytest.mark.parametrize("call", ["from_pretrained", "from_config"])
def test_an_unknown_argument_raises_like_stock(call):
    first = saved("qwen3_moe") if call == "from_pretrained" else tiny_config("qwen3_moe")
    messages = []
    for cls in (StockAutoModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(TypeError) as raised:
            getattr(cls, call)(first, no_such_argument=1)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_an_unknown_fusion_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="router"):
        load_ours("qwen3_moe", fused={"routr": False})


def test_a_model_that_does_not_exist_raises_like_stock():
    for cls in (StockAutoModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match="no-such-model"):
            cls.from_pretrained("./no-such-model")


def test_a_quantizer_gets_its_model():
    """`quantization_config=` reaches the quantizers; one of our own stands for those that need a GPU."""
    seen = []

    @register_quantization_config("recording")
    class RecordingConfig(QuantizationConfigMixin):
        def __init__(self, quant_method="recording", **_):
            self.quant_method = quant_method

    @register_quantizer("recording")
    class RecordingQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = True

        def is_serializable(self, *_):
            return True

        def _process_model_before_weight_loading(self, model, **_):
            seen.append("before")

        def _process_model_after_weight_loading(self, model, **_):
            seen.append("after")
            return model

    try:
        ours = _load(AutoModelForCausalLM, quantization_config=RecordingConfig())
    finally:
        del AUTO_QUANTIZATION_CONFIG_MAPPING["recording"], AUTO_QUANTIZER_MAPPING["recording"]
    assert seen == ["before", "after"]
    assert ours.is_quantized and ours.config.quantization_config.quant_method == "recording"


def test_a_checkpoint_without_some_experts_is_refused(tmp_path):
    shutil.copytree(saved("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [key for key in weights if ".layers.2.mlp.experts." in key and "gate_proj" in key]
    assert lost
    save_file(
        {key: value for key, value in weights.items() if key not in lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_without_one_expert_is_refused(tmp_path):
    shutil.copytree(saved("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.experts.3.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kept", "says"), [(5000, "invalid header length"), (-1, "file not fully covered")])
def test_a_cut_off_file_is_an_error(tmp_path, kept, says):
    shutil.copytree(saved("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SafetensorError, match=says):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_comparison_of_exports_notices_a_changed_file(tmp_path):
    shutil.copytree(saved("olmoe"), tmp_path, dirs_exist_ok=True)
    assert not differing(layout(tmp_path), layout(saved("olmoe")))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].half()
    weights["extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    assert differing(layout(tmp_path), layout(saved("olmoe"))) == ["extra", "model.norm.weight"]
    assert differing_tensors(weights, load_file(saved("olmoe") / "model.safetensors")) == ["extra", "model.norm.weight"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"expertmesh": 1}))
    assert differing(configurations(tmp_path), configurations(saved("olmoe"))) == ["config.json"]


def test_a_models_own_class_loads_by_position_and_by_name(tmp_path):
    ours = load_ours("qwen3_moe")
    ours.save_pretrained(tmp_path)
    load = type(ours).from_pretrained
    for loaded in (load(tmp_path), load(pretrained_model_name_or_path=tmp_path)):
        assert not differing_tensors(loaded.state_dict(), ours.state_dict())
