"""Packed documents stay apart, with and without a mask; nobody looks for them where it is known; nothing else changes.

GPUs attend to packed documents by variable length. Here the reference stands in for that kernel (`varlen`), so that
these tests run all around it.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening, masking_utils

from expertmesh import AutoModelForCausalLM, backends
from expertmesh.bench.parity import CPU_TOLERANCE, Case, compare_case
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import FAMILIES, tiny_config
from expertmesh.layers import attention, masks
from tests.models import load_ours, load_stock, shared_pair

PACKED = Case("packed", batch="packed")
LENGTHS = [3, 1, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture
def varlen(monkeypatch) -> list[tuple]:
    """The documents of every attention that ran by variable length, as on a GPU."""
    ran: list[tuple] = []
    kernel = attention.varlen_attention

    def recorded(*args):
        assert args[4] == args[3].diff().max()  # the reference has no use for it, the kernel has
        ran.append((args[3].tolist(), args[4]))
        return kernel(*args)

    monkeypatch.setattr(attention, "varlen_attention", recorded)
    monkeypatch.setattr(backends, "has_varlen", lambda device, dtype: True)
    return ran


@pytest.fixture
def looks(monkeypatch) -> list[torch.Tensor]:
    """Every look at positions on the device, Transformers' and ours."""
    seen: list[torch.Tensor] = []
    for name in ("_look", "find_documents"):
        function = getattr(masks, name)
        monkeypatch.setattr(masks, name, lambda ids, function=function: (seen.append(ids), function(ids))[1])
    return seen


def tokens(model) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def run(model, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict]:
    """Logits and, for fixed random gradients of them, the gradients of all parameters."""
    model.zero_grad()
    first = inputs.pop("first", 0)
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    weight = torch.randn(sum(LENGTHS), logits.shape[-1], generator=torch.Generator().manual_seed(1))
    (logits[0] * weight[first : first + ids.shape[1]]).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_packed_documents_give_what_each_gives_alone(family, varlen):
    model = load_ours(family).train()
    ids = tokens(model)
    logits, gradients = run(model, ids, position_ids=POSITIONS)
    assert varlen == [([0, 3, 4, 12], 8)] * model.config.num_hidden_layers
    begin, expected, summed = 0, [], dict.fromkeys(gradients, torch.tensor(0.0))
    for length in LENGTHS:
        alone, parts = run(model, ids[:, begin : begin + length], first=begin)
        expected.append(alone)
        summed = {name: summed[name] + parts.get(name, 0) for name in gradients}
        begin += length
    assert relative_error(logits, torch.cat(expected, dim=1)) <= CPU_TOLERANCE
    assert worst_error(gradients, summed)[0] <= CPU_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_stocks_numbers_by_variable_length(family, varlen):
    stock, ours = shared_pair(family)
    assert not [row for row in compare_case(stock, ours, PACKED) if not row.ok]
    assert bool(varlen) == (ours.config._attn_implementation == "sdpa")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_recomputed_layers_know_the_documents(family, varlen):
    stock, ours = shared_pair(family)
    case = Case("packed", batch="packed", checkpointing=True)
    assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert len(varlen) == 3 * ours.config.num_hidden_layers  # forward, recompute, evaluation


