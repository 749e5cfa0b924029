"""Every layout computes the loss and the gradients that stock Transformers computes on one process."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from expertmesh.bench import tiny
from expertmesh.moe.experts import TRANSPORTS
from tests.distributed import work
from tests.distributed.ranks import on_ranks, on_the_same_ranks
from tests.distributed.work import Case
from tests.models import load_stock, saved

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral"]
GENERIC = """
mixtral olmoe glm4_moe qwen3_next qwen3_5_moe_text ernie4_5_moe granitemoe hunyuan_v1_moe phimoe
""".split()
NOT_AT_RANDOM = {"phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}}  # else its router draws experts
TOLERANCE = 1e-5
TOP_K = {"deepseek_v3": 3, "nemotron_h": 3}
LAYOUTS = {
    2: [
        {},
        {"ep_size": 2},
        {"tp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"dp_replicate_size": 2},
        {"ep_size": 2, "dispatch": "gather"},
    ],
    4: [
        {},
        {"tp_size": 2},
        {"dp_replicate_size": 2},
        {"ep_size": 4},
        {"ep_size": 2},
        {"ep_size": 2, "reshard_experts": False},
        {"tp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 4},
        {"dp_replicate_size": 2, "ep_size": 2},
        {"ep_size": 4, "dispatch": "gather"},
        {"ep_size": 2, "dispatch": "gather"},
        {"tp_size": 2, "ep_size": 4, "dispatch": "gather"},
    ],
}


def references(folder, family: str, num_ranks: int, cases: list[Case]) -> None:
    folder.mkdir(exist_ok=True)
    for dp_size, force in {(num_ranks // case.setup.get("tp_size", 1), case.force) for case in cases}:
        torch.save(work.reference(load_stock(family), dp_size, force), folder / f"{dp_size}-{force}.pt")


def check(folder, num_ranks: int, cases_of: dict[str, list[Case]], seconds: float = 240) -> None:
    """All families on the same ranks."""
    for family, cases in cases_of.items():
        references(folder / family, family, num_ranks, cases)
    several = [(saved(family), cases, folder / family) for family, cases in cases_of.items()]
    made = on_the_same_ranks(num_ranks, work.parity, several, seconds=seconds)
    for (family, cases), ranks in zip(cases_of.items(), made, strict=True):
        agree(family, cases, ranks)


def agree(family: str, cases: list[Case], ranks: list) -> None:
    """What `work.parity` found on each rank is small."""
    for rank in ranks:
        assert len(rank) == len(cases)
        for name, loss, grad, where in rank:
            assert loss <= TOLERANCE and grad <= TOLERANCE, f"{family} {name}: loss {loss:.1e}, {where} {grad:.1e}"


def few(family: str) -> tuple[int, ...]:
    """Choices that leave all but the first experts, and with them whole ranks, without a token."""
    return tuple(range(TOP_K.get(family, 2)))


def one(family: str) -> tuple[int, ...]:
    """Every choice of every token is expert 5."""
    return (5,) * TOP_K.get(family, 2)


def test_gradients_on_two_ranks(tmp_path):
    layout = {"ep_size": 2}
    gather = layout | {"dispatch": "gather"}
    cases = [Case(layout), Case(layout, recompute=True), Case({}, recompute={"experts": 1}), Case(gather)]
    forced = {
        family: [Case(layout, force=few(family)), Case(gather, recompute="experts", force=few(family))]
        + [Case(layout, force=one(family), recompute=True)]
        for family in FAMILIES
    }
    check(tmp_path, 2, {family: cases + more for family, more in forced.items()})


@pytest.mark.parametrize(
    "families",
    [("qwen3_moe", "nemotron_h"), pytest.param(("gpt_oss", "deepseek_v3", "mixtral"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_gradients_on_four_ranks(tmp_path, families):
    several = [Case({"ep_size": 2}), Case({"tp_size": 2, "ep_size": 4}, recompute="experts")]
    several += [Case({"ep_size": 4, "dispatch": "gather"}, recompute=True)]
    more = {
        "qwen3_moe": [Case({"ep_size": 4}, force=few("qwen3_moe")), Case({"ep_size": 2, "reshard_experts": False})],
        "nemotron_h": [Case({"ep_size": 4}, force=few("nemotron_h")), Case({"tp_size": 2, "ep_size": 2})],
        "deepseek_v3": [Case({"dp_replicate_size": 2, "ep_size": 2}, recompute=True)],
    }
    check(tmp_path, 4, {family: several + more.get(family, [Case({"ep_size": 4})]) for family in families})


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize("num_ranks", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_layout(tmp_path, family, num_ranks, recompute):
    forces = [None, few(family), one(family)]
    cases = [Case(layout, recompute, force) for layout in LAYOUTS[num_ranks] for force in forces]
    check(tmp_path, num_ranks, {family: cases}, seconds=900)


def test_gradients_of_the_generic_families_on_two_ranks(tmp_path):
    several, cases = [], [Case({"ep_size": 2}), Case({"ep_size": 2}, recompute=True)]
    for family in GENERIC:
        model = tiny.tiny_model(family, **NOT_AT_RANDOM.get(family, {}))
        (tmp_path / family).mkdir()
        torch.save(work.reference(model, 2, None), tmp_path / family / "2-None.pt")
        model.save_pretrained(tmp_path / family / "model")
        several.append((tmp_path / family / "model", cases, tmp_path / family))
    for family, ranks in zip(GENERIC, on_the_same_ranks(2, work.parity, several), strict=True):
        agree(family, cases, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {*FAMILIES, *NOT_AT_RANDOM}))
def test_gradients_of_other_families(tmp_path, family):
    check(tmp_path, 2, {family: [Case({"ep_size": 2}), Case({"ep_size": 2}, recompute=True), Case({})]})


def test_tied_embeddings_stay_tied(tmp_path):
    tied = tiny.tiny_model("qwen3_moe", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "model")
    torch.save(work.reference(tied, 2, None), tmp_path / "2-None.pt")
    for rank in on_ranks(2, work.parity, tmp_path / "model", [Case({"ep_size": 2}), Case({})], tmp_path):
        assert all(loss <= TOLERANCE and grad <= TOLERANCE for _, loss, grad, _ in rank)
    layouts = [Case({}), Case({"ep_size": 2})]
    for rank in on_ranks(2, work.initialised, "qwen3_moe", layouts, True):
        assert all("lm_head.weight" not in weights for weights in rank)


def agree_after_steps(folder, families: list[str], num_ranks: int, cases: list[Case], num_steps: int = 5) -> None:
    for family in families:
        (folder / family).mkdir()
        for dp_size in {num_ranks // case.setup.get("tp_size", 1) for case in cases}:
            trained = work.trained_reference(load_stock(family).train(), dp_size, num_steps)
            torch.save(trained, folder / family / f"steps-{dp_size}.pt")
    several = [(saved(family), cases, folder / family, num_steps) for family in families]
    for family, ranks in zip(families, on_the_same_ranks(num_ranks, work.steps, several), strict=True):
        for name, norm, weight, where in (result for rank in ranks for result in rank):
            assert norm <= TOLERANCE and weight <= TOLERANCE, f"{family} {name}: norm {norm:.1e}, {where} {weight:.1e}"


def test_norms_and_weights_agree_after_five_steps(tmp_path):
    layouts = [{"ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"dp_replicate_size": 2, "ep_size": 2}]
    agree_after_steps(tmp_path, ["qwen3_moe", "nemotron_h"], 4, [Case(layout) for layout in layouts])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_weights_agree_after_five_steps_of_every_layout(tmp_path, family, num_ranks):
    agree_after_steps(tmp_path, [family], num_ranks, [Case(layout) for layout in LAYOUTS[num_ranks]])


def shapes(folder) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("num_ranks", "layouts"),
    [
        (4, {"qwen3_moe": {"ep_size": 4}, "nemotron_h": {"tp_size": 2, "ep_size": 4}, "gpt_oss": {"ep_size": 2}}),
        (2, {"mixtral": {"tp_size": 2, "ep_size": 2}}),
    ],
)
def test_generate_with_uneven_prompts_and_save(tmp_path, num_ranks, layouts):
    prompts = [torch.randint(3, 128, (1, 3 + 2 * rank)) for rank in range(4)]
    several = [(saved(family), Case(layout), prompts, tmp_path / family) for family, layout in layouts.items()]
    made = on_the_same_ranks(num_ranks, work.generate_and_save, several)
    for (family, layout), ranks in zip(layouts.items(), made, strict=True):
        stock, tp_size, folder = load_stock(family).eval(), layout.get("tp_size", 1), tmp_path / family
        for rank, tokens in enumerate(ranks):
            n = rank // tp_size
            assert torch.equal(tokens, stock.generate(prompts[n], max_new_tokens=4 + n, do_sample=False)), family
        assert shapes(folder) == shapes(saved(family))
        config, original = (json.loads((path / "config.json").read_text()) for path in (folder, saved(family)))
        assert config == original
        reloaded = type(stock).from_pretrained(folder)
        for (name, want), got in zip(stock.named_parameters(), reloaded.parameters(), strict=True):
            assert torch.equal(want, got), name


def test_the_script_of_a_nemo_automodel_user_runs_with_other_import_lines():
    stock, ids = load_stock("nemotron_h", dtype=torch.bfloat16).eval(), torch.arange(3, 15)[None]
    want = stock(ids).logits.detach()
    for logits in on_ranks(2, work.nemo_script, saved("nemotron_h"), ids):
        torch.testing.assert_close(logits, want, rtol=0.05, atol=0.1)


def test_a_stock_model_can_be_laid_out_too(tmp_path):
    cases = [Case({"ep_size": 2}, fused=False), Case({"ep_size": 2}, fused=False, recompute=True)]
    check(tmp_path, 2, {"qwen3_moe": cases})


def test_two_models_in_one_process_do_not_mix(tmp_path):
    folders, cases = [saved("mixtral"), saved("deepseek_v3")], [Case({"ep_size": 2})]
    for family in ("mixtral", "deepseek_v3"):
        references(tmp_path / family, family, 2, cases)
    paths = [tmp_path / "mixtral", tmp_path / "deepseek_v3"]
    for errors in on_ranks(2, work.interleaved, folders, cases[0], paths):
        assert max(errors) <= TOLERANCE


def test_a_recompute_sends_rows_but_does_not_ask_for_counts_again():
    num_moe_layers = 2
    several = [(saved("qwen3_moe"), Case({"ep_size": 2}, recompute)) for recompute in (False, True)]
    for (_, case), ranks in zip(several, on_the_same_ranks(2, work.exchanges, several), strict=True):
        for count in ranks:
            assert count["counts"] == num_moe_layers
            assert count["rows"] >= (8 if case.recompute else 6) * num_moe_layers


def test_rows_of_experts_in_a_latent_width_travel_in_it(tmp_path):
    config = tiny.tiny_config("nemotron_h")
    latent, top_k = config.moe_latent_size, config.num_experts_per_tok
    # counts of rows and pairs; ids and weights, and these' gradients
    besides = {"all_to_all": {2, 2 * top_k, top_k}, "gather": {top_k}}
    several = [(saved("nemotron_h"), dispatch, tmp_path) for dispatch in besides]
    want = [[{latent} | widths] * 2 for widths in besides.values()]
    assert on_the_same_ranks(2, work.widths, several) == want


@pytest.mark.parametrize("tokens", [[9, 9], [9, 4]], ids=str)
def test_hidden_states_are_sent_once_to_the_experts(tokens, tmp_path):
    config = tiny.tiny_config("qwen3_moe")
    layers = config.num_hidden_layers - len(config.mlp_only_layers)
    assert on_ranks(2, work.tokens_sent, saved("qwen3_moe"), tokens, tmp_path) == [([9] * layers, [])] * 2


def test_adapters_around_experts_in_a_latent_width_get_the_gradients_of_one_process():
    targets = {"target_modules": ["fc1_latent_proj", "fc2_latent_proj"]}
    cases = [(Case({"ep_size": 2}, recompute=True), targets)]
    for (grads,) in on_ranks(2, work.adapters, saved("nemotron_h"), cases):
        assert len(grads) == 8 and work.worst(grads, adapted("nemotron_h", targets))[0] <= TOLERANCE


def adapted(family: str, targets: dict[str, list[str]], ranks: int = 2) -> dict[str, torch.Tensor]:
    """The gradients of rank 0's adapters on one process."""
    grads = work.reference(work.adapt(load_stock(family), **targets), ranks, None)["grads"]
    return {name: grad for name, grad in grads.items() if "lora" in name}


