"""The experts' products by quack: a layer's output and gradients are those by our kernels, and it is asked to do no
other products. quack itself runs on GPUs only (tests/gpu); here a stand-in has its interface.
"""

import importlib
import sys
import types

import pytest
import torch

from expertmesh import backends
from expertmesh.families import report
from expertmesh.kernels import quack
from expertmesh.moe.experts import experts_forward
from tests.kernels import fake_quack
from tests.moe.test_experts import EXPERTS, HIDDEN, LAYOUTS, ROUTINGS, TOKENS, TOP_K, _module, _run


@pytest.mark.parametrize(("divisor", "many"), [(None, 0), (4, 0), (None, 1000)])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["qwen", "nemotron", "gpt-oss"])
def test_a_layer_is_what_it_is_by_our_kernels(layout, routing, divisor, many, monkeypatch):
    for name, content in fake_quack.MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    module = _module(**LAYOUTS[layout])
    if divisor:
        module.grad_divisor = divisor
    ids = ROUTINGS[routing]()
    x, weight, dout = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN)
    want = _run(experts_forward, module, x, ids, weight, dout)
    asked = []
    monkeypatch.setattr(quack, "supports", lambda *product: asked.append(product) or True)
    monkeypatch.setattr(quack, "MIN_ROWS", many)
    with backends.interpreted():
        got = _run(experts_forward, module, x, ids, weight, dout)
    assert len(asked) == (3 if layout == "gpt-oss" else 4 + (many == 0)), "products with biases are not quack's"
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-6), name


def test_its_tiles_are_those_that_cover_a_matrix_with_the_least_waste():
    tiles = {width: quack._least_waste(quack.ROWS, 1, width).columns for width in (2048, 2688, 2880, 7168)}
    assert tiles == {2048: 256, 2688: 192, 2880: 192, 7168: 256}
    qwen, nemotron, deepseek = (
        quack._least_waste(quack.WGRAD, *shape) for shape in ((2048, 1536), (2688, 1856), (7168, 4096))
    )
    assert qwen[:2] == (256, 192) and nemotron[:2] == (128, 192) and deepseek[:2] == (128, 256)


def test_it_takes_what_it_knows_and_nothing_else(monkeypatch):
    monkeypatch.setattr(backends, "has_quack", lambda device: True)
    rows, weight = torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(EXPERTS, 96, 64, dtype=torch.bfloat16)
    assert quack.supports(rows, weight) and quack.supports(rows, weight.transpose(1, 2))
    assert not quack.supports(rows[:0], weight)
    assert not quack.supports(rows.float(), weight.float()) and not quack.supports(rows, weight.half())
    assert not quack.supports(rows, weight[:, :92].contiguous()), "no whole 16 bytes"
    assert not quack.supports(rows, weight[:, :, :48])
    monkeypatch.undo()
    assert not quack.supports(rows, weight), "there is no Hopper GPU"


@pytest.mark.parametrize(
    ("version", "capability", "there"),
    [("0.6.5", (9, 0), True), ("0.7.0", (9, 0), False), (None, (9, 0), False), ("0.6.5", (8, 0), False)],
)
def test_it_is_there_in_a_version_that_is_known_and_on_hopper(version, capability, there, monkeypatch):
    monkeypatch.setattr(backends, "version_of", lambda package: {"quack-kernels": version}[package])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.has_quack.__wrapped__(torch.device("cuda", 0)) == there
    assert not backends.has_quack.__wrapped__(torch.device("cpu"))


def test_the_report_names_the_library_before_our_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for found in (True, False):
        monkeypatch.setattr(backends, "has_quack", lambda device, found=found: found)
        monkeypatch.setattr(backends, "has_flash_attention", lambda device, found=found: found)
        assert report._on("experts", 1).by == ("quack, Triton" if found else "Triton")
        attention = "flash-attn-4, FlashAttention-2, Triton" if found else "FlashAttention-2, Triton"
        assert report._on("sink_attention", 1).by == attention
        assert report._on("rms_norm", 1).by == "Triton"
