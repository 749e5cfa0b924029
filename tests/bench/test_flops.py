"""The stated formulas count what PyTorch's own counter sees in stock models."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from expertmesh.bench.flops import forward_flops, mean_keys, scan_macs, step_flops
from expertmesh.bench.works import WORKS, config_of

BATCH, SEQ = 2, 32


def counted(config):
    """(FLOPs by operator of one forward and backward, those of the Mamba2 mixers alone)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    ids = torch.randint(0, config.vocab_size, (BATCH, SEQ))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    found = counter.get_flop_counts()
    mixers = [name for name, module in model.named_modules() if "Mamba2Mixer" in type(module).__name__]
    prefix = type(model).__name__
    mamba = [found[f"{prefix}.{name}"] for name in mixers]
    by_name = {str(op): flops for op, flops in found["Global"].items()}
    return by_name, sum(flops for of_one in mamba for op, flops in of_one.items() if "bmm" in str(op))


@pytest.mark.parametrize("name", WORKS)
def test_every_matrix_product_is_counted_once(name):
    config = config_of(WORKS[name], tiny=True)
    operators, scan = counted(config)
    products = sum(flops for op, flops in operators.items() if "convolution" not in op)
    parts = forward_flops(config, BATCH, SEQ)
    # eager attention also computes what the causal mask, and a window, then throws away
    core = 0.0
    if name == "gpt-oss-20b":
        seen = mean_keys(SEQ) + mean_keys(SEQ, config.sliding_window)
        core = parts["attention core"] * 2 * SEQ / seen
    else:
        core = parts["attention core"] * SEQ / mean_keys(SEQ)
    expected = sum(parts.values()) - parts["attention core"] + core - parts.get("Mamba2 scan", 0.0)
    assert products - scan == pytest.approx(3 * expected, rel=1e-6)


def test_the_scan_is_counted_as_chunked_matrix_products():
    config = config_of(WORKS["nemotron-3-nano"], tiny=True)
    _, scan = counted(config)
    heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    # stock repeats B and C for every head, and does not skip the upper triangle of a chunk
    per_token = scan_macs(heads, width, state, groups=heads, keys=config.chunk_size)
    layers, chunks = config.layers_block_type.count("linear_attention"), SEQ // config.chunk_size
    between_chunks = BATCH * heads * (chunks + 1) ** 2 * width * state
    assert scan == pytest.approx(6 * layers * (BATCH * SEQ * per_token + between_chunks), rel=0.02)


def test_known_sizes():
    config = config_of(WORKS["qwen3-30b-a3b"], layers=48)
    active = step_flops(config, 1, 4096) / 4096 / 6
    core = forward_flops(config, 1, 4096)["attention core"] / 4096 / 2
    assert active - core == pytest.approx(3.35e9 - 151936 * 2048, rel=0.01)  # A3B: 3.35e9 active, embedding among them
    assert mean_keys(4) == 2.5 and mean_keys(4, 2) == 7 / 4 and mean_keys(4, 100) == 2.5
