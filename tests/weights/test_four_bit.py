"""Experts are packed while they are read, one stack after another, kept where they are packed, and saved so."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.bench.tiny import tiny_model
from expertmesh.kernels import packed as four_bit
from expertmesh.kernels.packed import Packed
from expertmesh.parallel.setup import refuse_unfit_shards
from expertmesh.weights.four_bit import pack
from tests.moe.test_four_bit import WIDTHS, config, packed_weights
from tests.weights.test_mxfp4 import OPENAI, published  # noqa: F401  a fixture
from tests.weights.test_quantized import write_fp8

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes tiny checkpoints, as stock Transformers saves them."""

    class Folders(dict):
        def __missing__(self, family):
            self[family] = tmp_path_factory.mktemp(family)
            tiny_model(family, **WIDTHS[family]).save_pretrained(self[family])
            return self[family]

    return Folders()


def load(folder, format=None, **options):
    quantization = {} if format is None else {"quantization_config": ExpertsQuantConfig(format)}
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | quantization | options)


def assert_same(got, expected):
    tensors = [list(model.named_parameters()) for model in (got, expected)]
    assert len(tensors[0]) == len(tensors[1])
    for (name, mine), (other, theirs) in zip(*tensors, strict=True):
        assert name == other and type(mine) is type(theirs) and mine.dtype == theirs.dtype
        if isinstance(mine, Packed):
            assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales), name
            assert mine.buffer is got.experts_buffer and not mine.requires_grad
        else:
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_loaded_in_4_bits_is_loaded_and_packed_and_is_saved_and_read_as_it_is(family, folders, tmp_path, monkeypatch):
    packed = load(folders[family])
    pack(packed, ExpertsQuantConfig("nf4"))
    sizes = {tuple(sorted(weight.shape)) for *_, weight in packed_weights(packed)}
    encode, whole = four_bit.encode, []

    def counted(weight, *rest):
        if len(whole) in (0, 3):
            found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta)
            whole.append(len({x.untyped_storage().data_ptr() for x in found if tuple(sorted(x.shape)) in sizes}))
        else:
            whole.append(1)
        encode(weight, *rest)

    monkeypatch.setattr(four_bit, "encode", counted)
    loaded = load(folders[family], "nf4")
    assert whole == [1] * len(packed_weights(loaded)), "weights that were in memory unpacked when one was packed"
    assert_same(loaded, packed)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "expertmesh_4bit",
        "format": "nf4",
    }
    assert not any(name.endswith("experts.down_proj") for name in load_file(tmp_path / "model.safetensors"))
    again = load(tmp_path)
    assert_same(again, packed)
    assert torch.equal(again.eval()(IDS).logits, packed.eval()(IDS).logits)
    with pytest.raises(ValueError, match="experts are in nf4 already, not in mxfp4"):
        load(tmp_path, "mxfp4")
    with pytest.raises(ValueError, match="only where this library computes them"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_gpt_oss_stays_in_mxfp4_to_the_bit_and_stock_reads_what_is_saved(published, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(four_bit, "encode", None)  # nothing is encoded
    model = load(published, "mxfp4", dtype="auto")
    assert model.dtype == torch.bfloat16
    before = load_file(published / "model.safetensors")
    for name, weight in model.named_parameters():
        if isinstance(weight, Packed):
            assert torch.equal(weight.codes, before[f"{name}_blocks"].flatten(-2))
            assert torch.equal(weight.scales, before[f"{name}_scales"])
    expected = load(published, dtype="auto")
    assert torch.equal(model.eval()(IDS).logits, expected.eval()(IDS).logits)
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == OPENAI
    dequantize = transformers.Mxfp4Config(dequantize=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dequantize)
    for name, weight in stock.named_parameters():
        held = model.get_parameter(name)
        assert torch.equal(weight, held.decode().clone() if isinstance(held, Packed) else held), name


def test_block_fp8_is_packed_from_what_it_stands_for(folders, tmp_path):
    fp8, exact = write_fp8(folders["deepseek_v3"], tmp_path / "fp8", tmp_path / "exact")
    assert_same(load(fp8, "nf4"), load(exact, "nf4"))


def test_new_weights_are_packed_as_they_are_drawn():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config("gpt_oss"), quantization_config=ExpertsQuantConfig("mxfp4"))
    weights = packed_weights(model)
    deviation = torch.stack([weight.decode().clone().float().std() for *_, weight in weights])
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.02), rtol=0.05, atol=0)
    assert model.is_quantized and all(p.device.type == "cpu" for p in model.parameters())
    assert model(IDS, labels=IDS).loss.isfinite()
    with pytest.raises(ValueError, match="supports only an ExpertsQuantConfig"):
        AutoModelForCausalLM.from_config(config("gpt_oss"), quantization_config={"format": "mxfp4"})


def test_what_cannot_be_is_refused_by_name(folders, tmp_path):
    folder = folders["qwen3_moe"]
    for entry in (
        lambda **options: load(folder, "nf4", **options),
        lambda **options: AutoModelForCausalLM.from_config(
            config("qwen3_moe"), quantization_config=ExpertsQuantConfig(), **options
        ),
    ):
        alone = entry(distributed_setup={"ep_size": 1})  # which is a process with the whole model
        with pytest.raises(ValueError, match="cannot be split by tp_size=2: set it to 1. ep_size spreads them"):
            refuse_unfit_shards(alone, SimpleNamespace(tp_size=2))
        with pytest.raises(ValueError, match="only where this library computes them"):
            entry(fused=False)
    with pytest.raises(ValueError, match="cannot be offloaded to the CPU or the disk: change device_map"):
        load(folder, "nf4", device_map={"model": "cpu", "lm_head": "disk"})
    load(folder, "nf4").save_pretrained(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    stored = load_file(tmp_path / "model.safetensors")
    for lost, message in (
        ("q_proj.weight", "lacks weights"),
        ("_scales", "_blocks without .*_scales: it is cut short"),
    ):
        tensors = dict(stored)
        tensors.pop(next(name for name in tensors if name.endswith(lost)))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
