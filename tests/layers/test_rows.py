"""Documents stay apart and padding costs nothing, in every family and by every way to call a model; nobody looks at the
device for what is known; stock models in the same process see nothing of it.

GPUs attend to documents by variable length. Here the reference stands in for that kernel (`varlen`), so that these
tests run all around it.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from expertmesh import AutoModelForCausalLM, backends, fuse
from expertmesh.bench.parity import CPU_TOLERANCE, Case, compare_case
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import FAMILIES, tiny_config, tiny_model
from expertmesh.layers import attention, base_model, rows
from tests.models import load_ours, load_stock, shared_pair

PACKED = Case("packed", batch="packed")
LENGTHS = [3, 1, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
#: their mixers carry a state from token to token and have no kernels of ours
STATEFUL = {"qwen3_next", "qwen3_5_moe_text", "jamba"}


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
    monkeypatch.setattr(backends, "has_varlen", lambda x: True)
    return ran


@pytest.fixture
def looks(monkeypatch) -> list:
    """Every look at the device, Transformers' and ours."""
    seen: list = []
    look, theirs = rows.inspect_rows, masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(base_model, "inspect_rows", lambda *args: (seen.append("ours"), look(*args))[1])
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: (seen.append("theirs"), theirs(ids))[1]
    )
    return seen


def trained(family: str, **options):
    """Our model of the family in training mode, without the noise that Phi-3.5-MoE's routers then get."""
    quiet = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if family == "phimoe" else {}
    return load_ours(family, **quiet, **options).train()


