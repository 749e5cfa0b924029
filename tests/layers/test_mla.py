"""Latent attention (MLA) with one kernel between projections and attention equals stock, whatever the variant."""

import contextlib
import itertools

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from expertmesh import AutoModelForCausalLM, backends
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import COMMON, FAMILIES, YARN, randomise
from expertmesh.kernels.documents import Documents, document_mask
from expertmesh.layers import attention
from expertmesh.layers.attention import causal_placeholder

# other factors for the two kinds of scaling than those of the tiny model, where one of them is neutral
SCALED = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}
VARIANTS = {
    "YaRN": SCALED,
    "queries not compressed": {"q_lora_rank": None},
    "eager": SCALED | {"attn_implementation": "eager"},
    "biases, values wider than queries": {"attention_bias": True, "v_head_dim": 40},
}


def models(model_type: str = "deepseek_v3", attn_implementation: str = "sdpa", **changes):
    """(stock, ours) with the same weights."""
    made = []
    for auto in (transformers.AutoModelForCausalLM, AutoModelForCausalLM):
        config = AutoConfig.for_model(model_type, **COMMON | FAMILIES["deepseek_v3"] | changes)
        model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        made.append(randomise(model).train())
    return made


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(5))


def counted(monkeypatch) -> list[torch.Size]:
    """Collects the shapes of queries that went through the kernel's function."""
    seen = []
    kernel = attention.mla_rope
    monkeypatch.setattr(attention, "mla_rope", lambda q, *rest: (seen.append(q.shape), kernel(q, *rest))[1])
    return seen


def gradients(model, ids, **more):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **more)
    out.loss.backward()
    return {"loss": out.loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("model_type", "variant", "path"),
    [
        *(("deepseek_v3", variant, "reference") for variant in VARIANTS),
        ("deepseek_v3", "YaRN", "triton"),
        ("glm4_moe_lite", "YaRN", "reference"),
    ],
)
def test_loss_and_gradients_equal_stock(model_type, variant, path, monkeypatch):
    seen = counted(monkeypatch)
    stock, ours = models(model_type, **VARIANTS[variant])
    ids = tokens(2, 11)
    expected = gradients(stock, ids)
    with backends.interpreted() if path == "triton" else contextlib.nullcontext():
        got = gradients(ours, ids)
    error, where = worst_error(got, expected)
    assert error < 1e-5, where
    assert len(seen) == ours.config.num_hidden_layers


def test_both_scalings_of_yarn_are_in_the_numbers():
    """Or else the test above would not see one missing."""
    ids = tokens(1, 7)
    losses = set()
    for cos_sin, softmax in ((0.7, 1.3), (0.7, 0.7), (1.3, 1.3)):
        _, ours = models(rope_parameters=YARN | {"mscale": cos_sin, "mscale_all_dim": softmax})
        losses.add(round(ours(input_ids=ids, labels=ids).loss.item(), 4))
    assert len(losses) == 3


def test_attention_that_rotates_halves_stays_stock_and_the_report_says_so():
    _, ours = models(rope_interleave=False)
    (row,) = (row for row in ours.fusion_report() if row.name == "mla_rope")
    assert not row.on and "rotates halves" in row.reason


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_stock(cache):
    stock, ours = (model.eval() for model in models(**SCALED))
    ids = tokens(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    pad = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "pad_token_id": 0}
    expected = stock.generate(ids, **options, **pad)
    assert torch.equal(ours.generate(ids, **options, **pad), expected)
    without = ours.generate(ids, **options | {"cache_implementation": None, "use_cache": False}, **pad)
    assert torch.equal(without, expected)


def test_training_with_a_cache_takes_the_kernel_and_fills_the_cache_as_stock_does(monkeypatch):
    seen = counted(monkeypatch)
    stock, ours = models(**SCALED)
    ids = tokens(2, 9)
    expected, got = (model(input_ids=ids, labels=ids, use_cache=True) for model in (stock, ours))
    assert len(seen) == ours.config.num_hidden_layers
    for theirs, mine in zip(expected.past_key_values.layers, got.past_key_values.layers, strict=True):
        for found, want in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert relative_error(found.detach(), want.detach()) < 1e-5
    error, where = worst_error(gradients(ours, ids, use_cache=True), gradients(stock, ids, use_cache=True))
    assert error < 1e-5, where


def test_adapters_on_the_latent_projections_train_as_on_stock():
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    found = []
    for model in models(**SCALED):
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        found.append(gradients(adapted, tokens(2, 7)))
    expected, got = found
    error, where = worst_error(got, expected)
    assert error < 1e-5, where
    assert sum(".lora_" in name for name in got) == 2 * len(targets) * 3 and all(g.any() for g in got.values())


def test_recomputed_layers_give_the_same_gradients():
    _, ours = models(**SCALED)
    ids = tokens(2, 9)
    expected = gradients(ours, ids, use_cache=False)
    ours.activation_checkpointing_enable({"use_reentrant": False})
    for name, value in gradients(ours, ids, use_cache=False).items():
        assert torch.equal(value, expected[name]), name


@torch.no_grad()
def test_packed_documents_are_as_separate_ones_on_both_paths():
    """Told beside a placeholder, and by a mask of Transformers."""
    _, ours = models(**SCALED)
    layer = ours.model.layers[0].self_attn
    x = torch.randn(1, 12, ours.config.hidden_size)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    turn = ours.model.rotary_emb(x, positions)
    documents = Documents(cu_seqlens, 6)
    told = {"attention_mask": causal_placeholder(documents, x.device), "documents": documents}
    masked = {"attention_mask": document_mask(cu_seqlens, 1, 12)}
    borders = list(itertools.pairwise(cu_seqlens.tolist()))
    separate = [layer(x[:, a:b], tuple(part[:, a:b] for part in turn), None)[0] for a, b in borders]
    for inputs in (told, masked):
        assert relative_error(layer(x, turn, **inputs)[0], torch.cat(separate, 1)) < 1e-5


def test_compiled_attention_is_one_graph_with_the_same_numbers():
    _, ours = models(**SCALED)
    layer = ours.model.layers[0].self_attn
    x = torch.randn(2, 9, ours.config.hidden_size, requires_grad=True)
    turn = ours.model.rotary_emb(x, torch.arange(9)[None])
    expected = layer(x, turn, None)[0]
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, turn, None)[0]
    assert relative_error(got.detach(), expected.detach()) < 1e-5
    (want,), (found,) = (torch.autograd.grad(out.square().sum(), x) for out in (expected, got))
    assert relative_error(found, want) < 1e-5
