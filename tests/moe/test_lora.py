"""Adapters on experts are computed as products of low rank, and equal PEFT's sum of whole weights."""

import contextlib
import copy
import re

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import grouped_mm_experts_forward

import expertmesh
from expertmesh import backends
from expertmesh.bench.tiny import tiny_model
from expertmesh.moe import experts as moe_experts
from expertmesh.moe.experts import experts_forward
from tests.models import load_ours, load_stock
from tests.moe.test_experts import EXPERTS, HIDDEN, LAYOUTS, ROUTINGS, TOKENS, TOP_K, WIDTH, _module

TARGETS = {
    "qwen3_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "deepseek_v3": ["experts.gate_up_proj", "experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
}
WIDTHS = {"gpt_oss": {"intermediate_size": 40}, "nemotron_h": {"moe_intermediate_size": 40, "moe_latent_size": 24}}
TOLERANCE = 1e-5


class WholeWeights(TorchDispatchMode):
    """Names what makes a tensor with the sizes of some weight of the experts, in any order."""

    def __init__(self, model):
        super().__init__()
        weights = [p for name, p in model.named_parameters() if "experts" in name and p.ndim == 3]
        self.sizes = {tuple(sorted(weight.shape)) for weight in weights}
        self.theirs = {weight.untyped_storage().data_ptr() for weight in weights}
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            large = isinstance(x, torch.Tensor) and tuple(sorted(x.shape)) in self.sizes
            if large and x.untyped_storage().data_ptr() not in self.theirs:
                self.made.append(str(function))
        return out


def pair(family="qwen3_moe", **options):
    """(stock, ours) with adapters, and experts of a width that nothing else has."""
    widths = WIDTHS.get(family, {"moe_intermediate_size": 40})
    models = tiny_model(family, **widths), expertmesh.fuse(tiny_model(family, **widths))
    return [adapt(model, family, **options) for model in models]


def adapt(model, family="qwen3_moe", **options):
    torch.manual_seed(9)
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    targets = {"target_modules": [], "target_parameters": TARGETS[family]}
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | targets | options))


def batch(model, packed=False):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (1 if packed else 2, 14), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(9)])[None]
        inputs["labels"][0, [0, 5]] = -100
    return inputs


def step(model, **inputs):
    """(loss, the adapters' gradients, what was made of a whole weight's size)."""
    model.train().zero_grad()
    with WholeWeights(model) as whole:
        loss = model(**inputs).loss
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, whole.made


def assert_same(ours, stock):
    assert ours[0] == pytest.approx(stock[0], rel=TOLERANCE)
    assert ours[1].keys() == stock[1].keys() and len(stock[1]) >= 4
    for name, grad in stock[1].items():
        assert (ours[1][name] - grad).abs().max() <= TOLERANCE * grad.abs().max(), name


@pytest.mark.parametrize("family", TARGETS)
def test_loss_and_gradients_are_those_of_peft_and_no_whole_weight_is_made(family):
    options = {"rank_pattern": {".*experts.down_proj": 6}, "alpha_pattern": {".*experts.down_proj": 5}}
    stock, ours = [step(model, **batch(model)) for model in pair(family, use_rslora=True, **options)]
    assert_same(ours, stock)
    assert not ours[2] and stock[2], "the count sees what PEFT makes"


def test_packed_rows_and_recomputed_layers():
    models = pair()
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stock, ours = [step(model, **batch(model, packed=True)) for model in models]
    assert_same(ours, stock)
    assert not ours[2]