def test_adapters_are_rank_0s_and_get_the_gradients_of_one_process_in_a_loop_by_hand_or_are_refused():
    """Each rank drew its own, after the model was laid out."""
    attention = {"target_modules": ["q_proj", "v_proj"]}
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    fine = [(Case({}), attention), (Case({"ep_size": 2}, fused=False), attention), (Case({}), experts)]
    ways = {"all_to_all": True, "gather": "experts"}
    fine += [(Case({"ep_size": 2, "dispatch": way}, recompute), experts) for way, recompute in ways.items()]
    one_batch = [(Case({"tp_size": 2, "ep_size": 2}), experts)]  # of which each rank sends a half to the experts
    refused = [(Case({"ep_size": 2}, fused=False), experts), (Case({"tp_size": 2}), experts)]
    for *grads, of_one, said, of_tp in on_ranks(2, work.adapters, saved("qwen3_moe"), [*fine, *one_batch, *refused]):
        for got, (_, targets) in zip(grads, fine, strict=True):
            assert work.worst(got, adapted("qwen3_moe", targets))[0] <= TOLERANCE
        assert work.worst(of_one, adapted("qwen3_moe", experts, 1))[0] <= TOLERANCE
        assert said.startswith("model.layers.0.mlp.experts") and "need 'expertmesh'" in said
        assert "tensor parallelism splits (experts.down_proj, experts.gate_up_proj): set ep_size to tp_size" in of_tp


