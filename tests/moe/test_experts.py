"""One autograd function equals Transformers' grouped_mm experts, in every layout, in PyTorch and in Triton."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from expertmesh import backends
from expertmesh.kernels import grouped_gemm, grouped_grads
from expertmesh.moe import experts as moe_experts
from expertmesh.moe.experts import activation_of, experts_forward

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 6, 40, 24, 37, 3


def _module(*, gate=True, bias=False, transposed=False, interleaved=False, act="silu", clamped=False):
    """An experts module as Transformers' modeling files write them, with every flag free."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, up = EXPERTS, 2 * WIDTH if gate else WIDTH
            shape = lambda rows, columns: (EXPERTS, columns, rows) if transposed else (EXPERTS, rows, columns)  # noqa: E731
            name = "gate_up_proj" if gate else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(shape(up, HIDDEN)) * 0.5))
            self.down_proj = nn.Parameter(torch.randn(shape(HIDDEN, WIDTH)) * 0.5)
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, up)))
                self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
            self.act_fn, self.alpha, self.limit = ACT2FN[act], 1.702, 2.0

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("replaced by the decorator")

    if interleaved and not clamped:

        def _apply_gate(self, gate_up):
            return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

        Experts._apply_gate = _apply_gate
    if clamped:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        Experts._apply_gate = GptOssExperts._apply_gate
    decorate = use_experts_implementation(
        is_concatenated=not interleaved, is_transposed=transposed, has_bias=bias, has_gate=gate
    )
    return decorate(Experts)(None)


LAYOUTS = {
    "qwen": dict(),
    "qwen, biased": dict(bias=True),
    "qwen, transposed": dict(transposed=True),
    "gpt-oss": dict(bias=True, transposed=True, interleaved=True, clamped=True),
    "gpt-oss, plain": dict(interleaved=True, clamped=True),
    "nemotron": dict(gate=False, act="relu2"),
    "nemotron, biased": dict(gate=False, act="relu2", bias=True, transposed=True),
    "gelu gate": dict(act="gelu"),
    "gelu, no gate": dict(gate=False, act="gelu"),
    "own interleaved gate": dict(interleaved=True),
}
ROUTINGS = {
    "random": lambda: torch.randn(TOKENS, EXPERTS).topk(TOP_K).indices,
    "an empty expert": lambda: (torch.randn(TOKENS, EXPERTS) - 99 * torch.eye(EXPERTS)[2]).topk(TOP_K).indices,
    "all on the same": lambda: torch.tensor([[0, 4, 5]]).repeat(TOKENS, 1),
    "not all here": lambda: torch.randn(TOKENS, EXPERTS + 1).topk(TOP_K).indices,
    "none here": lambda: torch.full((TOKENS, TOP_K), EXPERTS),
}


def _run(forward, module, x, ids, weight, dout):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    module.zero_grad()
    out = forward(module, x, ids, weight)
    out.backward(dout)
    return {"out": out.detach(), "x": x.grad, "weight": weight.grad} | {n: p.grad for n, p in module.named_parameters()}


PATHS = ["reference", "triton", "triton by pointers", "triton with room for few"]
QUICK = {"random": PATHS[:2], "not all here": [PATHS[0], PATHS[3]]}  # paths besides the reference that are not slow


@pytest.mark.parametrize(
    ("routing", "path"),
    [
        pytest.param(routing, path, marks=[] if path in quick else [pytest.mark.slow])
        for routing, quick in {**dict.fromkeys(ROUTINGS, PATHS[:1]), **QUICK}.items()
        for path in PATHS
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_equal_transformers(layout, routing, path, nan_memory, monkeypatch):
    torch.manual_seed(0)
    if path == "triton by pointers":  # as on GPUs without a TMA unit
        for module in (grouped_gemm, grouped_grads):
            monkeypatch.setattr(module, "by_descriptor", lambda device: False)
    if path == "triton with room for few":  # as on a rank that gets more than its share
        up_act = moe_experts.up_act
        monkeypatch.setattr(moe_experts, "up_act", lambda *inputs: up_act(*inputs[:-1], keep=16))
    module = _module(**LAYOUTS[layout])
    ids = ROUTINGS[routing]()
    x, weight, dout = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN)
    if "here" in routing:
        module._is_expert_parallel = True
        weight = torch.where(ids < EXPERTS, weight, 0)
    want = _run(grouped_mm_experts_forward, module, x, ids, weight, dout)
    want["weight"] = torch.where(
        ids < EXPERTS, want["weight"], 0
    )  # stock leaves the gradient of absent pairs undefined
    # without kernels, rows of nobody pass through autograd, too
    anomalies = torch.autograd.set_detect_anomaly(path != "reference" or "here" not in routing)
    with backends.interpreted() if path != "reference" else contextlib.nullcontext(), nan_memory(), anomalies:
        got = _run(experts_forward, module, x, ids, weight, dout)
    for name, value in want.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert ((got[name] - value).abs().max() / scale) < 1e-5, name


def test_columns_in_turns_are_pulled_apart_in_half_precision_too():
    torch.manual_seed(0)
    module = _module(**LAYOUTS["gpt-oss"])
    module.limit = 1e3  # rounding must not move a value across it
    ids, weight = ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)
    x, dout = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    want = _run(experts_forward, module, x, ids, weight, dout)
    with backends.interpreted():
        got = _run(experts_forward, module.half(), x.half(), ids, weight, dout.half())
    for name, value in want.items():
        assert (got[name] - value).norm() < 3e-3 * value.norm(), name