def test_adapters_are_switched_merged_saved_and_loaded_as_peft_does(tmp_path):
    """Several at once, none, another one, merged, merged and taken back, and read again by stock."""
    models = [adapt(load("qwen3_moe")) for load in (load_stock, load_ours)]
    for model in models:
        torch.manual_seed(10)
        more = peft.LoraConfig(r=3, target_parameters=TARGETS["qwen3_moe"], target_modules=[], init_lora_weights=False)
        model.add_adapter("more", more)
    stock, ours = models
    inputs = batch(stock)

    def assert_alike():
        assert_same(*(step(model, **inputs) for model in (ours, stock)))

    for active in (["default", "more"], ["more"]):
        for model in models:
            model.base_model.set_adapter(active)
        assert_alike()
    losses = []
    for model in models:
        with model.disable_adapter(), torch.no_grad():
            losses.append(model(**inputs).loss.item())
    plain = load_stock("qwen3_moe")(**inputs).loss.item()
    assert losses == pytest.approx([plain, plain], rel=TOLERANCE) and losses[1] != step(ours, **inputs)[0]
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in models:
            getattr(model, change)()
        losses = [model(**inputs).loss.item() for model in models]
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert_alike()
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load_stock("qwen3_moe"), tmp_path / "more")
    merged = ours.merge_and_unload(adapter_names=["more"])
    losses = [model(**inputs).loss.item() for model in (again, merged, stock)]
    assert losses[:2] == pytest.approx(losses[2:] * 2, rel=TOLERANCE)
    assert type(merged.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_a_stock_model_beside_a_fused_one_stays_peft_s():
    stock, ours = pair()
    step(ours, **batch(ours))
    assert step(stock, **batch(stock))[2]
    wrappers = [[m for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)] for model in (ours, stock)]
    assert all(type(m) is peft.tuners.lora.ParamWrapper for m in wrappers[1])
    assert all(type(m) is not peft.tuners.lora.ParamWrapper for m in wrappers[0]) and len(wrappers[0]) == 4


def test_what_runs_elsewhere_is_left_to_peft():
    """Another backend, chosen later; and a copy of the model, which is fast as well."""
    stock, ours = pair()
    want = step(stock, **batch(stock))
    assert_same(step(ours, **batch(ours)), want)
    copied = copy.deepcopy(ours)
    ours.base_model.model.set_experts_implementation("grouped_mm")
    got = step(ours, **batch(ours))
    assert_same(got, want)
    assert got[2]
    got = step(copied, **batch(copied))
    assert_same(got, want)
    assert not got[2]


def all_linear(family, **options):
    return adapt(load_ours(family), target_modules="all-linear", target_parameters=None, **options)


@pytest.mark.parametrize(
    ("family", "options", "routers"),
    [
        ("qwen3_moe", {}, "routers 3"),
        ("gpt_oss", {}, "routers 0"),
        ("qwen2_moe", {}, "routers 0"),
        ("nemotron_h", {"exclude_modules": ["out_proj"]}, "routers 0"),
        ("gpt_oss", {"lora_dropout": 0.1}, "routers 0"),
    ],
)
def test_all_linear_reaches_the_experts_and_a_line_says_once_what_trains(family, options, routers, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    model = all_linear(family, **options)
    told = capsys.readouterr().err
    reached = "lora_dropout" not in options  # which PEFT refuses on parameters
    assert (
        "all-linear leaves the routed experts as they are: adapters on them take no lora_dropout" in told
    ) != reached
    for _ in range(2):
        step(model, **batch(model))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " trains " in line]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trains {trained:,} parameters: " in line and routers in line and "attention" in line
    assert (re.search(r"routed experts \d", line) is not None) == reached
    advice = "LoraConfig(target_parameters=['experts.down_proj', 'experts.gate_up_proj'])"
    assert (advice in line) != reached


def test_all_linear_leaves_a_frozen_router_and_stock_models_alone():
    """Frozen before the adapters come, that is: PEFT freezes all."""
    model = load_ours("qwen3_moe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("mlp.gate.weight"))
    names = {
        name for name, _ in peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).named_parameters()
    }
    assert not any(".gate.lora" in name for name in names) and any(".experts.lora" in name for name in names)
    stock = adapt(load_stock("gpt_oss"), target_modules="all-linear", target_parameters=None)
    assert not any("experts.lora" in name or "experts.base_layer.lora" in name for name, _ in stock.named_parameters())


# --- the products, in every layout, in PyTorch and in Triton


