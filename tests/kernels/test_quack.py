"""The experts' products by quack: a layer's output and gradients are those by our kernels, and it is asked to do no
other layers. quack itself runs on GPUs only (tests/gpu); here a stand-in has its interface.
"""

import importlib
import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expertmesh import backends, keep_routing
from expertmesh.kernels import quack
from expertmesh.kernels.activation import Activation
from expertmesh.layers.experts import experts_forward
from tests.kernels import fake_quack
from tests.layers.test_experts import EXPERTS, HIDDEN, LAYOUTS, ROUTINGS, TOKENS, TOP_K, _module, _run

fuse_module = importlib.import_module("expertmesh.fuse")


@pytest.fixture
def installed(monkeypatch):
    for name, content in fake_quack.MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    quack._config.cache_clear()
    yield
    quack._config.cache_clear()


@pytest.mark.parametrize("divisor", [None, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["qwen", "nemotron"])
def test_a_layer_is_what_it_is_by_our_kernels(layout, routing, divisor, installed, monkeypatch):
    torch.manual_seed(0)
    module = _module(**LAYOUTS[layout])
    if divisor:
        module.grad_divisor = divisor
    ids = ROUTINGS[routing]()
    x, weight, dout = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN)
    want = _run(experts_forward, module, x, ids, weight, dout)
    asked = []
    monkeypatch.setattr(quack, "takes", lambda *layer: asked.append(layer) or True)
    got = _run(experts_forward, module, x, ids, weight, dout)
    assert asked
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-6), name


def test_a_recompute_stays_with_the_choice_of_the_forward(installed, monkeypatch):
    module, ids, weight = _module(), ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)
    x, want = (torch.full((TOKENS, HIDDEN), 0.1, requires_grad=True) for _ in range(2))
    experts_forward(module, want, ids, weight).sin().sum().backward()
    answers = iter([True, False])
    monkeypatch.setattr(quack, "takes", lambda *layer: next(answers))
    out = checkpoint(experts_forward, module, x, ids, weight, use_reentrant=False, context_fn=keep_routing)
    out.sin().sum().backward()
    torch.testing.assert_close(x.grad, want.grad, rtol=1e-5, atol=1e-5)


def test_it_takes_what_it_knows_and_nothing_else(monkeypatch):
    monkeypatch.setattr(backends, "has_quack", lambda device: True)
    x, bias = torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(EXPERTS, 64)
    up = torch.empty(EXPERTS, 96, 64, dtype=torch.bfloat16).transpose(1, 2)
    down = torch.empty(EXPERTS, 64, 48, dtype=torch.bfloat16).transpose(1, 2)
    silu = Activation("silu")
    assert quack.takes(x, up, down, None, silu)
    assert quack.takes(x, up, down, None, Activation("relu2", gated=False))
    assert not quack.takes(x, up, down, bias, silu)
    assert not quack.takes(x[:0], up, down, None, silu)
    assert not quack.takes(x.float(), up.float(), down.float(), None, silu)
    assert not quack.takes(x, up.contiguous(), down, None, silu), "[E, in, out], as GPT-OSS has it"
    assert not quack.takes(x, up, down[:, :44].transpose(1, 2).contiguous().transpose(1, 2), None, silu)
    for act in (Activation("silu", interleaved=True), Activation("clamped"), Activation("custom")):
        assert not quack.takes(x, up, down, None, act)
    monkeypatch.undo()
    assert not quack.takes(x, up, down, None, silu), "there is no Hopper GPU"


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
        assert fuse_module._how("experts") == ("quack, Triton" if found else "Triton")
        assert fuse_module._how("sink_attention") == ("flash-attn-4, Triton" if found else "Triton")
        assert fuse_module._how("rms_norm") == "Triton"