def test_a_gradient_without_memory_of_its_own_is_read_as_what_it_says():
    """As `sum` gives it: one number for all."""
    torch.manual_seed(0)
    module, ids = _module(), ROUTINGS["random"]()
    x, weight, dout = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.ones(())
    want = _run(experts_forward, module, x, ids, weight, dout.repeat(TOKENS, HIDDEN))
    with backends.interpreted():
        got = _run(experts_forward, module, x, ids, weight, dout.expand(TOKENS, HIDDEN))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_every_kind_of_activation_is_recognised():
    kinds = {name: activation_of(_module(**flags)).kind for name, flags in LAYOUTS.items()}
    assert kinds["qwen"] == "silu" and kinds["gpt-oss"] == "clamped" and kinds["nemotron"] == "relu2"
    assert kinds["own interleaved gate"] == "silu", "whatever it is called, it computes that"
    assert kinds["gelu gate"] == kinds["gelu, no gate"] == "custom"


@pytest.mark.parametrize("path", [contextlib.nullcontext, backends.interpreted], ids=["reference", "triton"])
def test_backward_keeps_x_and_h_and_nothing_else_of_the_rows_size(path):
    module = _module()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    ids, weight = ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)
    saved = []
    with path(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts_forward(module, x, ids, weight)
    parameters = {p.data_ptr() for p in module.parameters()}
    activations = [t for t in saved if t.is_floating_point() and t.data_ptr() not in parameters]
    assert sorted(t.numel() for t in activations if t.dim() == 2 and t.shape[1] > TOP_K) == [
        TOKENS * HIDDEN,
        TOKENS * TOP_K * 2 * WIDTH,
    ]


def test_what_a_later_transformers_says_of_experts_keeps_them_stock(monkeypatch):
    module = _module()
    monkeypatch.setattr(moe_experts, "_NEW_FLAGS", ["has_something_new"])
    assert moe_experts.why_not(module) is None
    module.has_something_new = True
    assert "sets has_something_new" in moe_experts.why_not(module)


def test_transformers_says_nothing_of_experts_that_is_not_known_here():
    assert moe_experts._NEW_FLAGS == []


def test_frozen_experts_cost_no_weight_gradient():
    module = _module()
    module.requires_grad_(False)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    experts_forward(module, x, ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in module.parameters())


def test_a_recompute_ends_before_the_down_projection(monkeypatch):
    module, ids, weight = _module(), ROUTINGS["random"](), torch.rand(TOKENS, TOP_K)
    made, gemm = [], moe_experts.grouped_gemm
    monkeypatch.setattr(
        moe_experts, "grouped_gemm", lambda a, by, group: made.append(by.w.shape[1:]) or gemm(a, by, group)
    )
    want = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    x = want.detach().clone().requires_grad_()
    experts_forward(module, want, ids, weight).sin().sum().backward()
    down, up_dgrad = made
    checkpoint(experts_forward, module, x, ids, weight, use_reentrant=False).sin().sum().backward()
    assert made[2:] == [down, up_dgrad], "one down-projection, of the forward"
    assert torch.equal(x.grad, want.grad)


@pytest.mark.parametrize("trained", ["nothing", "up", "down", "weights", "residual"])
def test_whatever_is_trained_gets_its_gradient_alone(trained):
    module, ids = _module(bias=True), ROUTINGS["random"]()
    module.requires_grad_(False)
    x, weight, residual = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), torch.randn(TOKENS, HIDDEN)
    leaf = {"up": module.gate_up_proj_bias, "down": module.down_proj, "weights": weight, "residual": residual}
    if trained != "nothing":
        leaf[trained].requires_grad_()
    want = residual + grouped_mm_experts_forward(module, x, ids, weight)
    got = experts_forward(module, x, ids, weight, residual)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.requires_grad == want.requires_grad == (trained != "nothing")
    if trained != "nothing":
        dout = torch.randn_like(got)
        grads = [torch.autograd.grad(out, leaf[trained], dout)[0] for out in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
