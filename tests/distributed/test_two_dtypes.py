"""A bfloat16 model trains and is saved on ranks as Transformers keeps it: from 5.24 on with routers in float32."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open

from tests.distributed import two_dtypes, work
from tests.distributed.ranks import on_the_same_ranks
from tests.models import load_ours, load_stock, saved

FAMILIES = pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
FLOAT32 = Version(transformers.__version__) >= Version("5.24.0")


def on_disk(folder) -> dict[str, str]:
    """{key: dtype} of a saved model."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    return found


LAYOUTS = ({}, {"ep_size": 2}, {"tp_size": 2})


@FAMILIES
def test_it_trains_and_is_saved_in_the_dtypes_of_stock(family, tmp_path):
    several = [(family, layout, tmp_path / str(number)) for number, layout in enumerate(LAYOUTS)]
    ranks = on_the_same_ranks(2, two_dtypes.step_and_save, several)
    for (_, layout, folder), results in zip(several, ranks, strict=True):
        check_trained_and_saved(family, layout, results, folder)


def check_trained_and_saved(family, layout, results, folder):
    stock = load_stock(family, dtype=torch.bfloat16)
    alone = work.reference(load_ours(family, dtype=torch.bfloat16), 2 // layout.get("tp_size", 1), None)["grads"]
    routers = {name for name in alone if name.endswith("gate.weight")}
    assert {name for name, dtype in two_dtypes.dtypes(stock).items() if dtype == torch.float32} == (
        routers if FLOAT32 else set()
    )
    for result in results:
        assert result["loaded"] == two_dtypes.dtypes(stock)
        assert routers <= result["moved"]
        assert {n: g.dtype for n, g in result["gradients"].items()} == {n: g.dtype for n, g in alone.items()}
        got, want = ({n: g.float() for n, g in grads.items()} for grads in (result["gradients"], alone))
        assert work.worst(got, want)[0] < 0.1, work.worst(got, want)  # tensor parallelism rounds partial sums
        assert result["ours"][0] == pytest.approx(result["torch"][0], rel=1e-4)
        assert result["ours"][1] == pytest.approx(
            result["torch"][1], rel=0.1
        )  # weights round, and tokens change experts
        assert result["torch"][0] == pytest.approx(
            float(torch.stack([g.norm() for g in want.values()]).norm()), rel=1e-2
        )
    assert on_disk(folder) == on_disk(saved(family, torch.bfloat16))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, result["weights"][name]), name


@FAMILIES
def test_a_new_model_has_them_too(family):
    stock = two_dtypes.dtypes(load_stock(family, dtype=torch.bfloat16))
    layouts = [(family, layout) for layout in LAYOUTS[:2]]
    assert on_the_same_ranks(2, two_dtypes.new, layouts) == [[stock, stock]] * 2
