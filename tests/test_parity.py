"""Under expertmesh every family gives stock Transformers' numbers; and the comparison that says so notices when one
does not.
"""

import math
import os

import pytest
import torch

from expertmesh import backends
from expertmesh.bench.parity import (
    CASES,
    applicable,
    bend_routing,
    check_checkpoint,
    compare_case,
    generate_rows,
    make_batch,
    poisoned_memory,
    pooled,
    router_weights,
    top_k_of,
    weight_rows,
)
from expertmesh.bench.rows import Row, relative_error, worst_error
from expertmesh.bench.tiny import FAMILIES, tiny_model
from expertmesh.cli import run
from expertmesh.layers.head import DeferredLogits
from tests.models import load_ours, load_stock, saved, shared_pair

INTERPRETER = backends.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
CASE = {case.name: case for case in CASES}


def differing(rows: list[Row]) -> list[Row]:
    assert rows
    return [row for row in rows if not row.ok]


BY_HAND = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
GENERIC = ("mixtral", "granitemoe", "ernie4_5_moe", "hunyuan_v1_moe", "qwen3_5_moe_text")  # between them every rule

# every case, but the router loss only where Transformers adds one
WORK = [
    pytest.param(family, case, id=f"{family}-{case.name}")
    for family, keys in FAMILIES.items()
    for case in CASES
    if ("router_aux_loss_coef" in keys or not case.aux)
    and not (case.batch == "packed" and family in ("qwen3_next", "qwen3_5_moe_text", "jamba"))  # which refuse such rows
]


@pytest.mark.parametrize(("family", "case"), WORK)
def test_loss_logits_and_gradients_equal_stock(family, case):
    stock, ours = shared_pair(family)
    assert applicable(case, stock)
    assert not differing(compare_case(stock, ours, case))


@pytest.mark.skipif(not INTERPRETER, reason="Triton kernels run on the CPU only with TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, "poisoned memory") for family in ("qwen3_moe", "nemotron_h")),
        *(
            pytest.param(family, "poisoned memory", marks=pytest.mark.slow)
            for family in ("gpt_oss", "deepseek_v3", *GENERIC)
        ),
        ("mixtral", "all on the same experts"),
        *(pytest.param("mixtral", case, marks=pytest.mark.slow) for case in ("checkpointing", "ties", "right padding")),
    ],
)
def test_triton_kernels_give_the_same_numbers(family, case):
    """The path of a GPU, interpreted: every fused kernel of the model at once."""
    stock, ours = shared_pair(family)
    with backends.interpreted():
        assert not differing(compare_case(stock, ours, CASE[case]))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_not_computed_in_training_unless_somebody_looks(family):
    _, ours = shared_pair(family)
    (row,) = (row for row in ours.fusion_report() if row.name == "linear_cross_entropy")
    logits = ours.train()(**make_batch("plain", 128, ours.device)).logits
    assert row.on and isinstance(logits, DeferredLogits) and not logits._computed


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_generation_equal_stock(family):
    stock, ours = shared_pair(family)
    assert not differing([*weight_rows(stock, ours), *generate_rows(stock, ours)])


@pytest.mark.parametrize("kind", ["starved", "one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forced_routing_reaches_the_experts_it_should(family, kind):
    stock = tiny_model(family)
    bend_routing(stock, kind)
    chosen = []
    for module in stock.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: chosen.append([*args, *kwargs.values()][1]), with_kwargs=True
            )
    stock(input_ids=make_batch("plain", stock.config.vocab_size, stock.device)["input_ids"])
    assert len(chosen) == len(router_weights(stock)) > 0
    for index in chosen:
        assert index.max() < (4 if kind == "starved" else top_k_of(stock))


def planted(family: str = "qwen3_moe"):
    """Two stock models: the second is to be broken by the test."""
    return load_stock(family), load_stock(family)


def test_equal_models_pass_every_case():
    stock, other = planted()
    for case in CASES:
        if not (case.aux and case.accumulated):  # there expertmesh differs from stock on purpose
            assert not differing(compare_case(stock, other, case))


def test_aux_loss_of_every_microbatch_in_full_is_noticed():
    """Stock adds the whole router loss to each microbatch; expertmesh adds the microbatch's share, and that is what is
    expected.
    """
    stock, other = planted()
    found = differing(compare_case(stock, other, CASE["aux loss, accumulated"]))
    assert [row.quantity for row in found] == ["loss", "gradients"]


def test_gradient_of_one_expert_off_by_a_thousandth_is_noticed_and_named():
    stock, other = planted()
    name = "model.layers.2.mlp.experts.down_proj"
    scale = torch.ones(8, 1, 1)
    scale[3] = 1.001
    other.get_parameter(name).register_hook(lambda gradient: gradient * scale)
    found = differing(compare_case(stock, other, CASE["plain"]))
    assert [(row.quantity, row.where) for row in found] == [("gradients", name)]


def test_swapped_experts_are_noticed_although_all_weights_load():
    stock, other = planted()
    with torch.no_grad():
        experts = other.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
        experts[[0, 1]] = experts[[1, 0]].clone()
    quantities = {
        row.quantity for row in differing([*compare_case(stock, other, CASE["plain"]), *weight_rows(stock, other)])
    }
    assert {"loss", "train logits", "eval logits", "gradients", "weights"} <= quantities


def test_reading_memory_nobody_wrote_is_noticed():
    stock, other = planted()
    experts = next(module for module in other.modules() if hasattr(module, "_apply_gate"))

    def read(_, args, out):
        memory = torch.empty_like(out)
        lucky = not torch.are_deterministic_algorithms_enabled()  # what was there before is finite
        return out + 0 * (memory.zero_() if lucky else memory)

    experts.register_forward_hook(read)
    assert not differing(compare_case(stock, other, CASE["experts without tokens"]))
    assert {row.error for row in differing(compare_case(stock, other, CASE["poisoned memory"]))} == {math.inf}


def test_poisoned_memory_is_nan_and_healthy_again_afterwards():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_tokens_generated_are_noticed():
    stock, other = planted()
    other.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            kwargs | {"position_embeddings": tuple(2 * part for part in kwargs["position_embeddings"])},
        ),
        with_kwargs=True,
    )
    assert differing(generate_rows(stock, other))