@pytest.mark.slow
def test_adapters_on_experts_of_which_four_ranks_hold_two_copies_get_the_gradients_of_one_process():
    targets = {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]}
    layouts = [{"ep_size": 2}, {"ep_size": 2, "dp_replicate_size": 2}]
    for results in on_ranks(4, work.adapters, saved("nemotron_h"), [(Case(layout), targets) for layout in layouts]):
        for grads in results:
            assert len(grads) == 8 and work.worst(grads, adapted("nemotron_h", targets, 4))[0] <= TOLERANCE


def test_ranks_that_do_not_do_the_same_are_told_so_before_the_first_step(tmp_path):
    folders = [saved("qwen3_moe"), tmp_path / "configured", tmp_path / "tuned"]
    tiny.tiny_model("qwen3_moe", rms_norm_eps=1e-5).save_pretrained(folders[1])
    tuned = load_stock("qwen3_moe")
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight += 1e-3
    tuned.save_pretrained(folders[2])
    for said in on_ranks(2, work.differences, folders, tmp_path):
        assert "nothing" not in said and len(said) == 7, said
        for name, text in said.items():
            assert f": {name} is " in text and " on 0; " in text and " on 1. " in text


def test_a_rank_that_stands_still_in_its_data_is_told_by_the_trainer(tmp_path):
    said, _ = on_ranks(2, work.stops_in_its_data, saved("qwen3_moe"), tmp_path, seconds=60)
    assert said.startswith("Rank 0 waited in vain for the ranks [0, 1] at the count of labels of step")


