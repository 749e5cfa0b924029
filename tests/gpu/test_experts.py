"""On a GPU, in bf16, at real widths: the Triton experts and routers are no further from float32 than stock's are."""

import copy
import importlib.util

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh.kernels import quack
from expertmesh.kernels.grouping import group_by_expert, group_by_expert_reference
from expertmesh.kernels.router import Routing, route, route_reference
from expertmesh.moe.experts import experts_forward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXPERTS = {
    "qwen3": (Qwen3MoeExperts, Qwen3MoeConfig(num_experts=64, hidden_size=2048, moe_intermediate_size=768), 8),
    "odd": (Qwen3MoeExperts, Qwen3MoeConfig(num_experts=10, hidden_size=328, moe_intermediate_size=104), 3),
    "gpt_oss": (GptOssExperts, GptOssConfig(num_local_experts=32, hidden_size=2880, intermediate_size=720), 4),
    "nemotron": (
        NemotronHExperts,
        NemotronHConfig(n_routed_experts=32, hidden_size=2688, moe_intermediate_size=464),
        6,
    ),
}


def _build(name, dtype):
    torch.manual_seed(0)
    cls, config, top_k = EXPERTS[name]
    with torch.device("cuda"):
        module = cls(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module.to(dtype), config, top_k


def _inputs(module, config, top_k, tokens, kind):
    num_experts = module.num_experts
    logits = torch.randn(tokens, num_experts, device="cuda")
    if kind == "empty":
        logits[:, : num_experts // 2] = -1e4
    if kind == "one":
        logits = torch.randn(1, num_experts, device="cuda").expand(tokens, -1)
    if kind == "zipf":
        logits = logits - 1.2 * torch.log(torch.arange(1, num_experts + 1, device="cuda"))
    weight, ids = logits.softmax(-1).topk(top_k)
    return torch.randn(tokens, config.hidden_size, device="cuda"), ids, weight


def _run(forward, module, x, ids, weight, dout):
    x = x.detach().to(next(module.parameters()).dtype).clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    module.zero_grad()
    out = forward(module, x, ids, weight)
    out.backward(dout.to(out.dtype))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weight": weight.grad, **grads}


def _float32_reference(module, x, ids, weight, dout):
    original = type(module).forward.__wrapped__  # the loop over experts that the registry replaces
    return _run(original, module, x, ids, weight, dout)


def _error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("kind", ["random", "zipf", "empty", "one"])
@pytest.mark.parametrize("name", EXPERTS)
def test_triton_experts_are_as_close_to_float32_as_stock(name, kind):
    module, config, top_k = _build(name, torch.float32)
    x, ids, weight = _inputs(module, config, top_k, 1000, kind)
    x = x.bfloat16().float()
    dout = torch.randn_like(x).bfloat16().float()
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    want = _float32_reference(module, x, ids, weight, dout)
    exact = _run(experts_forward, module, x, ids, weight, dout)
    module = copy.deepcopy(module).bfloat16()  # gradients of the float32 runs stay float32
    stock = _run(grouped_mm_experts_forward, module, x, ids, weight, dout)
    ours = _run(experts_forward, module, x, ids, weight, dout)
    for key in want:
        assert _error(exact[key], want[key]) < 1e-5, key
        assert _error(ours[key], want[key]) <= 1.5 * _error(stock[key], want[key]) + 1e-6, key


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", ["odd", "qwen3", "nemotron"])
def test_experts_backward_leaves_no_unwritten_memory(name, elsewhere):
    module, config, top_k = _build(name, torch.bfloat16)
    x, ids, weight = _inputs(module, config, top_k, 777, "empty")
    if elsewhere:  # as between ranks: half of the pairs are not for these experts
        ids = torch.where(torch.rand_like(weight) < 0.5, module.num_experts, ids)
    dout = torch.randn_like(x)
    first = _run(experts_forward, module, x, ids, weight, dout)
    for _ in range(3):
        poison = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
        del poison
        again = _run(experts_forward, module, x, ids, weight, dout)
        for key in first:
            assert torch.equal(first[key], again[key]) and again[key].isfinite().all(), key


@pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="needs quack-kernels")
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper")
@pytest.mark.parametrize("tokens", [1, 1000, 6000])
@pytest.mark.parametrize(("name", "products"), [("qwen3", 4), ("nemotron", 4), ("gpt_oss", 3)])
def test_quack_computes_what_triton_does(name, products, tokens, monkeypatch):
    module, config, top_k = _build(name, torch.bfloat16)
    x, ids, weight = _inputs(module, config, top_k, tokens, "random")
    ids = torch.where(torch.rand_like(weight) < 0.3, module.num_experts, ids)
    dout, asked, takes = torch.randn_like(x), [], quack.supports
    monkeypatch.setattr(quack, "supports", lambda *product: asked.append(takes(*product)) or asked[-1])
    got = _run(experts_forward, module, x, ids, weight, dout)
    monkeypatch.setattr(quack, "supports", lambda *product: False)
    want = _run(experts_forward, module, x, ids, weight, dout)
    many = tokens * top_k >= quack.MIN_ROWS * module.num_experts and name != "gpt_oss"
    assert asked == [True] * (products + many)
    for key in want:
        assert _error(got[key], want[key]) < 1e-2, key


@pytest.mark.parametrize("tokens", [1, 3, 1000, 16384])
def test_grouping_matches_a_stable_sort(tokens):
    ids, weight = torch.randint(0, 129, (tokens, 8), device="cuda"), torch.rand(tokens, 8, device="cuda")
    got, want = group_by_expert(ids, 128, weight), group_by_expert_reference(ids, 128, weight)
    assert torch.equal(got.bounds, want.bounds) and torch.equal(got.token_S, want.token_S)
    assert torch.equal(got.position_TK, want.position_TK)


ROUTINGS = {
    "qwen3": (Routing("softmax", 8, normalize=True), 128),
    "olmoe": (Routing("softmax", 8), 64),
    "gpt_oss": (Routing("topk_softmax", 4), 32),
    "deepseek": (Routing("sigmoid", 8, True, 2.5, num_groups=8, top_groups=4), 256),
    "nemotron": (Routing("sigmoid", 6, True, 2.5), 100),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_router_kernel_matches_its_reference(name):
    routing, num_experts = ROUTINGS[name]
    logits = torch.randn(1001, num_experts, device="cuda", requires_grad=True)
    bias = torch.randn(num_experts, device="cuda") * 0.1 if routing.kind == "sigmoid" else None
    weight, ids = route(logits, routing, bias)
    want_weight, want_ids = route_reference(logits, routing, bias)
    assert torch.equal(ids.sort(-1).values, want_ids.sort(-1).values)
    probe = torch.randn(num_experts, device="cuda")
    (grad,) = torch.autograd.grad((weight * probe[ids]).sum(), logits)
    (want_grad,) = torch.autograd.grad((want_weight * probe[want_ids]).sum(), logits)
    torch.testing.assert_close(weight.sort(-1).values, want_weight.sort(-1).values)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral"])
def test_a_training_step_never_waits_for_the_device(family):
    from expertmesh import AutoModelForCausalLM

    sizes = dict(vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = {
        "qwen3_moe": lambda: Qwen3MoeConfig(**sizes, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2),
        "gpt_oss": lambda: GptOssConfig(**sizes, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2),
        "mixtral": lambda: MixtralConfig(**sizes, intermediate_size=128),
        "deepseek_v3": lambda: DeepseekV3Config(
            **(sizes | dict(num_key_value_heads=4)), moe_intermediate_size=128, n_routed_experts=8, n_group=2,
            topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64,
        ),
        "nemotron_h": lambda: NemotronHConfig(
            **(sizes | dict(num_hidden_layers=3)), layers_block_type=["full_attention", "moe", "mlp"],
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
            moe_shared_expert_intermediate_size=128, moe_latent_size=128, mamba_num_heads=8, mamba_head_dim=64,
        ),
    }[family]()  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    ids = torch.randint(0, 512, (2, 96), device="cuda")
    step = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # noqa: E731
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
