"""What SDPA's attention of fused models sends to flash-attn-4, for which a stand-in computes, and what it does not."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from expertmesh import backends, fuse
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import tiny_model
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_mask
from expertmesh.layers.attention import attend, causal_placeholder
from tests.kernels import fake_flash_attn
from tests.kernels.compare import assert_same, outputs_and_grads
from tests.kernels.test_flash_attention import SHAPES, leaves
from tests.models import load_ours, load_stock


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    return fake_flash_attn.install(monkeypatch)


def module(group=2, **attributes) -> SimpleNamespace:
    return SimpleNamespace(**{"num_key_value_groups": group, "is_causal": True, "in_fused_model": True} | attributes)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_what_transformers_sdpa_gives(shape, calls):
    inputs, one = leaves(*shape), module(shape[0] // shape[1])
    got = outputs_and_grads(lambda *x: attend(one, *x, None, scaling=0.2)[0], *inputs)
    want = outputs_and_grads(
        lambda *x: sdpa_attention_forward(one, *x, None, scaling=0.2)[0],
        *(x.detach().float().requires_grad_() for x in inputs),
    )
    assert len(calls) == 1
    assert_same([x.float() for x in got], want, 8e-3)


def test_a_mask_dropout_a_bias_and_what_is_not_causal_stay_with_sdpa(calls):
    inputs = leaves()
    attend(module(), *inputs, torch.ones(2, 1, 7, 7, dtype=torch.bool))
    attend(module(), *inputs, None, dropout=0.5)
    attend(module(), *inputs, None, position_bias=torch.zeros(2, 4, 7, 7, dtype=torch.bfloat16))
    attend(module(), *inputs, None, is_causal=False)
    attend(module(is_causal=False), *inputs, None)
    with torch.no_grad():
        attend(module(), *inputs, None)
    assert not calls
    attend(module(is_causal=False), *inputs, None, is_causal=True)
    assert len(calls) == 1


def test_packed_documents_go_there_too_from_fused_models(calls):
    inputs, documents = leaves(), Documents(torch.tensor([0, 3, 7, 14], dtype=torch.int32), 7)
    mask = causal_placeholder(documents, inputs[0].device)
    got = outputs_and_grads(lambda *x: attend(module(), *x, mask, documents=documents)[0], *inputs)
    assert [call["documents"] for call in calls] == [3]
    whole = document_mask(documents.cu_seqlens, 2, 7)
    want = outputs_and_grads(lambda *x: sdpa_attention_forward(module(), *x, whole)[0], *inputs)
    attend(module(), *inputs, mask, dropout=0.5, documents=documents)
    assert len(calls) == 1
    assert_same([x.float() for x in got], [x.float() for x in want], 1.5e-2)


def test_a_layer_that_was_not_told_of_its_documents_is_an_error():
    documents = Documents(torch.tensor([0, 3, 14], dtype=torch.int32), 11)
    with pytest.raises(RuntimeError, match="did not receive the document boundaries"):
        attend(module(), *leaves(), causal_placeholder(documents, torch.device("cpu")))


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


#: how many layers of the tiny models attend
@pytest.mark.parametrize(
    ("family", "layers", "way"),
    [
        pytest.param(
            *family,
            way,
            marks=[pytest.mark.slow] if way != "plain" and family[0] in ("deepseek_v3", "nemotron_h") else [],
        )
        for family in (("qwen3_moe", 3), ("deepseek_v3", 3), ("nemotron_h", 1), ("gpt_oss", 2))
        for way in ("plain", "recomputed", "compiled")
    ],
)
def test_a_fused_model_trains_by_it_and_neither_evaluation_nor_stock_models_run_it(
    family, layers, way, calls, monkeypatch
):
    model, stock = load_ours(family).train(), load_stock(family).train()
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    want = loss_and_gradients(model, ids)
    assert not calls, "float32"
    monkeypatch.setattr(flash_attention, "WIDTHS", {(8, 8), (16, 16), (24, 16)})
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.float32,))
    if way == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "compiled":
        torch._dynamo.reset()
        attending = 2 if family == "nemotron_h" else 1
        for layer in model.model.layers[attending : attending + 1]:
            layer.compile(backend="aot_eager")
    got = loss_and_gradients(model, ids)
    assert len(calls) == layers * (2 if way == "recomputed" else 1)
    assert all(call["sinks"] == (family == "gpt_oss") for call in calls)
    error, where = worst_error(got, want)
    assert error < 1e-5, where
    calls.clear()
    loss_and_gradients(stock, ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert not calls


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3_moe", 3), ("deepseek_v3", 3), ("nemotron_h", 1), ("gpt_oss", 2)]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_fused_model_sends_packed_rows_there_as_its_collator_tells(family, layers, rows, calls, monkeypatch):
    model, lengths = load_ours(family).train(), [5, 1, 6] * rows
    ids = torch.randint(3, model.config.vocab_size, (rows, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths]).view(rows, 12), "use_cache": False}
    want = loss_and_gradients(model, ids, **inputs)
    monkeypatch.setattr(flash_attention, "WIDTHS", {(8, 8), (16, 16), (24, 16)})
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(backends, "has_varlen", lambda x: True)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    for more in (told, {}):
        got = loss_and_gradients(model, ids, **inputs, **more)
        assert [call["documents"] for call in calls] == [3 * rows] * layers
        error, where = worst_error(got, want)
        assert error < 1e-5, where
        calls.clear()


WINDOWS = [("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}), ("mixtral", {"sliding_window": 4}),
           ("gpt_oss", {"sliding_window": 4})]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), WINDOWS)
def test_windows_are_those_of_stock_whoever_attends(family, changes):
    """By the default, and by an implementation of the user's own, which is told of them as flash attention is."""
    told = []

    def noting(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        told.append((module.layer_idx, sliding_window))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("noting", noting)
    stock = tiny_model(family, **changes)
    ours, wide = fuse(copy.deepcopy(stock)), fuse(tiny_model(family, **changes | {"sliding_window": 64}))
    ids = torch.randint(3, stock.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got, all_seen = (model(input_ids=ids).logits for model in (stock, ours, wide))
    assert relative_error(got, want) < 1e-5 and relative_error(all_seen, want) > 1e-2
    for model in (stock, ours):
        model.set_attn_implementation("noting")
        model(input_ids=ids)
    assert told[: len(told) // 2] == told[len(told) // 2 :] and 4 in dict(told).values()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_attention_drops_out_as_in_stock(family):
    losses = []
    ids = torch.arange(3, 27).view(2, 12)
    for load in (load_stock, load_ours):
        model = load(family, attention_dropout=0.4).train()
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-4