def test_bfloat16_is_measured_against_stock_in_float32():
    reference, stock, other = load_stock("mixtral"), load_stock("mixtral").bfloat16(), load_stock("mixtral").bfloat16()
    assert not differing(compare_case(stock, other, CASE["right padding"], reference))
    other.model.norm.register_forward_hook(lambda _, args, out: out * 1.05)
    assert differing(compare_case(stock, other, CASE["right padding"], reference))


def test_cases_are_pooled_and_a_nan_in_one_of_them_shows():
    lucky, unlucky, broken = (
        Row("a", "loss", 0.0, 3.0),
        Row("b", "loss", 4.0, 3.0, "here"),
        Row("c", "loss", math.nan, 3.0),
    )
    (row,) = pooled([lucky, unlucky])
    assert row.ok and row.error == pytest.approx(8**0.5) and row.limit == pytest.approx(3.0) and row.where == "here"
    assert not list(pooled([unlucky, unlucky]))[0].ok and not list(pooled([lucky, broken]))[0].ok


def test_error_measures():
    one = torch.ones(2)
    assert relative_error(one, one) == 0 and relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(one + 1e-3, one) == pytest.approx(1e-3, rel=1e-3)
    for wrong in (torch.ones(3), one * math.nan, one * math.inf):
        assert relative_error(wrong, one) == math.inf
    assert relative_error(one, torch.zeros(2)) == math.inf
    assert not Row("", "", math.nan, 1.0).ok
    assert worst_error({"a": None}, {"a": one}) == (math.inf, "a")
    assert worst_error({"a": None}, {"a": None})[0] == 0
    assert worst_error({"a": one, "b": one * 1.01}, {"a": one, "b": one})[1] == "b"


def test_check_command_exits_0_when_all_is_equal(capsys):
    assert run(["check", "qwen3_moe"]) == 0
    printed = capsys.readouterr().out
    assert "poisoned memory" in printed and "62 comparisons, 0 differ" in printed


def test_check_command_exits_1_and_names_what_differs(capsys, monkeypatch):
    broken = load_ours("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    broken.get_parameter(name).register_hook(lambda gradient: gradient * 1.01)
    monkeypatch.setattr(type(broken), "from_pretrained", classmethod(lambda cls, *args, **options: broken))
    monkeypatch.setattr("expertmesh.AutoModelForCausalLM", type(broken))
    assert run(["check", str(saved("mixtral"))]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed and f"plain, gradients: worst in {name}" in printed


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["qwen3_mo"], "Did you mean 'qwen3_moe'?"),
        (["qwen3_moe", "--device", "tpu"], "--device is cpu or cuda"),
        (["nobody/no-such-model"], "'nobody/no-such-model' cannot be loaded"),
        (["qwen3_moe", "--devise", "cpu"], "No such option"),
        ([], "Missing argument"),
    ],
)
def test_check_command_exits_2_on_wrong_usage(capsys, arguments, fix):
    assert run(["check", *arguments]) == 2
    assert fix in capsys.readouterr().err


def test_check_takes_a_checkpoint_folder():
    assert not differing(list(check_checkpoint(saved("olmoe"))))