def test_routers_move_alike_by_the_rows_of_all_ranks():
    ranks = on_ranks(2, work.balanced, saved("deepseek_v3"), Case({"ep_size": 2}))
    for (moved, count), (other, more) in zip(*ranks, strict=True):
        assert torch.equal(moved, other) and not torch.equal(count, more)
        total = (count + more).float()
        torch.testing.assert_close(moved, 0.01 * (total.mean() - total).sign(), rtol=0, atol=1e-6)


def test_a_rank_without_any_gradient_clips_with_the_others(tmp_path):
    assert on_ranks(2, work.clipped_alone, tmp_path, seconds=60) == pytest.approx([13 / 2**0.5] * 2)


def test_from_config_draws_the_same_weights_under_every_layout():
    layouts = [{}, {"ep_size": 4}, {"ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"dp_replicate_size": 2}]
    made = on_ranks(4, work.initialised, "nemotron_h", [Case(layout) for layout in layouts])
    alone = work.initialised(0, "nemotron_h", [Case({})])[0]
    for rank in made:
        for weights in rank:
            assert all(torch.equal(weights[name], want) for name, want in alone.items())


def test_experts_that_cannot_be_spread_are_refused_on_every_rank(tmp_path):
    tiny.tiny_model("qwen3_moe", num_experts=6).save_pretrained(tmp_path)
    several = [(tmp_path, layout) for layout in ({}, {"ep_size": 4}, {"tp_size": 4})]
    *uneven, heads = on_the_same_ranks(4, work.refusal, several)
    for error in sum(uneven, []):
        assert "6 experts (model.layers.0.mlp.experts.gate_up_proj)" in error and "Set ep_size to 2." in error
    for error in heads:
        assert "tp_size=4 does not divide the 2 key-value heads" in error and "Set tp_size to 1 or 2." in error


def test_experts_laid_out_for_our_backend_are_not_trained_by_another():
    several = [(saved("qwen3_moe"), {"ep_size": size}) for size in (2, 1)]
    spread, whole = on_the_same_ranks(2, work.other_backend, several)
    assert all("laid out for 'expertmesh' and cannot be trained by 'grouped_mm'" in error for error in spread)
    assert whole == ["no error"] * 2


WAYS = [*TRANSPORTS, "mailboxes"]  # the last one changes what gather takes


@pytest.mark.parametrize("with_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_layer_with_any_number_of_tokens_anywhere(num_ranks, with_triton, tmp_path):
    if with_triton and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the GPU tests cover Triton here")
    cases = [((6, 0, 5, 1), None), ((0, 4, 0, 0), None), ((0, 0, 0, 0), None), ((3, 9, 2, 2), 7), ((3, 0, 2, 2), 0)]
    check_layers(num_ranks, [(cases, with_triton, way, tmp_path) for way in WAYS])


@pytest.mark.parametrize("with_triton", [False, True], ids=["torch", "triton"])
def test_a_layer_that_is_recomputed_repeats_exchanges_between_none_and_its_reader(with_triton, tmp_path):
    if with_triton and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the GPU tests cover Triton here")
    cases = [((6, 0), None), ((9, 8), 7)]
    check_layers(2, [(cases, with_triton, way, tmp_path, True) for way in WAYS])


def test_a_layer_of_another_backend_whose_exchange_began_before_the_router(tmp_path):
    cases = [((6, 0), None), ((5, 5), 7)]
    check_layers(2, [(cases, False, way, tmp_path, False, "grouped_mm", True) for way in WAYS])


def test_a_token_makes_few_calls_of_ours_on_its_way_through_a_layer():
    """Forward and backward, where kernels are PyTorch's. These numbers only fall: 100 calls in 12 files is the aim."""
    most = {"all_to_all": 96, "gather": 94}
    several = [(saved("qwen3_moe"), Case({"ep_size": 2, "dispatch": dispatch})) for dispatch in most]
    for calls, ranks in zip(most.values(), on_the_same_ranks(2, work.calls_of_ours, several), strict=True):
        for files in ranks:
            assert sum(files.values()) <= calls and len(files) <= 17, files


def check_layers(num_ranks, several):
    """In every way the ranks make of (tokens of each, favourite expert) outputs and gradients of one process."""
    for (cases, *_), made in zip(several, on_the_same_ranks(num_ranks, work.layers, several), strict=True):
        check_layer(made, cases)


def check_layer(made, cases):
    num_ranks = len(made)
    for number, (tokens, favourite) in enumerate(cases):
        experts = work.experts_of(8, slice(None))
        for rank in range(num_ranks):
            x, ids, weights, dout = work.layer_inputs(tokens[rank], favourite, seed=rank)
            out = experts(x, ids, weights)
            out.backward(dout)
            for got, want in zip(made[rank][number], (out, x.grad, weights.grad), strict=False):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for at, grad in ((3, experts.gate_up_proj.grad), (4, experts.down_proj.grad)):
            got = torch.cat([made[rank][number][at] for rank in range(num_ranks)])
            torch.testing.assert_close(got, torch.zeros_like(got) if grad is None else grad, rtol=1e-5, atol=1e-5)


def test_a_rank_that_never_arrives_is_an_error_that_names_who_waited(tmp_path):
    said, _ = on_ranks(2, work.never_arrives, 2.0, tmp_path)
    assert said.startswith("Rank 0 waited in vain for the ranks [0, 1] at layer 1.")


@pytest.mark.parametrize(
    ("setup", "layer", "said", "backward"),
    [
        ({"ep_size": 2, "dispatch": "all_to_all"}, "model.layers.2.mlp.experts", "model.layers.2.mlp.experts", False),
        ({"ep_size": 2, "dispatch": "gather"}, "model.layers.2.mlp.experts", "model.layers.2.mlp.experts", False),
        ({"ep_size": 2}, "model", "the beginning of a forward", False),
        ({}, "model.layers.1", "the weights of model.layers.1", False),
        ({}, "model.layers.1", "the weights of model.layers.0", True),
        ({"dp_replicate_size": 2}, "model.layers.1", "the weights of model.layers.1", True),
    ],
    ids=str,
)
def test_the_place_where_a_rank_never_arrives_is_named(tmp_path, setup, layer, said, backward):
    """By `step_limit` of the setup; the groups have that of `init_process_group`, of hours."""
    case = Case(setup | {"timeout_minutes": 0.05})
    stops = work.never_arrives_at_a_layer
    heard, _ = on_ranks(2, stops, saved("qwen3_moe"), case, layer, tmp_path, backward, seconds=60)
    assert heard.startswith(f"Rank 0 waited in vain for the ranks [0, 1] at {said}. One of them failed")
    assert "gloo" not in heard and "raise timeout_minutes, now 0.05" in heard


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' memory accounting")
@pytest.mark.parametrize("layout", [{"ep_size": 4}, {"ep_size": 2}, {}], ids=str)
def test_loading_never_holds_half_of_the_model(tmp_path, layout):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "vocab_size": 8192}
    for name, layers in (("small", 1), ("large", 8)):
        config = tiny.tiny_config("qwen3_moe", num_hidden_layers=layers, mlp_only_layers=[], **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
    for shard, peak, after in on_ranks(4, work.loading_memory, tmp_path, layout, seconds=240):
        print(f"shard {shard / 2**20:.0f} MiB, peak {peak / 2**20:.0f}, after {after / 2**20:.0f}")
        assert peak < 2 * shard  # of four
