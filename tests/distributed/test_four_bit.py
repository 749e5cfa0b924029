"""Experts in 4 bits on several ranks: each has its own, packed as on one process, and adapters train as there."""

import pytest
import torch
from safetensors.torch import load_file

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.bench.tiny import tiny_model
from tests.distributed import four_bit
from tests.distributed.ranks import on_ranks, on_the_same_ranks
from tests.distributed.work import Case, worst
from tests.moe.test_four_bit import WIDTHS, config
from tests.weights.test_mxfp4 import published  # noqa: F401  a fixture

TOLERANCE = 1e-5
TWO = [Case({"ep_size": 2}), Case({"ep_size": 2, "dispatch": "gather"}, recompute=True), Case({}), Case({}, True)]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_model("qwen3_moe", **WIDTHS["qwen3_moe"]).save_pretrained(folder)
    return folder


def assert_shares(got, whole, rank, ep_size):
    """A rank has its rows of all that is packed."""
    assert got.keys() == whole.keys() and whole
    for name, parts in whole.items():
        for mine, part in zip(got[name], parts, strict=True):
            assert torch.equal(mine, part.chunk(ep_size)[rank % ep_size]), name


def check(num_ranks, cases, folder, format):
    held, loss, grads = four_bit.alone(folder, format, num_ranks)
    assert len(grads) >= 6 and all(grad.any() for grad in grads.values())
    made = on_ranks(num_ranks, four_bit.trained, folder, format, cases)
    for rank, found in enumerate(made):
        for case, (theirs, got, their_grads) in zip(cases, found, strict=True):
            assert_shares(theirs, held, rank, case.setup.get("ep_size", 1))
            assert got == pytest.approx(loss, rel=TOLERANCE), case
            error, name = worst(their_grads, grads)
            assert error <= TOLERANCE, f"{case} {name} {error:.1e}"


def test_two_ranks_hold_their_experts_and_train_as_one_process(qwen3):
    check(2, TWO, qwen3, "nf4")


def test_gpt_oss_as_it_is_published_on_two_ranks(published):  # noqa: F811
    check(2, TWO[:2], published, "mxfp4")


def test_four_ranks_with_experts_on_two(qwen3):
    check(4, [Case({"ep_size": 2}), Case({"ep_size": 2, "dp_replicate_size": 2}, True)], qwen3, "nf4")


def test_ranks_pack_their_own_experts_and_write_the_model_of_one_process(qwen3, tmp_path):
    four_bit.load(qwen3, "nf4").save_pretrained(tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    num_experts = len(next(weight for name, weight in expected.items() if name.endswith("_blocks")))
    several = [(qwen3, setup, tmp_path / f"{len(setup)}") for setup in ({"ep_size": 2}, {})]
    for (_, setup, out), packed in zip(several, on_the_same_ranks(2, four_bit.saved, several), strict=True):
        assert packed == [{num_experts // setup.get("ep_size", 1)}] * 2
        written = {name: weight for file in out.glob("*.safetensors") for name, weight in load_file(file).items()}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], weight) for name, weight in expected.items())
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert_shares(four_bit.parts(again), four_bit.parts(four_bit.load(qwen3, "nf4")), 0, 1)


def test_new_weights_are_the_same_under_every_layout():
    torch.manual_seed(0)
    quantization = ExpertsQuantConfig("nf4")
    alone = four_bit.parts(AutoModelForCausalLM.from_config(config("gpt_oss"), quantization_config=quantization))
    setups = [{"ep_size": 2}, {}]
    for rank, held in enumerate(on_ranks(2, four_bit.drawn, config("gpt_oss"), setups)):
        for setup, got in zip(setups, held, strict=True):
            assert_shares(got, alone, rank, setup.get("ep_size", 1))


def test_saving_an_adapter_gathers_no_weight_of_the_base_but_embeddings_and_head(qwen3, tmp_path):
    width, vocabulary = config("qwen3_moe").hidden_size, config("qwen3_moe").vocab_size
    for numbers in on_ranks(2, four_bit.gathered, qwen3, tmp_path):
        assert numbers == dict.fromkeys(("None", "nf4"), 2 * vocabulary * width)
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("None", "nf4")]
    assert written[0].keys() == written[1].keys() and any(".experts." in name for name in written[0])
