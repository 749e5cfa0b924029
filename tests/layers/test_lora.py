"""PEFT's adapters on linear layers run in one autograd function, and equal PEFT's own forward."""

import contextlib
import copy

import peft
import pytest
import torch
from torch import nn

from expertmesh import backends
from expertmesh.layers.lora import FastLoraLinear, fuse_adapted_linears, lora_linears
from tests.models import load_ours, load_stock

PEFT_LINEAR = peft.tuners.lora.Linear
TOLERANCE = 1e-5


class Three(nn.Module):
    """Three layers that read the same x, one of them with a bias."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 16)
        self.v_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return torch.cat(lora_linears(x, self.q_proj, self.k_proj, self.v_proj), -1)


def pair(*more, dtype=torch.float32, **options):
    """(PEFT's, ours) with the same weights; each of `more` is the options of another adapter."""
    torch.manual_seed(1)
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    stock = peft.get_peft_model(Three().to(dtype), peft.LoraConfig(**defaults | options))
    for number, another in enumerate(more):
        stock.add_adapter(f"more {number}", peft.LoraConfig(**defaults | another))
    if more:
        stock.base_model.set_adapter(list(stock.peft_config))
    ours = copy.deepcopy(stock)
    base = ours.base_model.model
    fuse_adapted_linears([(base, name) for name, child in base.named_children()])
    return stock, ours


def step(model, x, seed=0):
    """Output and gradients, of x and of the adapters, as one dictionary."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad} | grads


def assert_same(got, want, tolerance=TOLERANCE):
    assert got.keys() == want.keys() and len(want) > 4
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name
        assert got[name].dtype == value.dtype, name


@pytest.fixture
def peft_forwards(monkeypatch):
    """Grows with each forward of PEFT's wrapper."""
    seen, forward = [], PEFT_LINEAR.forward
    monkeypatch.setattr(
        PEFT_LINEAR, "forward", lambda self, *args, **kw: seen.append(self) or forward(self, *args, **kw)
    )
    return seen


NATIVE = {
    "plain": {},
    "rsLoRA, ranks of their own": {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "two of three": {"target_modules": ["q_proj", "v_proj"]},
    "dropout": {"lora_dropout": 0.4},
}


@pytest.mark.parametrize("options", NATIVE)
def test_outputs_and_gradients_are_those_of_peft(options, peft_forwards):
    stock, ours = pair(**NATIVE[options])
    x = torch.randn(2, 9, 24)
    want = step(stock, x)
    peft_forwards.clear()
    assert_same(step(ours, x), want)
    assert not peft_forwards


def test_several_adapters_and_a_frozen_one(peft_forwards):
    stock, ours = pair({"r": 2, "lora_alpha": 7})
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            if "more" in name:
                parameter.requires_grad_("q_proj" in name)
    want = step(stock, torch.ones(3, 24))
    peft_forwards.clear()
    assert_same(step(ours, torch.ones(3, 24)), want)
    assert not peft_forwards


def test_a_step_saves_x_once_and_what_the_adapters_make_of_it():
    _, ours = pair()
    saved = []
    x = torch.randn(2, 9, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x)
    rows = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in saved if t.shape[0] == 18}
    assert sorted(rows.values()) == [(18, 12), (18, 24)]


OTHERS = {
    "DoRA": ({"use_dora": True}, "DoRA or another variant"),
    "biases": ({"lora_bias": True, "target_modules": ["k_proj"]}, "or have biases"),
    "the layer's bias": ({"bias": "lora_only"}, "the base layer's weight or bias trains"),
    "two, with dropout": ({"lora_dropout": 0.4}, "several are active, with dropout"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_product_of_low_rank_stays_peft_s_and_is_said_once(kind, peft_forwards, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    options, said = OTHERS[kind]
    stock, ours = pair(*[options] * kind.startswith("two"), **options)
    x = torch.randn(5, 24)
    want = step(stock, x)
    peft_forwards.clear()
    for _ in range(2):
        assert_same(step(ours, x), want)
    assert peft_forwards and capsys.readouterr().err.count(said) == 1


def test_hooks_run_and_adapters_are_switched_merged_and_mixed_as_in_peft(peft_forwards):
    stock, ours = pair({"r": 2})
    x = torch.randn(4, 24)
    places = [("base_model.model.q_proj", 1), ("base_model.model.q_proj.lora_A.default", 1)]
    for place, _ in places:
        seen = []
        handle = ours.get_submodule(place).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_same(step(ours, x), step(stock, x))
        assert seen == [1], place
        handle.remove()
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (stock, ours):
            getattr(model, change)()
        assert torch.allclose(stock(x), ours(x), atol=1e-5)
    names = ["default", "more 0", "__base__", "default"]
    for model in (stock, ours):
        model.eval()
    assert torch.allclose(stock(x, adapter_names=names), ours(x, adapter_names=names), atol=1e-6)
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(stock(x), ours(x))
    peft_forwards.clear()
    assert_same(step(ours.train(), x), step(stock.train(), x))
    assert len(peft_forwards) == 3, "PEFT's alone, stock's three"


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float32_as_peft_is(autocast, peft_forwards):
    """PEFT keeps adapters in float32, and computes with them so unless there is autocast."""
    stock, ours = pair(dtype=torch.bfloat16)
    assert stock.base_model.model.q_proj.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(64, 24).bfloat16()
    exact = step(copy.deepcopy(stock).float(), x.float())
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        want = step(stock, x)
        peft_forwards.clear()
        got = step(ours, x)
    assert not peft_forwards
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}
    for name, value in exact.items():
        theirs, mine = ((run[name].float() - value).norm() / value.norm() for run in (want, got))
        assert mine <= max(1.5 * theirs, 2**-8), name


def test_float32_weights_under_autocast_stay_peft_s(peft_forwards):
    stock, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        want = step(stock, torch.ones(3, 24))
        peft_forwards.clear()
        assert_same(step(ours, torch.ones(3, 24)), want)
    assert len(peft_forwards) == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_fused_model_keeps_its_fusions_and_computes_every_adapter_here(family, peft_forwards):
    def adapted(model, **options):
        torch.manual_seed(9)
        exclude = ["out_proj"] if family == "nemotron_h" else None
        defaults = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "exclude_modules": exclude}
        return peft.get_peft_model(model, peft.LoraConfig(**defaults, **options)).train()

    experts = {"gpt_oss": "gate_up_proj", "nemotron_h": "up_proj"}  # which PEFT does not know
    named = {"target_parameters": [f"experts.{experts[family]}", "experts.down_proj"]} if family in experts else {}
    stock, ours = adapted(load_stock(family), **named), adapted(load_ours(family))
    ids = torch.arange(3, 19).view(2, 8)
    want = step_of(stock, ids)
    peft_forwards.clear()
    assert_same(step_of(ours, ids), want)
    assert not peft_forwards
    fast = [m for m in ours.modules() if hasattr(m, "why_not") and hasattr(type(m), "__stock__")]
    assert fast and not [m for m in fast if m.why_not(m)]
    assert sum(isinstance(m, FastLoraLinear) for m in ours.modules()) > 3
    assert not any(isinstance(m, FastLoraLinear) for m in stock.modules())


def step_of(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
