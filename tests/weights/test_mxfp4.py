"""A checkpoint in MXFP4, as GPT-OSS is published: loaded as bfloat16, trained, and saved as that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.tiny import tiny_config
from expertmesh.weights.quantized import MXFP4
from tests.distributed.ranks import on_ranks

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
