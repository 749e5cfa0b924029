"""Tiny models of all tested families: a few thousand parameters, with every feature of the family enabled.

`expertmesh check qwen3_moe` and the tests build their models from these configurations. The router of a freshly
initialized model is nearly uniform, which would hide a wrong expert or routing weight. `tiny_model` therefore draws new
weights (std 0.2) and moves every bias, norm and router correction away from its neutral value.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from expertmesh.train.errors import check_choice

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.5,
}
# One linear-attention and one full-attention layer, the two kinds in Qwen3-Next and Qwen3.5.
GATED_DELTA_NET = {
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# Group-limited sigmoid routing with shared experts: DeepSeek-V3's router, which GLM-4.5 and Nemotron share.
GROUP_LIMITED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
# DeepSeek's latent attention.
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 150000.0}

FAMILIES: dict[str, dict] = {
    "qwen3_moe": QWEN | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 24},
    "qwen3_next": QWEN | GATED_DELTA_NET,
    "qwen3_5_moe_text": QWEN | GATED_DELTA_NET,
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.5},
    "glm4_moe": GROUP_LIMITED
    | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v3": GROUP_LIMITED
    | LATENT_ATTENTION
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "router_aux_loss_coef": 0.5,
        "rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "nemotron_h": GROUP_LIMITED
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "num_hidden_layers": 5,
        "head_dim": 8,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "ernie4_5_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
        "router_aux_loss_coef": 0.5,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.5,
    },
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 8, "moe_topk": 2},
    "deepseek_v2": GROUP_LIMITED
    | LATENT_ATTENTION
    | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "dots1": GROUP_LIMITED | {"head_dim": 8, "first_k_dense_replace": 1},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.5},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "jamba": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "router_aux_loss_coef": 0.5,
    },
}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """Return the tiny configuration of one family of `FAMILIES`; `changes` override single keys."""
    check_choice("a tiny model", model_type, list(FAMILIES))
    return AutoConfig.for_model(model_type, **COMMON | FAMILIES[model_type] | changes)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Randomize all weights in place, so that routing is far from uniform and no bias or norm is neutral."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return (torch.randn(tensor.shape, generator=generator) * std).to(tensor)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "e_score_correction_bias" in name:
            tensor.copy_(noise(tensor, 0.1))
        elif isinstance(tensor, torch.nn.Parameter):
            tensor.copy_(noise(tensor, 0.2) if tensor.ndim >= 2 else tensor + noise(tensor, 0.1))
    return model


def tiny_model(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """Return a stock Transformers model of one family, float32 on the CPU, with the weights of `randomise`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    return randomise(model, seed)
