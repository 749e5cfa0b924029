"""On a GPU: adapters by products of low rank are no further from float32 than PEFT's sum of whole weights."""

import copy

import pytest
import torch
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh.moe.experts import experts_forward
from expertmesh.moe.lora import factor_of
from tests.layers import test_lora as linear_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

EXPERTS, TOP_K, HIDDEN, WIDTH, RANK = 16, 4, 512, 320, 8
MODULES = {
    "gated": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH)
    ),
    "interleaved, transposed, biased": lambda: GptOssExperts(
        GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    ),
    "without a gate": lambda: NemotronHExperts(
        NemotronHConfig(n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH)
    ),
}


def names(module):
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def run(module, way, x, ids, weights, factors, dout):
    """Output and gradients of x, weights and factors; `way` puts the factors where the experts find them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weights, *factors)]
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    out = way(module, leaves[0], ids, leaves[1], *leaves[2:])
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def native(module, x, ids, weights, *factors):
    dtype, count = module.down_proj.dtype, len(module.down_proj)
    made = [factor_of(factor, bool(n % 2), 1.0 + n % 2, count, slice(None), dtype) for n, factor in enumerate(factors)]
    module.low_rank = dict(zip(names(module), (made[:2], made[2:]), strict=True))
    try:
        return experts_forward(module, x, ids, weights)
    finally:
        del module.low_rank


def whole(module, x, ids, weights, *factors):
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    for name, a, b in zip(names(module), factors[::2], factors[1::2], strict=True):
        kept = other._parameters.pop(name)
        delta = b.view(len(b), -1, len(kept)).permute(2, 0, 1) @ a.view(len(kept), -1, a.shape[1])  # [E, out, in]
        delta = delta.transpose(1, 2) if module.is_transposed else delta
        vars(other)[name] = kept + 2.0 * delta.to(kept.dtype)
    return experts_forward(other, x, ids, weights)


@pytest.mark.parametrize("layout", MODULES)
@pytest.mark.parametrize("tokens", [1, 700, 3000])
def test_no_further_from_float32_than_whole_weights(layout, tokens):
    torch.manual_seed(0)
    module = MODULES[layout]()
    module.config._experts_implementation = "expertmesh"
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inner, columns = WIDTH, WIDTH * (2 if module.has_gate else 1)
    sides = (RANK * EXPERTS, HIDDEN), (columns, RANK * EXPERTS), (RANK * EXPERTS, inner), (HIDDEN, RANK * EXPERTS)
    factors = [torch.randn(side) * 0.05 for side in sides]
    x, dout = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN).bfloat16()
    scores = torch.randn(tokens, EXPERTS)
    scores[:, 3] = -9  # an expert without tokens
    weights, ids = scores.softmax(-1).topk(TOP_K)
    module.bfloat16()
    exact = run(copy.deepcopy(module).float(), whole, x.float(), ids, weights, factors, dout.float())
    module.cuda()
    inputs = [tensor.cuda() for tensor in (x, ids, weights)], [factor.cuda() for factor in factors], dout.cuda()
    ours, theirs = (run(module, way, *inputs[0], *inputs[1:]) for way in (native, whole))
    for name, mine, other, truth in zip("out x weights A B A B".split(), ours, theirs, exact, strict=True):
        error, theirs_error = ((found.detach().cpu().float() - truth.detach()).norm() for found in (mine, other))
        most = 1.5 if tokens > 100 else 3.0  # the error of a few numbers is chance
        assert error <= max(most * theirs_error, 2e-3 * truth.detach().norm()), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [1, 700])
def test_linear_layers_are_as_near_to_float32_as_peft_is(tokens, autocast):
    stock, ours = (model.cuda() for model in linear_layers.pair(dtype=torch.bfloat16))
    x = torch.randn(tokens, 24, device="cuda").bfloat16()
    exact = linear_layers.step(copy.deepcopy(stock).float(), x.float())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        theirs, mine = linear_layers.step(stock, x), linear_layers.step(ours, x)
    for name, value in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        errors = [(run[name].float() - value).norm() / value.norm() for run in (theirs, mine)]
        assert errors[1] <= max(1.5 * errors[0], 2**-8), name