def test_nobody_looks_at_positions_when_the_collator_says_where_documents_begin(varlen, looks):
    model = load_ours("qwen3_moe")
    ids = tokens(model)
    documents = [{"input_ids": part.tolist()} for part in ids[0].split(LENGTHS)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(documents)
    said = model(**batch, use_cache=False)
    assert varlen and not looks
    seen = model(input_ids=ids, position_ids=POSITIONS, labels=batch["labels"], use_cache=False)
    assert len(looks) == 1
    assert torch.equal(said.loss, seen.loss) and torch.equal(said.logits, seen.logits)


def test_nobody_looks_where_no_positions_are_given(looks):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    ids = tokens(model)
    model(input_ids=ids, labels=ids, use_cache=False)
    assert not looks
    model(input_ids=ids, use_cache=False, position_ids=POSITIONS)
    model(ids, None, POSITIONS, use_cache=False)
    assert len(looks) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_one_document_need_no_mask(rows, varlen, monkeypatch):
    made = []
    mask = masks._sdpa_mask
    monkeypatch.setitem(
        masking_utils.AttentionMaskInterface._global_mapping, "sdpa", lambda **asked: made.append(mask(**asked))
    )
    model = load_ours("mixtral")
    ids = tokens(model).expand(rows, -1)
    model(input_ids=ids, position_ids=torch.arange(5, 5 + ids.shape[1])[None], use_cache=False)
    assert made == [None] and not varlen


@pytest.mark.parametrize("fast", [True, False])
def test_windows_stay_with_transformers_masks(fast, varlen, monkeypatch):
    monkeypatch.setattr(backends, "has_varlen", lambda device, dtype: fast)
    stock, ours = load_stock("mixtral", sliding_window=4), load_ours("mixtral", sliding_window=4)
    assert not [row for row in compare_case(stock, ours, PACKED) if not row.ok]
    assert not varlen


def test_who_asks_for_a_mask_in_any_case_gets_transformers_own(varlen):
    model = load_ours("mixtral")
    asked = (model.config, torch.zeros(1, sum(LENGTHS), model.config.hidden_size), None, None, POSITIONS)
    expected = masking_utils.create_causal_mask(*asked)
    with masks.known_rows(model, POSITIONS, {}):
        assert isinstance(masking_utils.create_causal_mask(*asked), masks.Documents)
        assert torch.equal(masking_utils.create_causal_mask(*asked, allow_is_causal_skip=False), expected)


def test_what_the_kernel_does_not_take_gets_a_mask(varlen, monkeypatch):
    stock, ours = shared_pair("qwen3_moe")
    monkeypatch.setattr(attention, "takes", lambda query, value: False)
    assert not [row for row in compare_case(stock, ours, PACKED) if not row.ok]
    assert not varlen


def test_dropout_in_attention_is_not_dropped(varlen):
    model = load_ours("qwen3_moe", attention_dropout=0.5).train()
    ids = tokens(model)
    once, again = (model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits for _ in range(2))
    assert not torch.equal(once, again) and not varlen
    model.eval()(input_ids=ids, position_ids=POSITIONS, use_cache=False)
    assert varlen


def test_attention_weights_are_those_of_stock(varlen):
    outputs = []
    for load in (load_stock, load_ours):
        model = load("qwen3_moe", attn_implementation="eager")
        outputs.append(model(input_ids=tokens(model), position_ids=POSITIONS, use_cache=False, output_attentions=True))
    stock, ours = outputs
    assert not varlen and len(ours.attentions) == len(stock.attentions) > 0
    for theirs, found in zip(stock.attentions, ours.attentions, strict=True):
        assert found[0, :, 3:, :3].abs().max() == 0
        assert relative_error(found.detach(), theirs.detach()) <= CPU_TOLERANCE


def test_with_a_cache_or_a_mask_nothing_is_packed_as_in_stock(varlen):
    stock, ours = shared_pair("mixtral")
    ids = tokens(ours)
    for inputs in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids), "use_cache": False}):
        theirs, found = (m.eval()(input_ids=ids, position_ids=POSITIONS, **inputs).logits for m in (stock, ours))
        assert relative_error(found.detach(), theirs.detach()) <= CPU_TOLERANCE
    assert not varlen


def test_outside_a_fused_model_transformers_answers(varlen):
    packed = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1, 2]]))
    assert packed.tolist() == [[0, 0, 1, 1, 1]]
    stock = load_stock("mixtral")
    stock(input_ids=tokens(stock), position_ids=POSITIONS, use_cache=False)
    assert not varlen
