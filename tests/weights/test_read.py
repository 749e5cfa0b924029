"""Weights of a checkpoint reach a model that exists, whatever the checkpoint calls them."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import load_sharded_checkpoint

import expertmesh
from expertmesh.bench.tiny import FAMILIES, tiny_config, tiny_model
from expertmesh.weights.read import load_weights
from tests.models import saved


def ours(family: str, seed: int = 5):
    """A fused model of the family with other weights than the saved one's."""
    torch.manual_seed(seed)
    return expertmesh.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)


def assert_holds_the_saved_weights(model, family):
    for name, value in tiny_model(family).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_overwritten_in_place(family):
    model = ours(family)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    load_weights(model, saved(family))
    assert_holds_the_saved_weights(model, family)
    assert before == {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_load_state_dict_takes_the_names_on_disk(family):
    model = ours(family)
    model.load_state_dict(load_file(saved(family) / "model.safetensors"), strict=False)
    model.tie_weights()
    assert_holds_the_saved_weights(model, family)


def test_load_state_dict_takes_the_names_in_the_model():
    model = ours("qwen3_moe")
    model.load_state_dict(tiny_model("qwen3_moe").state_dict())
    assert_holds_the_saved_weights(model, "qwen3_moe")


def test_a_model_loaded_from_disk_takes_the_names_on_disk():
    model = expertmesh.AutoModelForCausalLM.from_pretrained(saved("mixtral"), dtype=torch.float32)
    torch.nn.init.zeros_(model.get_parameter("model.layers.0.mlp.experts.down_proj"))
    model.load_state_dict(load_file(saved("mixtral") / "model.safetensors"))
    assert_holds_the_saved_weights(model, "mixtral")


def test_load_state_dict_says_what_it_does_not_know():
    state = dict(tiny_model("qwen3_moe").state_dict()) | {"model.layers.0.nonsense": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model.layers.0.nonsense"):
        ours("qwen3_moe").load_state_dict(state)


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.2.mlp.experts.3.gate_proj.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_lost_expert_is_an_error_and_never_an_old_weight(lost, strict):
    state = load_file(saved("qwen3_moe") / "model.safetensors")
    del state[lost]
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.*complete checkpoint"):
        ours("qwen3_moe").load_state_dict(state, strict=strict)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda state: state.update({"model.more.weight": torch.zeros(2)}), "model.more.weight"),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(2)}),
            r"model.norm.weight do not fit: .*shape \(2,\)",
        ),
        (lambda state: state.pop("model.layers.0.mlp.experts.0.up_proj.weight"), "layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, message, tmp_path):
    state = load_file(saved("qwen3_moe") / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(ours("qwen3_moe"), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_files_come_one_by_one_and_experts_of_a_layer_lie_in_two(family, tmp_path):
    """So transformers' own Trainer resumes."""
    transformers.AutoModelForCausalLM.from_pretrained(saved(family)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    model = ours(family)
    load_sharded_checkpoint(model, tmp_path, strict=False)
    model.tie_weights()
    assert_holds_the_saved_weights(model, family)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert not model._forward_pre_hooks


def test_a_model_with_some_experts_of_a_layer_does_not_run(tmp_path):
    state = load_file(saved("qwen3_moe") / "model.safetensors")
    gone = {key: state.pop(key) for key in list(state) if "layers.2.mlp.experts.5" in key}
    model, ids = ours("qwen3_moe"), torch.ones(1, 4, dtype=torch.long)
    norm = {"model.norm.weight": state.pop("model.norm.weight")}
    model.load_state_dict(state, strict=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"some experts.*model.layers.2.mlp.experts.*complete checkpoint"):
            model(input_ids=ids)
    model.load_state_dict(norm, strict=False)
    with pytest.raises(ValueError, match=r"some experts"):
        model(input_ids=ids)
    model.load_state_dict(gone, strict=False)
    model(input_ids=ids)
    assert_holds_the_saved_weights(model, "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_not_train_is_not_trained_after_loading(family):
    """Else a checkpoint of one process has parameters in its optimizer that one of two ranks has not."""
    loaded = expertmesh.AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)
    made = {name: weight.requires_grad for name, weight in ours(family).named_parameters()}
    assert {name: weight.requires_grad for name, weight in loaded.named_parameters() if name in made} == made


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_weights(ours("qwen3_moe"), tmp_path)


def test_tied_weights_and_several_files(tmp_path):
    config = tiny_config("qwen3_moe", tie_word_embeddings=True)
    source = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    load_weights(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
