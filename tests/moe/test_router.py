"""Routers' twins give what their HF classes give under settings that the usual configurations do not reach."""

import copy

import pytest
import torch

from expertmesh import fuse
from expertmesh.bench.rows import relative_error
from expertmesh.bench.tiny import tiny_model
from expertmesh.moe.block import routers
from expertmesh.twins import Fast

CASES = [
    ("ernie4_5_moe", {"moe_norm_min": 0.7}),  # some sums are below, some above
    ("ernie4_5_moe", {"moe_norm_min": 1e-12}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 3.0}),
    ("nemotron_h", {"routed_scaling_factor": 0.5, "n_group": 1, "topk_group": 1}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("hunyuan_v1_moe", {"moe_topk": 3}),
    ("granitemoe", {"num_experts_per_tok": 1}),
    ("gpt_oss", {"num_experts_per_tok": 3}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_equals_its_class(family, changes, dtype):
    stock = tiny_model(family, **changes).to(dtype)
    ours = fuse(copy.deepcopy(stock))
    pairs = list(zip(routers(stock), routers(ours), strict=True))
    assert pairs
    for (name, theirs), (_, fast) in pairs:
        assert isinstance(fast, Fast), name
        x_TH = torch.randn(64, stock.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
        found = []
        for router in (theirs, fast):
            x = x_TH.clone().requires_grad_()
            logits, weights, ids = router(x)
            order = ids.argsort(-1)
            (grad,) = torch.autograd.grad(weights.gather(-1, order).square().sum(), x)
            found.append((logits.detach(), weights.detach().gather(-1, order), ids.gather(-1, order), grad))
        for want, got in zip(*found, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert relative_error(got, want) <= (1e-5 if dtype == torch.float32 else 2e-2)  # the way back in float32
