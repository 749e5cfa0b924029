"""A checkpoint in MXFP4, as GPT-OSS is published: loaded as bfloat16, trained, saved as that or packed again."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import expertmesh
from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.tiny import tiny_config
from expertmesh.weights.mxfp4 import packed, save_mxfp4
from expertmesh.weights.quantized import MXFP4, unpacked
from tests.distributed.ranks import on_ranks
from tests.models import load_ours

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
#: of openai/gpt-oss-20b
OPENAI = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
PACKED = ("experts.gate_up_proj", "experts.down_proj")


def quantize(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, O, I / 32, 16] of two 4-bit floats a byte, and scales [E, O, I / 32], exponents of 2 plus 127."""
    groups = weight_EIO.transpose(1, 2).float().unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


def value_of(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights [E, I, O] that the packed tensors stand for."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    values = FP4[codes & 7] * torch.where(codes > 7, -1, 1) * torch.exp2(scales.float() - 127)[..., None]
    return values.flatten(-2).transpose(1, 2)


def random_model() -> Any:
    """A tiny GPT-OSS in bfloat16 whose rows can be packed."""
    config = tiny_config("gpt_oss")
    config.intermediate_size, config.hidden_size = 64, 32
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A tiny GPT-OSS with packed experts."""
    folder = tmp_path_factory.mktemp("mxfp4")
    random_model().save_pretrained(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(PACKED):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize(weight)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = OPENAI
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def expected(published: Path) -> dict[str, torch.Tensor]:
    """The weights under the names that an unpacked checkpoint has."""
    tensors = stored(published)
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        packed = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = value_of(*packed).bfloat16()
    return tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def assert_exported(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Exactly these tensors lie in the folder, its configuration speaks of nothing else, and stock loads them."""
    assert_same(stored(folder), weights)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


def test_it_is_loaded_as_bfloat16_and_said_so(published, capsys):
    model = AutoModelForCausalLM.from_pretrained(published)
    weights = expected(published)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert "is quantized (MXFP4). Its weights become bfloat16" in capsys.readouterr().err
    ids = torch.randint(3, 128, (1, 16))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("loader", ["ours", "fused"])
def test_the_export_is_a_plain_bfloat16_checkpoint_and_says_so(published, tmp_path, capsys, loader):
    if loader == "ours":
        model = AutoModelForCausalLM.from_pretrained(published)
    else:
        model = fuse(transformers.AutoModelForCausalLM.from_pretrained(published))
    model.save_pretrained(tmp_path)
    said = "holds bfloat16 weights and no quantization_config; it was loaded from MXFP4" in capsys.readouterr().err
    assert said == (loader == "ours")
    assert_exported(tmp_path, expected(published))


def load_and_save(rank: int, published: Path, out: Path) -> None:
    for number, setup in enumerate(({"ep_size": 2}, {})):
        model: Any = AutoModelForCausalLM.from_pretrained(published, distributed_setup=setup)
        model.save_pretrained(out / str(number))


def test_ranks_unpack_their_own_parts(published, tmp_path):
    on_ranks(2, load_and_save, published, tmp_path)
    for layout in ("0", "1"):
        assert_exported(tmp_path / layout, expected(published))


def test_every_slice_is_that_of_the_whole():
    blocks, scales = quantize(torch.randn(3, 96, 5))

    class Stored:
        def __init__(self, values: torch.Tensor):
            self.values = values

        def get_shape(self) -> list[int]:
            return list(self.values.shape)

        def __getitem__(self, index: Any) -> torch.Tensor:
            return self.values[index]

    packed, whole = MXFP4(Stored(blocks), Stored(scales)), value_of(blocks, scales)
    assert packed.get_shape() == [3, 96, 5] and torch.equal(packed[...].float(), whole)
    for part in (
        ((0, 2), (0, 96), (0, 5)),
        ((1, 1), (31, 33), (1, 4)),
        ((2, 3), (32, 64), (0, 0)),
        ((0, 3), (5, 90), (4, 5)),
    ):
        index = tuple(slice(*ends) for ends in part)
        assert torch.equal(packed[index].float(), whole[index])


def test_scales_that_are_missing_are_named(published, tmp_path):
    tensors = load_file(published / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("_scales"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    with pytest.raises(ValueError, match=lost):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def load(published: Path, loader: str) -> Any:
    if loader == "ours":
        return AutoModelForCausalLM.from_pretrained(published)
    model = transformers.AutoModelForCausalLM.from_pretrained(published)
    return fuse(model) if loader == "fused" else model


@pytest.mark.parametrize("loader", ["ours", "fused", "stock"])
def test_what_was_mxfp4_is_packed_again_bit_for_bit(published, tmp_path, loader):
    model = load(published, loader)
    errors = save_mxfp4(model, tmp_path / "packed")
    assert set(errors) == {name.removesuffix("_blocks") for name in stored(published) if name.endswith("_blocks")}
    assert set(errors.values()) == {0.0}
    assert_same(stored(tmp_path / "packed"), stored(published))
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"] == OPENAI
    model.save_pretrained(tmp_path / "plain")  # not asked for, it is what it was
    assert_exported(tmp_path / "plain", expected(published))


def test_random_weights_are_packed_within_the_bound_and_loaded_by_stock_and_by_us(tmp_path, capsys):
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = save_mxfp4(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(dict(model.state_dict()), before)
    loaded = [library.AutoModelForCausalLM.from_pretrained(tmp_path) for library in (transformers, expertmesh)]
    values = expected(tmp_path)
    assert values.keys() == before.keys()
    for name, weight in before.items():
        assert all(torch.equal(other.state_dict()[name], values[name]) for other in loaded)
        if name not in errors:
            assert torch.equal(values[name], weight)
            continue
        difference, weight = (values[name] - weight.float()).abs(), weight.float()
        largest = weight.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
        assert (difference <= torch.maximum(weight.abs() / 5, largest / 14)).all()  # 2.5 -> 2; 0.25 -> 0 beside 3.5
        assert errors[name] == pytest.approx((difference.norm() / weight.norm()).item(), rel=1e-5)
        assert 0.1 < errors[name] < 0.125
    worst = max(errors, key=lambda name: errors[name])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} holds the weights of experts in MXFP4, all else in bfloat16, and a quantization_config." in said
    assert f"is {errors[worst]:.4f}: {worst}." in said
    assert not hasattr(model.config, "quantization_config")


def pack_layouts(rank: int, published: Path, out: Path) -> list[dict[str, float]]:
    measured = []
    for number, setup in enumerate(({"ep_size": 2}, {}, {"tp_size": 2})):
        model: Any = AutoModelForCausalLM.from_pretrained(published, distributed_setup=setup)
        measured.append(save_mxfp4(model, out / str(number), max_shard_size="20KB"))
    return measured


def test_ranks_pack_what_one_process_packs(tmp_path):
    random_model().save_pretrained(tmp_path / "plain")
    errors = save_mxfp4(random_model(), tmp_path / "packed")
    assert on_ranks(2, pack_layouts, tmp_path / "plain", tmp_path) == [[errors] * 3] * 2
    for number in range(3):
        assert_same(stored(tmp_path / str(number)), stored(tmp_path / "packed"))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config == json.loads((tmp_path / "packed" / "config.json").read_text())


def rounded(*weights: float) -> list[float]:
    """What becomes of a group of these weights, and zeros."""
    group = torch.zeros(32)
    group[: len(weights)] = torch.tensor(weights)
    return unpacked(*packed(group)).tolist()[: len(weights)]


def test_ties_go_to_the_even_code():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    assert rounded(6, *ties) == [6, 0, 1, 1, 2, 2, 4, 4]
    assert rounded(-6, *(-tie for tie in ties)) == [-6, 0, -1, -1, -2, -2, -4, -4]
    assert rounded(6, 0.26, 0.74, 1.26, 1.74, 2.51, 3.49, 5.01) == [6, 0.5, 0.5, 1.5, 1.5, 3, 3, 6]


def test_the_scale_grows_where_the_largest_weight_is_nearer_to_8_than_to_6():
    assert rounded(6.9, 0.6) == [6, 0.5]
    assert rounded(7.1, 0.6) == [8, 1]
    assert rounded(3.4, 0.3) == [3, 0.25]


@pytest.mark.parametrize("exponent", [-127, -126, -1, 0, 119, 125])
def test_groups_of_any_magnitude_are_exact(exponent):
    weights = [4.0, 6.0, -0.5, 1.5] if exponent == -127 else [0.5, 1.0, -1.5, 2.0, -3.0, 4.0, 6.0]
    weights = [weight * 2.0**exponent for weight in weights]
    assert rounded(*weights) == weights


def test_extreme_weights_stay_finite_and_zeros_stay_zero():
    largest = torch.finfo(torch.bfloat16).max
    assert rounded(largest, -largest, 1.0) == [6 * 2.0**125, -6 * 2.0**125, 0]
    assert rounded(1e-40, -9e-41) == [0, 0]  # below half of the smallest, 2**-128
    blocks, scales = packed(torch.zeros(2, 32))
    assert not blocks.any() and not scales.any()
    assert torch.equal(unpacked(*packed(torch.full((32,), -0.0))).signbit(), torch.ones(32, dtype=torch.bool))


@pytest.mark.parametrize("size", [0.02, 1.0, 1.4])
def test_the_error_of_random_weights_is_11_percent_and_smaller_than_under_the_scale_of_the_specification(size):
    weights = size * torch.randn(1, 6400, 128, generator=torch.Generator().manual_seed(0))
    ours = unpacked(*packed(weights.mT.contiguous().unflatten(2, (-1, 32)))).flatten(2).mT
    plain = value_of(*quantize(weights))
    error, theirs = ((result - weights).norm() / weights.norm() for result in (ours, plain))
    assert 0.105 < error < 0.115 and error < 0.99 * theirs


def test_what_cannot_be_packed_is_refused_before_anything_is_written(tmp_path):
    adapted: Any = random_model()
    wrapped = peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["q_proj"]))
    broken = random_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.experts.down_proj[3, 2, 1] = torch.nan
    quantized = random_model()
    quantized.config.quantization_config = {"quant_method": "fp8"}
    for model, match in (
        (load_ours("qwen3_moe"), "Qwen3MoeForCausalLM is none: use save_pretrained"),
        (load_ours("gpt_oss"), "multiples of 32"),
        (quantized, "not quantized"),
        (broken, r"layers\.1\.mlp\.experts\.down_proj has weights that are infinite or NaN"),
        (wrapped, "merge them"),
        (adapted, "merge them"),
    ):
        with pytest.raises(ValueError, match=match):
            save_mxfp4(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()
