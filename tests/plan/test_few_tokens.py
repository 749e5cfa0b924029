"""With few tokens, where weights and their gradients are what stands, a step never needs more than stock's."""

import pytest
from transformers import Glm4MoeConfig, GptOssConfig, MixtralConfig

from expertmesh.plan.memory import Job, trace

GLM = dict(hidden_size=5120, num_attention_heads=96, num_key_value_heads=8, head_dim=128, vocab_size=151552)
GLM |= dict(intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, first_k_dense_replace=1)
CONFIGS = {
    "large experts": MixtralConfig(num_hidden_layers=2),
    "many experts": Glm4MoeConfig(num_hidden_layers=2, **GLM),
    "large head": GptOssConfig(num_hidden_layers=2),
}


@pytest.mark.parametrize("released", [False, True], ids=["gradients stand", "gradients are released"])
@pytest.mark.parametrize("case", CONFIGS)
def test_few_tokens_need_no_more_than_in_stock_transformers(case, released):
    job = Job(CONFIGS[case], batch=1, seq=128, released=released)
    ours, stock = (trace(Job(**vars(job) | {"fused": fused}), 140 * 2**30).peak for fused in (True, False))
    assert sum(ours.values()) <= 1.001 * sum(stock.values()), (ours, stock)