def factors(rank, *sizes):
    return {name: [torch.randn(EXPERTS, rank, size) * 0.3 for size in pair] for name, pair in sizes}


def run(forward, module, pairs, x, ids, weight, dout):
    """Output and gradients of x, weight and factors; `forward` gets the module with or without the factors in it."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    pairs = {name: [factor.clone().requires_grad_() for factor in pair] for name, pair in pairs.items()}
    out = forward(module, pairs, x, ids, weight)
    out.backward(dout)
    grads = {f"{name} {side}": f.grad for name, pair in pairs.items() for side, f in zip("AB", pair, strict=True)}
    return {"out": out.detach(), "x": x.grad, "weight": weight.grad} | grads


def materialised(module, pairs, *inputs):
    for name, (a, b) in pairs.items():
        weight = module._parameters.pop(name)
        delta = b.transpose(1, 2) @ a  # [E, out, in]
        vars(module)[name] = weight + (delta.transpose(1, 2) if module.is_transposed else delta)
    try:
        return grouped_mm_experts_forward(module, *inputs)
    finally:
        for name in pairs:
            del vars(module)[name]


def native(module, pairs, *inputs):
    module.low_rank = pairs
    return experts_forward(module, *inputs)


def test_backward_keeps_two_thin_tensors_more():
    module, saved = _module().requires_grad_(False), []
    module.low_rank = factors(16, ("gate_up_proj", (HIDDEN, 2 * WIDTH)), ("down_proj", (WIDTH, HIDDEN)))
    for pair in module.low_rank.values():
        for factor in pair:
            factor.requires_grad_()
    x, ids, weight = torch.randn(TOKENS, HIDDEN), ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts_forward(module, x, ids, weight)
    rows, kept = TOKENS * TOP_K, [tuple(t.shape) for t in saved if t.is_floating_point() and t.ndim == 2]
    want = [(TOKENS, HIDDEN), (rows, 2 * WIDTH), (TOKENS, TOP_K), (rows, 16), (rows, 16)]
    assert sorted(kept) == sorted(want)


QUICK = {("qwen", "triton"), ("gpt-oss", "triton with room for few")}


@pytest.mark.parametrize(
    ("layout", "path"),
    [
        pytest.param(layout, path, marks=[] if path == "reference" or (layout, path) in QUICK else [pytest.mark.slow])
        for layout in ("qwen", "gpt-oss", "nemotron", "nemotron, biased", "gelu gate")
        for path in ("reference", "triton", "triton with room for few")
    ],
)
def test_factors_give_what_whole_weights_give(layout, path, nan_memory, monkeypatch):
    if path == "triton with room for few":
        up_act = moe_experts.up_act
        monkeypatch.setattr(moe_experts, "up_act", lambda *inputs: up_act(*inputs[:-1], keep=16))
    torch.manual_seed(0)
    flags = LAYOUTS[layout]
    up = ("gate_up_proj", 2 * WIDTH) if flags.get("gate", True) else ("up_proj", WIDTH)
    pairs = factors(32 if layout == "qwen" else 16, (up[0], (HIDDEN, up[1])), ("down_proj", (WIDTH, HIDDEN)))
    if layout == "nemotron":
        del pairs["down_proj"]
    if layout == "gelu gate":
        del pairs["gate_up_proj"]
    ids = ROUTINGS["not all here" if layout == "qwen" else "an empty expert"]()
    x, weight, dout = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN)
    module = _module(**flags)
    module._is_expert_parallel = True
    weight = torch.where(ids < EXPERTS, weight, 0)
    want = run(materialised, copy.deepcopy(module), pairs, x, ids, weight, dout)
    want["weight"] = torch.where(ids < EXPERTS, want["weight"], 0)
    module.requires_grad_(False)
    with backends.interpreted() if path != "reference" else contextlib.nullcontext(), nan_memory():
        got = run(native, module, pairs, x, ids, weight, dout)
    for name, value in want.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert ((got[name] - value).abs().max() / scale) < TOLERANCE, name
