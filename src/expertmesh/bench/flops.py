"""Model FLOPs of a forward and backward, by an explicit formula per family. Recomputed work does not count.

Each weight of a matrix product costs 2 FLOPs per token forward and 4 backward (both gradients), and a token uses the K
experts it chose. A step of T tokens therefore takes 6 T (active weights), plus the parts without weights:

attention      2 (S+1)/2 (q·k width + v width) per head and token forward: scores and values over the (S+1)/2 tokens
               that a causal token sees on average, or over its window; twice that backward. With equal widths and a
               total width H of all heads, forward and backward take 12 H S/2.
Mamba2         its scan as matrix products over chunks of L tokens (Dao and Gu 2024, section 6): per token forward
               2 (L+1)/2 (groups·state + heads·width) within the chunk, 4 heads·width·state to build and to read the
               state; and the convolution, 2·kernel·channels.
latent experts the two projections H → L → H around the experts, whose products then have width L (Nemotron 3).
shared experts a dense MLP that every token goes through (DeepSeek V3, Nemotron 3).

Embedding rows are copied, not multiplied. Norms, activations, RoPE, routing and the optimizer do not count.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# (component of the layer, multiply-adds per token of the forward)
Products = Iterator[tuple[str, float]]


def forward_flops(config: PreTrainedConfig, batch: int, seq: int) -> dict[str, float]:
    """Return the FLOPs of one forward by component, for `batch` sequences of `seq` tokens."""
    macs: dict[str, float] = defaultdict(float)
    for component, per_token in _FAMILIES[config.model_type](config, seq):
        macs[component] += per_token
    macs["loss head"] += config.hidden_size * config.vocab_size
    return {component: 2 * batch * seq * per_token for component, per_token in macs.items()}


def step_flops(config: PreTrainedConfig, batch: int, seq: int) -> float:
    """Return the FLOPs of one forward and backward."""
    return 3 * sum(forward_flops(config, batch, seq).values())


def mean_keys(seq: int, window: int | None = None) -> float:
    """Return how many tokens a causal token sees on average, itself included, if it sees at most `window`."""
    window = min(window or seq, seq)
    return (window * seq - window * (window - 1) / 2) / seq


def scan_macs(heads: int, width: int, state: int, groups: int, keys: float) -> float:
    """Return the multiply-adds per token of Mamba2's scan, if a token sees `keys` tokens of its chunk."""
    return keys * (groups * state + heads * width) + 2 * heads * width * state


def _qwen3_moe(config: Any, seq: int) -> Products:
    hidden = config.hidden_size
    for layer in range(config.num_hidden_layers):
        yield from _attention(config, mean_keys(seq))
        if layer in config.mlp_only_layers:
            yield "other MLPs", 3 * hidden * config.intermediate_size
        else:
            yield "router", hidden * config.num_experts
            yield from _experts(config.num_experts_per_tok, hidden, config.moe_intermediate_size)


def _gpt_oss(config: Any, seq: int) -> Products:
    hidden = config.hidden_size
    for kind in config.layer_types:
        yield from _attention(config, mean_keys(seq, config.sliding_window if kind == "sliding_attention" else None))
        yield "router", hidden * config.num_local_experts
        yield from _experts(config.num_experts_per_tok, hidden, config.intermediate_size)


def _deepseek_v3(config: Any, seq: int) -> Products:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    for layer in range(config.num_hidden_layers):
        yield "attention linears", hidden * config.q_lora_rank + config.q_lora_rank * heads * query_key
        yield "attention linears", hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        yield "attention linears", config.kv_lora_rank * heads * (config.qk_nope_head_dim + value)
        yield "attention linears", heads * value * hidden
        yield "attention core", mean_keys(seq) * heads * (query_key + value)
        if layer < config.first_k_dense_replace:
            yield "other MLPs", 3 * hidden * config.intermediate_size
        else:
            yield "router", hidden * config.n_routed_experts
            yield from _experts(config.num_experts_per_tok, hidden, config.moe_intermediate_size)
            yield "other MLPs", 3 * hidden * config.n_shared_experts * config.moe_intermediate_size


def _nemotron_h(config: Any, seq: int) -> Products:
    hidden = config.hidden_size
    heads, width, state, groups = (
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.ssm_state_size,
        config.n_groups,
    )
    for kind in config.layers_block_type:
        if kind == "full_attention":
            yield from _attention(config, mean_keys(seq))
        elif kind == "mlp":
            yield "other MLPs", 2 * hidden * config.intermediate_size
        elif kind == "moe":
            latent = config.moe_latent_size
            yield "router", hidden * config.n_routed_experts
            yield from _experts(config.num_experts_per_tok, latent or hidden, config.moe_intermediate_size, gated=False)
            yield "other MLPs", 2 * hidden * config.moe_shared_expert_intermediate_size
            yield "other MLPs", 2 * hidden * latent if latent else 0
        else:
            channels = heads * width + 2 * groups * state
            yield "Mamba2 linears", hidden * (heads * width + channels + heads) + heads * width * hidden
            yield "Mamba2 scan", channels * config.conv_kernel
            yield "Mamba2 scan", scan_macs(heads, width, state, groups, mean_keys(min(seq, config.chunk_size)))


def _attention(config: Any, keys: float) -> Products:
    queries, key_values = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "attention linears", config.hidden_size * (queries + 2 * key_values) + queries * config.hidden_size
    yield "attention core", keys * 2 * queries


def _experts(top_k: int, hidden: int, width: int, gated: bool = True) -> Products:
    yield "experts up", top_k * hidden * width * (2 if gated else 1)
    yield "experts down", top_k * width * hidden


_FAMILIES = {
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "nemotron_h": _nemotron_h,
}
