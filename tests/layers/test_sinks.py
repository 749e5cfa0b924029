"""GPT-OSS's attention: FlashAttention by default, never against the user's choice, the same numbers in every use."""

import json

import pytest
import torch

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.parity import CPU_TOLERANCE, Case, compare_case
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import tiny_config
from expertmesh.layers import attention, base_model
from expertmesh.layers.rows import inspect_rows
from tests.kernels.compare import on_triton
from tests.models import load_ours, load_stock, saved, shared_pair

LENGTHS = [3, 1, 12]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture
def ran(monkeypatch) -> list[tuple]:
    """Window and documents of every attention that ran by FlashAttention (or its reference)."""
    calls: list[tuple] = []
    kernel = attention.sink_attention
    monkeypatch.setattr(attention, "sink_attention", lambda *args: (calls.append(args[5:]), kernel(*args))[1])
    return calls


def row(model):
    return next(row for row in model.fusion_report() if row.name == "sink_attention")


def tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def run(model, ids: torch.Tensor, first: int = 0, **inputs) -> tuple[torch.Tensor, dict]:
    """Logits and, for fixed random gradients of them, the gradients of all parameters."""
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    weight = torch.randn(sum(LENGTHS), logits.shape[-1], generator=torch.Generator().manual_seed(1))
    (logits[0] * weight[first : first + ids.shape[1]]).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_the_default_and_the_report_says_so(ran):
    for model in (
        load_ours("gpt_oss"),
        fuse(load_stock("gpt_oss")),
        AutoModelForCausalLM.from_config(tiny_config("gpt_oss")),
    ):
        assert model.config._attn_implementation == attention.SINKS and row(model).on
        assert row(model).count == model.config.num_hidden_layers
        ran.clear()
        model(input_ids=tokens())
        assert [call[0] for call in ran] == [8, None]  # sliding and full by turns


@pytest.mark.parametrize("asked", [{"attn_implementation": "eager"}, {"fused": {"sink_attention": False}}])
def test_who_asks_for_another_implementation_gets_it(asked, ran):
    model = load_ours("gpt_oss", **asked)
    assert model.config._attn_implementation == "eager" and not row(model).on
    assert row(model).reason in ("GptOssAttention: attn_implementation='eager' is configured", "switched off")
    model(input_ids=tokens())
    assert not ran
    stock = fuse(load_stock("gpt_oss"), {"sink_attention": False})
    assert stock.config._attn_implementation == "eager"


def test_a_model_without_sinks_keeps_its_default():
    model = load_ours("qwen3_moe")
    assert model.config._attn_implementation == "expertmesh" and row(model).reason == "no module of the model needs it"


def test_a_saved_configuration_does_not_carry_our_name(tmp_path):
    load_ours("gpt_oss").save_pretrained(tmp_path)
    assert "expertmesh" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (saved("gpt_oss") / "config.json").read_text()
    )


@pytest.mark.parametrize(("interpreted", "cache"), [(False, False), (False, True), (True, False)])
def test_packed_documents_give_what_each_gives_alone(cache, interpreted, ran):
    model = load_ours("gpt_oss").train()
    ids = tokens()
    if interpreted:
        with on_triton():
            logits, gradients = run(model, ids, position_ids=POSITIONS, use_cache=cache)
    else:
        logits, gradients = run(model, ids, position_ids=POSITIONS, use_cache=cache)
    assert all(call[1].cu_seqlens.tolist() == [0, 3, 4, 16] for call in ran) and len(ran) == 2
    begin, expected, summed = 0, [], dict.fromkeys(gradients, torch.tensor(0.0))
    for length in LENGTHS:
        alone, parts = run(model, ids[:, begin : begin + length], first=begin, use_cache=False)
        expected.append(alone)
        summed = {name: summed[name] + parts.get(name, 0) for name in gradients}
        begin += length
    assert relative_error(logits, torch.cat(expected, dim=1)) <= CPU_TOLERANCE
    assert worst_error(gradients, summed)[0] <= CPU_TOLERANCE


def test_recomputed_layers_know_the_documents(ran):
    stock, ours = shared_pair("gpt_oss")
    case = Case("packed", batch="packed", checkpointing=True)
    assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert len(ran) == 3 * ours.config.num_hidden_layers  # forward, recompute, evaluation


def test_nobody_waits_to_find_documents_that_were_told(monkeypatch):
    looks = []
    monkeypatch.setattr(base_model, "inspect_rows", lambda *args: looks.append(args) or inspect_rows(*args))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    said = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 12, "max_length_k": 12}
    model = load_ours("gpt_oss")
    told, found = (model(input_ids=tokens(), position_ids=POSITIONS, **more).logits for more in (said, {}))
    assert torch.equal(told, found) and len(looks) == 1


def test_dropout_takes_the_eager_attention_within_windows_and_documents(ran, monkeypatch):
    stock, ours = shared_pair("gpt_oss")
    dropped: list[float] = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p=0.5, **_: (dropped.append(p), x)[1])
    for layer in ours.model.layers:
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.25)
    for batch in ("plain", "packed"):
        assert not [row for row in compare_case(stock, ours, Case("eager", batch=batch)) if not row.ok]
    assert dropped.count(0.25) == len(ran) == 2 * len(ours.model.layers), "the others are of evaluation"


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("padded", ["none", "right", "left", "hole"])
def test_evaluation_takes_the_eager_attention_only_over_padding_that_is_not_left_out(padded, labelled, ran):
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, {"none": slice(0), "right": slice(11, 16), "left": slice(5), "hole": slice(6, 7)}[padded]] = 0
    inputs = {"input_ids": tokens(2), "attention_mask": mask}
    behind_a_token = mask * mask.roll(1, 1)  # padding before the first one predicts nothing
    inputs |= {"labels": tokens(2).where(behind_a_token > 0, -100)} if labelled else {}
    if padded in ("left", "hole"):  # else stock counts positions over padding
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    theirs, ours = (m.eval()(**inputs) for m in shared_pair("gpt_oss"))
    if labelled:
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    else:
        assert relative_error(ours.logits[mask > 0].detach(), theirs.logits[mask > 0].detach()) <= CPU_TOLERANCE
    fast = padded == "none" or (labelled and padded != "hole")
    assert len(ran) == 2 * fast and (ours.past_key_values is None) == (fast and padded != "none")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_stock_also_past_the_window(cache):
    stock, ours = shared_pair("gpt_oss")
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    theirs, found = (m.eval().generate(tokens(2), attention_mask=mask, **options) for m in (stock, ours))
    assert torch.equal(theirs, found)


def test_a_second_turn_on_a_cache_equals_stock():
    logits = []
    for model in shared_pair("gpt_oss"):
        first = model.eval()(input_ids=tokens(), use_cache=True)
        logits.append(model(input_ids=tokens()[:, :6], past_key_values=first.past_key_values, use_cache=True).logits)
    assert relative_error(logits[1].detach(), logits[0].detach()) <= CPU_TOLERANCE


def test_a_mask_of_the_users_own_is_obeyed(ran):
    own = torch.zeros(1, 1, 16, 16).masked_fill_(torch.rand(1, 1, 16, 16) < 0.3, torch.finfo(torch.float32).min)
    stock, ours = (model.eval()(input_ids=tokens(), attention_mask=own).logits for model in shared_pair("gpt_oss"))
    assert relative_error(ours.detach(), stock.detach()) <= CPU_TOLERANCE and not ran


def test_autocast_decides_the_dtype(ran):
    model = load_ours("gpt_oss").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert len(ran) == 2 and loss.isfinite()
