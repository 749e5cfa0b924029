"""Block-FP8 checkpoints load as the weights they stand for, also in slices, and are saved unquantized."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.export import differing, differing_tensors, layout
from expertmesh.weights.quantized import BlockFP8
from expertmesh.weights.read import safetensors_slices
from tests.layers.test_mtp import saved as saved_with_mtp
from tests.models import saved

BLOCK = (16, 10)  # the last block is cut off in most weights, as DeepSeek V3's [576, 7168] in blocks of 128
FP8_CONFIG = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
}
_FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-fp8-")


def quantized(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8 weights, scale of each block, what both stand for), block by block."""
    counts = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
    values, scales, exact = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(counts), weight.clone()
    for i in range(counts[0]):
        for j in range(counts[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = values[part].float() * scales[i, j]
    return values, scales, exact


@functools.cache
def checkpoints(mtp: bool) -> tuple[Path, Path]:
    """(a tiny DeepSeek V3 in block FP8, the same values in float32). Do not write into them."""
    source = saved_with_mtp("deepseek_v3") if mtp else saved("deepseek_v3")
    return write_fp8(source, Path(_FOLDERS.name, f"fp8-{mtp}"), Path(_FOLDERS.name, f"exact-{mtp}"))


def write_fp8(source: Path, fp8: Path, same: Path) -> tuple[Path, Path]:
    """Both folders, with the checkpoint `source` in block FP8, and with what that stands for."""
    stored, exact = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], exact[name] = quantized(weight)
        else:
            stored[name] = exact[name] = weight
    for folder, weights in ((fp8, stored), (same, exact)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_config(fp8, FP8_CONFIG)
    return fp8, same


def edit_config(folder: Path, changes: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_every_slice_is_that_of_the_dequantized_whole(tmp_path):
    weight = torch.randn(37, 24)
    values, scales, exact = quantized(weight)
    three = {"w": values.repeat(3, 1, 1), "s": scales.repeat(3, 1, 1)}  # experts in one tensor
    save_file({"weight": values, "scales": scales.to(torch.float64), **three}, tmp_path / "a.safetensors")
    with safetensors_slices([tmp_path / "a.safetensors"]) as tensors:
        lazy, stacked = (BlockFP8(tensors[w], tensors[s], BLOCK) for w, s in (("weight", "scales"), ("w", "s")))
        assert lazy.get_shape() == [37, 24] and torch.equal(lazy[...], exact)
        for part in (
            (slice(0, 37), slice(None)), (slice(5, 6), slice(9, 21)), (slice(16, 33), slice(10, 20)),
            (slice(30, 99), slice(23, 24)), (slice(7, 7), slice(0, 24)),
        ):  # fmt: skip
            assert torch.equal(lazy[part], exact[part]), part
        assert torch.equal(stacked[1:2, 3:35, 4:], exact[None, 3:35, 4:])


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_what_the_checkpoint_stands_for(dtype, mtp):
    stored, exact = checkpoints(mtp)
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=dtype)
    want = AutoModelForCausalLM.from_pretrained(exact, dtype=dtype)
    assert not differing_tensors(model.state_dict(), want.state_dict())
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in want.parameters()] and all(
        p.requires_grad for p in model.parameters()
    ) != mtp
    ids = torch.arange(3, 19)[None]
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_dtype_is_bfloat16_unless_the_checkpoint_says_otherwise(tmp_path):
    shutil.copytree(checkpoints(False)[0], tmp_path, dirs_exist_ok=True)
    for said, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), (None, torch.bfloat16)):
        edit_config(tmp_path, {"dtype": said})
        assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


@pytest.mark.parametrize("mtp", [False, True])
def test_the_export_is_unquantized_and_stock_transformers_loads_it(mtp, tmp_path, capsys):
    stored, exact = checkpoints(mtp)
    AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).save_pretrained(tmp_path)
    said = capsys.readouterr().err
    assert "is quantized (FP8). Its weights become bfloat16" in said
    assert f"{tmp_path} holds bfloat16 weights and no quantization_config; it was loaded from FP8" in said
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16).save_pretrained(tmp_path / "exact")
    assert not differing(layout(tmp_path), layout(tmp_path / "exact"))
    weights, want = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "exact"))
    assert not differing_tensors(weights, want)
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, tmp_path / "exact")]
    ids = torch.arange(3, 19)[None]
    assert torch.equal(*(model(ids, use_cache=False).logits for model in models))


def test_the_caller_keeps_his_configuration_and_may_keep_the_weights_quantized():
    stored, _ = checkpoints(False)
    config = transformers.AutoConfig.from_pretrained(stored)
    AutoModelForCausalLM.from_pretrained(stored, config=config)
    assert config.quantization_config["quant_method"] == "fp8"
    with pytest.raises(RuntimeError, match="conversion"):  # Transformers' own way, which wants blocks that are whole
        AutoModelForCausalLM.from_pretrained(stored, quantization_config=transformers.FineGrainedFP8Config())


def test_scales_that_are_missing_are_named(tmp_path):
    stored, _ = checkpoints(False)
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight in FP8 without"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_offloading_to_the_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot stay on the disk"):
        AutoModelForCausalLM.from_pretrained(
            checkpoints(False)[0], device_map={"": "cpu", "lm_head": "disk"}, offload_folder=tmp_path
        )
