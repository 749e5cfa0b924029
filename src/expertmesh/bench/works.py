"""The models of `expertmesh bench`: each has the widths of the checkpoint in its name, but only a few layers.

Widths are those of the published configurations; weights are random. The number of layers is chosen so that the full
training state of stock Transformers fits on one 141 GB GPU.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from expertmesh.bench.tiny import tiny_config

# Nemotron-3-Nano-30B-A3B's 52 layers: M Mamba2, E experts, * attention
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NEMOTRON_LAYERS = {"M": "linear_attention", "E": "moe", "*": "full_attention"}


@dataclass(frozen=True)
class Work:
    """One model to train. `proof` overrides widths for the float32 parity run if the full width is too large.

    `attention` is the fastest implementation of stock Transformers on a GPU, used by all stock arms; ours use
    their default.
    """

    model_type: str
    layers: int
    tiny_layers: int
    proof_layers: int
    widths: dict[str, Any]
    attention: str = "sdpa"
    proof: dict[str, Any] = field(default_factory=dict)


WORKS = {
    "qwen3-30b-a3b": Work(
        model_type="qwen3_moe",
        layers=8,
        tiny_layers=3,
        proof_layers=2,
        widths={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "nemotron-3-nano": Work(
        model_type="nemotron_h",
        layers=13,
        tiny_layers=6,
        proof_layers=6,
        widths={
            "vocab_size": 131072,
            "hidden_size": 2688,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "chunk_size": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 262144,
        },
    ),
    "gpt-oss-20b": Work(
        model_type="gpt_oss",
        layers=4,
        tiny_layers=2,
        proof_layers=2,
        widths={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        attention="flex_attention",
    ),
    "deepseek-v3": Work(
        model_type="deepseek_v3",
        layers=2,
        tiny_layers=2,
        proof_layers=2,
        widths={
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 1,  # 3 of the published 61 layers
            "routed_scaling_factor": 2.5,
        },
        proof={"n_routed_experts": 32},
    ),
}


def config_of(work: Work, layers: int | None = None, tiny: bool = False, **changes: Any) -> PreTrainedConfig:
    """Return a new configuration of this work with its first `layers` layers; `tiny` has a few thousand parameters.

    Models modify their configuration, so do not share one between models.
    """
    layers = layers or (work.tiny_layers if tiny else work.layers)
    count: dict[str, Any] = {"num_hidden_layers": layers}
    if work.model_type == "nemotron_h":
        count["layers_block_type"] = [NEMOTRON_LAYERS[kind] for kind in NEMOTRON_3_NANO[:layers]]
    options = {"use_cache": False} | count | changes
    if tiny:
        return tiny_config(work.model_type, **options)
    return AutoConfig.for_model(work.model_type, **work.widths | {"pad_token_id": None} | options)


def top_k_and_experts(config: PreTrainedConfig) -> tuple[int, int]:
    """Return (experts per token, experts per layer)."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return config.num_experts_per_tok, next(getattr(config, name) for name in names if hasattr(config, name))


def expert_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Return (input and output width of experts, width of their up-projection including the gate)."""
    hidden = getattr(config, "moe_latent_size", None) or config.hidden_size
    width = config.intermediate_size if config.model_type == "gpt_oss" else config.moe_intermediate_size
    return hidden, width if config.model_type == "nemotron_h" else 2 * width