def tokens(model, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (rows, sum(LENGTHS)), generator=generator)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, position of each document's tokens in it), [3, 9] each: documents of `LENGTHS`, at one side of their rows
    or around a hole."""
    mask = torch.zeros(len(LENGTHS), 9, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(9 - length, 9)] = 1
    if side == "hole":
        mask[2, :9], mask[2, 4] = 1, 0
    return mask


def gradients(model, *losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def documents(model) -> list[torch.Tensor]:
    return list(tokens(model)[0].split(LENGTHS))


def without_first(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([-100]), ids[1:]])


def alone(model) -> dict[str, torch.Tensor]:
    """The gradients of the mean loss over all documents, from one call a document."""
    count = sum(LENGTHS) - len(LENGTHS)
    return gradients(
        model, *(model(input_ids=d[None], labels=d[None], num_items_in_batch=count).loss for d in documents(model))
    )


def batch(model, kind: str) -> dict[str, torch.Tensor]:
    """All documents in one batch, packed or padded."""
    parts = documents(model)
    if kind == "packed":
        labels = torch.cat([without_first(part) for part in parts])[None]
        return {"input_ids": torch.cat(parts)[None], "labels": labels, "position_ids": POSITIONS}
    mask = padded(kind)
    ids, labels = torch.zeros_like(mask), torch.full_like(mask, -100)
    ids[mask == 1] = torch.cat(parts)
    labels[mask == 1] = torch.cat([without_first(part) for part in parts])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def through_model(model, inputs):
    return model(**inputs).loss


def through_base_model(model, inputs):
    """As TRL's trainers and hand-written heads do."""
    labels = inputs.pop("labels")
    hidden = model.model(**inputs).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1] / getattr(model.config, "logits_scaling", 1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("call", [through_model, through_base_model])
@pytest.mark.parametrize("kind", ["packed", "right", "left"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_of_a_batch_are_the_documents_own(family, kind, call):
    model = trained(family)
    inputs = batch(model, kind)
    if family in STATEFUL and kind == "packed":
        with pytest.raises(ValueError, match="packed sequences apart|would mix them"):
            call(model, inputs)
        return
    error, where = worst_error(gradients(model, call(model, inputs)), alone(model))
    assert error <= CPU_TOLERANCE, where


CU_SEQLENS = torch.tensor([0, 3, 4, 12], dtype=torch.int32)
CU = {"cu_seq_lens_q": CU_SEQLENS, "cu_seq_lens_k": CU_SEQLENS}
TOLD = CU | {"max_length_q": 8, "max_length_k": 8}
POSITION = {"position_ids": POSITIONS}
SEQ_IDX = {"seq_idx": torch.tensor([[0] * 3 + [1] + [2] * 8])}
ONES = {"attention_mask": torch.ones_like(POSITIONS)}
CAUSAL = {"attention_mask": torch.full((12, 12), -1e9).triu(1)[None, None]}
#: ways to tell of documents that collators go; the first is the one that others must equal
WAYS = {
    "positions": POSITION,
    "positions and a mask of ones": POSITION | ONES,
    "positions and a float mask": POSITION | {"attention_mask": torch.ones(1, sum(LENGTHS))},
    "all": POSITION | TOLD,
    "all and a mask of ones": POSITION | TOLD | ONES,
    "lengths": TOLD,
    "lengths and a mask of ones": TOLD | ONES,
    "lengths, not the greatest": CU,
    "numbers": SEQ_IDX,
    "numbers and a mask of ones": SEQ_IDX | ONES,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in sorted(set(FAMILIES) - STATEFUL)]
    + [("qwen3_moe", {"attn_implementation": "eager"}), ("mixtral", {"sliding_window": 4})],
)
def test_documents_stay_apart_however_they_are_told(family, options):
    """A mask that hides nothing changes nothing."""
    model = trained(family, **options)
    inputs = batch(model, "packed")
    del inputs["position_ids"]
    losses = {way: through_model(model, inputs | told).detach() for way, told in WAYS.items()}
    for way, loss in losses.items():
        assert relative_error(loss, losses["positions"]) <= CPU_TOLERANCE, way


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", sorted(STATEFUL))
def test_documents_are_refused_where_a_state_would_pass_on(family, training):
    model = trained(family).train(training)
    inputs = batch(model, "packed")
    del inputs["position_ids"]
    of_ones_own = {f"{name} and a mask of one's own": told | CAUSAL for name, told in
                   (("positions", POSITION), ("lengths", TOLD), ("numbers", SEQ_IDX))}  # fmt: skip
    for way, told in (WAYS | of_ones_own).items():
        for call in (through_model, through_base_model):
            with pytest.raises(ValueError, match="packed sequences apart|would mix them"):
                pytest.fail(f"{way}: {call(model, inputs | told)}")


def test_a_mask_of_ones_own_does_not_hide_documents_from_mamba():
    model = trained("nemotron_h")
    inputs = batch(model, "packed") | CAUSAL
    with pytest.raises(ValueError, match="only attention reads a custom attention_mask"):
        through_model(model, inputs)
    inputs["position_ids"] = torch.arange(sum(LENGTHS))[None]
    assert through_model(model, inputs).isfinite()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_next"])
def test_masks_of_four_dimensions_are_obeyed_as_in_stock(family):
    """Whatever says what is hidden, and where a token sees nothing at all, as a collator's padding does."""
    stock, ours = load_stock(family).train(), trained(family)
    ids = tokens(ours, rows=2)
    hides_some = torch.ones(2, 1, 12, 12).tril().bool()
    hides_some[1, :, 6:, :6] = False
    hides_all, labels = hides_some.clone(), ids.clone()
    hides_all[1, :, 9:], labels[1, 9:] = False, -100
    for seen in (hides_some, hides_all):
        added = [
            torch.zeros(seen.shape).masked_fill(~seen, low) for low in (-torch.inf, torch.finfo(torch.float32).min)
        ]
        for mask in (seen, *added):
            inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
            want, got = (gradients(model, model(**inputs).loss) for model in (stock, ours))
            error, where = worst_error(got, want)
            assert error <= CPU_TOLERANCE and got.keys() == want.keys(), where


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_padding_is_not_routed(family):
    model, routed = load_ours(family).train(), []
    routers = [m for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    for router in routers:
        router.register_forward_hook(lambda _, args, out: routed.append(out[2].shape[0]))
    model(**batch(model, "right"))
    assert routed and set(routed) == {sum(LENGTHS)}


def test_what_is_read_at_padding_is_zero_and_elsewhere_stocks():
    stock, ours = shared_pair("qwen3_moe")
    inputs = batch(ours, "right")
    inputs.pop("labels")
    options = {"output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    theirs, found = (m.eval()(**inputs, **options) for m in (stock, ours))
    seen = inputs["attention_mask"].bool()
    assert found.logits[~seen].abs().max() == 0
    assert relative_error(found.logits[seen].detach(), theirs.logits[seen].detach()) <= CPU_TOLERANCE
    for mine, his in zip(found.hidden_states, theirs.hidden_states, strict=True):
        assert mine.shape == his.shape and relative_error(mine[seen].detach(), his[seen].detach()) <= CPU_TOLERANCE
    assert relative_error(found.aux_loss.detach(), theirs.aux_loss.detach()) <= CPU_TOLERANCE
    for mine, his in zip(found.router_logits, theirs.router_logits, strict=True):
        mine, his = (x.detach()[seen.flatten()] for x in (mine, his))
        assert relative_error(mine, his) <= CPU_TOLERANCE


@pytest.mark.parametrize("kind", ["right", "left", "hole"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_labels_on_padding_cost_the_padding_and_give_stocks_loss(family, kind):
    stock, ours = shared_pair(family)
    mask = padded(kind)
    ids = torch.randint(3, 128, mask.shape, generator=torch.Generator().manual_seed(3))
    theirs, found = (m.train()(input_ids=ids, attention_mask=mask, labels=ids).loss for m in (stock, ours))
    if kind == "left":  # what a query sees that may see nothing differs between kernels
        return
    assert relative_error(found.detach(), theirs.detach()) <= CPU_TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_hole_in_a_row_is_left_out(family):
    stock, ours = shared_pair(family)
    mask = padded("hole")
    ids = torch.randint(3, 128, mask.shape, generator=torch.Generator().manual_seed(3))
    theirs, found = (m.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (stock, ours))
    seen = mask.bool()
    assert relative_error(found[seen].detach(), theirs[seen].detach()) <= CPU_TOLERANCE


def test_rows_of_nothing_but_padding_are_as_in_stock():
    model = load_ours("qwen3_moe").train()
    ids = tokens(model, 2)
    mask = torch.zeros_like(ids)
    assert model.model(input_ids=ids, attention_mask=mask).last_hidden_state.shape[:2] == ids.shape
    mask[1] = 1
    assert model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.isfinite()


def test_a_mask_of_ones_says_nothing_of_where_documents_begin():
    jump = torch.tensor([[0, 1, 2, 7, 8]])
    alone, beside = (rows.inspect_rows((1, 5), mask, jump, None) for mask in (None, torch.ones(1, 5)))
    assert alone.cu_seqlens.tolist() == beside.cu_seqlens.tolist() == [0, 3, 5]


def test_no_cache_of_several_documents_is_filled_unless_somebody_asks_for_it():
    model = load_ours("qwen3_moe").train()
    kept = [model.model(tokens(model), position_ids=POSITIONS, **asked).past_key_values
            for asked in ({}, {"use_cache": True})]  # fmt: skip
    assert kept[0] is None and kept[1] is not None


def test_documents_and_padding_in_one_row_are_kept_apart_or_refused():
    inputs = batch(load_ours("qwen3_moe"), "packed")
    ids, labels, positions = (torch.nn.functional.pad(x, (0, 4), value=v) for x, v in
                              zip(inputs.values(), (0, -100, 0), strict=True))  # fmt: skip
    mask = torch.nn.functional.pad(torch.ones(1, sum(LENGTHS)), (0, 4))
    more = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
    model = load_ours("qwen3_moe").train()
    assert relative_error(model(**more).loss.detach(), model(**inputs).loss.detach()) <= CPU_TOLERANCE
    with pytest.raises(ValueError, match="several documents .* and padding"):
        load_ours("qwen3_moe", attn_implementation="eager")(**more)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_packed_documents_go_to_the_kernel(family, varlen):
    model = load_ours(family).train()
    through_model(model, batch(model, "packed"))
    assert varlen == [([0, 3, 4, 12], 8)] * model.config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_stocks_numbers_by_variable_length(family, varlen):
    stock, ours = shared_pair(family)
    if family not in STATEFUL:
        assert not [row for row in compare_case(stock, ours, PACKED) if not row.ok]
        assert bool(varlen) == (ours.config._attn_implementation == attention.NAME)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_recomputed_layers_know_the_documents(family, varlen):
    stock, ours = shared_pair(family)
    case = Case("packed", batch="packed", checkpointing=True)
    assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert len(varlen) == 3 * ours.config.num_hidden_layers  # forward, recompute, evaluation


def test_nobody_looks_when_the_collator_says_where_documents_begin(varlen, looks):
    model = load_ours("qwen3_moe")
    parts = [{"input_ids": part.tolist()} for part in documents(model)]
    told = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(parts)
    said = model(**told, use_cache=False)
    assert varlen and not looks
    seen = model(input_ids=tokens(model), position_ids=POSITIONS, labels=told["labels"], use_cache=False)
    assert looks == ["ours"]
    assert torch.equal(said.loss, seen.loss) and torch.equal(said.logits, seen.logits)


def test_one_look_at_most(looks):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).train()
    ids = tokens(model)
    model(input_ids=ids, labels=ids)
    assert not looks
    for inputs in ({"position_ids": POSITIONS}, {"attention_mask": torch.ones_like(ids)}, batch(model, "left")):
        model(**{"input_ids": ids} | inputs)
        assert looks == ["ours"]
        looks.clear()
    model(ids, None, POSITIONS)
    assert looks == ["ours"]


def test_only_labelled_tokens_pass_the_head(monkeypatch):
    from expertmesh.layers import head

    seen = []
    kernel = head.linear_cross_entropy
    monkeypatch.setattr(
        head, "linear_cross_entropy", lambda hidden, *a, **k: (seen.append(len(hidden)), kernel(hidden, *a, **k))[1]
    )
    model = load_ours("qwen3_moe").train()
    inputs = batch(model, "right")
    loss = through_model(model, inputs)
    assert seen == [sum(LENGTHS) - len(LENGTHS)]
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert through_model(model, inputs).isnan() and through_model(model, inputs | {"num_items_in_batch": 4}) == 0
    assert loss.isfinite()


@functools.cache
def of_images():
    """A tiny Qwen3-VL-MoE of stock's, whose positions are of time, height and width."""
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3VLMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("part", ["whole", "language_model"])  # which attends by masks of Transformers', and by ours
def test_positions_on_several_axes_keep_documents_apart(part, axes):
    stock = of_images() if part == "whole" else of_images().model.language_model
    ours = fuse(copy.deepcopy(stock))
    ids = torch.arange(3, 15)[None]
    want = torch.cat([stock(part)[0] for part in ids.split(LENGTHS, dim=1)], dim=1)
    for mask in (None, torch.ones_like(ids)):
        got = ours(ids, position_ids=POSITIONS.expand(axes, 1, 12), attention_mask=mask)[0]
        assert relative_error(got.detach(), want.detach()) <= CPU_TOLERANCE


def test_positions_of_an_image_and_of_padding_begin_no_document():
    stock, ours = of_images(), fuse(copy.deepcopy(of_images()))
    of_image = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    positions = torch.cat([of_image, torch.arange(2, 7).expand(3, 5), of_image + 7], dim=1)[:, None]
    padded = torch.cat([torch.zeros(3, 1, 3, dtype=torch.long), positions[..., :-3]], dim=-1)
    positions = torch.cat([positions, padded], dim=1)
    mask = torch.ones(2, positions.shape[-1], dtype=torch.long)
    mask[1, :3] = 0
    ids = torch.arange(3, 3 + mask.numel()).view(mask.shape)
    want, got = (model(ids, position_ids=positions, attention_mask=mask).logits.detach() for model in (stock, ours))
    assert relative_error(got[mask == 1], want[mask == 1]) <= CPU_TOLERANCE


def test_positions_on_several_axes_are_refused_where_a_state_would_pass_on():
    model = load_ours("qwen3_5_moe_text")
    with pytest.raises(ValueError, match="packed sequences apart|would mix them"):
        model(input_ids=tokens(model), position_ids=POSITIONS.expand(3, 1, 12))


@pytest.mark.parametrize("fast", [True, False])
def test_windows_stay_with_transformers_masks(fast, varlen, monkeypatch):
    monkeypatch.setattr(backends, "has_varlen", lambda x: fast)
    stock, ours = load_stock("mixtral", sliding_window=4), load_ours("mixtral", sliding_window=4)
    for case in (PACKED, Case("left", "left"), Case("right", "right")):
        assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert not varlen
    wide = load_ours("mixtral", sliding_window=64)  # which cuts nothing from rows of 12
    through_model(wide, batch(wide, "packed"))
    assert bool(varlen) == fast


@pytest.mark.parametrize(
    ("config", "has"),
    [
        ({}, False),
        ({"sliding_window": 11}, True),
        ({"sliding_window": 12}, False),
        ({"attention_chunk_size": 11, "layer_types": ["chunked_attention", "full_attention"]}, True),
        ({"sliding_window": 4, "layer_types": ["full_attention", "linear_attention"]}, False),
        ({"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, True),
    ],
)
def test_what_sees_less_than_a_row(config, has):
    assert base_model._has_windows(SimpleNamespace(**config), 12) == has


def test_what_the_kernel_does_not_take_gets_a_mask(varlen, monkeypatch):
    stock, ours = shared_pair("qwen3_moe")
    monkeypatch.setattr(attention, "supports", lambda query, value: False)
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


def test_a_lost_fusion_that_keeps_documents_apart_is_an_error_not_a_leak():
    sinks = load_ours("gpt_oss", fused={"sink_attention": False})
    with pytest.raises(ValueError, match="attn_implementation='eager' do not separate documents"):
        through_model(sinks, batch(sinks, "packed"))
    mamba = load_ours("nemotron_h", fused={"mamba2": False})
    with pytest.raises(ValueError, match="packed sequences apart|would mix them"):
        through_model(mamba, batch(mamba, "packed"))


def test_stock_models_in_the_same_process_see_nothing_of_it(varlen):
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masking_utils.sdpa_mask
    assert masking_utils.find_packed_sequence_indices.__module__ == "transformers.masking_utils"
    stock = load_stock("mixtral")
    stock(input_ids=tokens(stock), position_ids=POSITIONS, use_cache=False)
    assert not varlen


def test_a_stock_model_compiles_to_one_graph_beside_a_fused_one():
    torch._dynamo.reset()
    stock = tiny_model("qwen3_moe", experts_implementation="grouped_mm").eval()
    ids = tokens(stock)
    with torch.no_grad():
        expected = stock(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(stock, backend="eager", fullgraph=True)
        found = compiled(input_ids=ids, use_cache=False).logits
    assert relative_error(found, expected) <= CPU_TOLERANCE
