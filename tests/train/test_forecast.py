"""What a run says of its plan, on the GPU that a test says is there."""

import pytest
import torch

from expertmesh import backends, cli
from expertmesh.plan.gpus import GPUS, gpu_here
from expertmesh.plan.speed import FIRST
from expertmesh.train.config import load_config
from expertmesh.train.metrics import read_metrics
from expertmesh.train.planned import log_plan, plan_of, summary_lines
from tests.train.runs import tiny_run

GIB = 2**30


@pytest.fixture
def on(monkeypatch):
    """Says that the machine has this GPU."""
    return lambda name="NVIDIA H200", memory=140 * GIB: monkeypatch.setattr(backends, "gpu", lambda: (name, memory))


def test_the_plan_comes_first_and_stands_beside_ten_steps(tmp_path, on, capsys):
    on()
    changes = {"train__max_steps": 12, "log__logging_steps": 10, "data__eval_fraction": 0}
    assert cli.run(["train", *tiny_run(tmp_path, **changes)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("Plan: ", "Step ", "step "))]
    memory, time, beside, ten = said[:4]
    assert " of 140.0 GiB of each h200, " in memory and "are left (libraries" in memory
    assert "ms for a step of 512 tokens on each, " in time and time.startswith("Plan: ")
    assert beside.startswith("Step 10: ") and " tokens/s (planned " in beside and "GiB" not in beside  # of no CPU
    assert ten.startswith("step 10/12  loss ")  # the record of the step is not lost
    (record,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "planned/step_ms" in record]
    assert record["step"] == 10 and record["measured/step_ms"] > 0
    assert record["measured/tokens_per_second"] < record["planned/tokens_per_second"]


def test_a_run_says_what_exact_clipping_costs_it(tmp_path):
    for how in ("running", "exact"):
        _, time = summary_lines(
            plan_of(load_config(None, tiny_run(tmp_path, train__gradient_release=how)), 1, GPUS["h200"])
        )
        assert (FIRST in time) == (how == "exact"), time


def test_what_cannot_be_planned_runs_and_a_line_says_why(tmp_path, on, capsys):
    config = load_config(None, tiny_run(tmp_path))
    assert log_plan(config, 1) is None and capsys.readouterr().err == ""  # no GPU
    on("NVIDIA L40S")
    assert (
        log_plan(config, 1) is None
        and "No plan: no rates are known of this machine's NVIDIA L40S" in capsys.readouterr().err
    )
    on()
    config.train.bf16 = True
    assert log_plan(config, 1) is None and "No plan: train.bf16" in capsys.readouterr().err


def test_planning_draws_no_random_number_of_the_run(tmp_path, on):
    on()
    before = torch.get_rng_state()
    assert log_plan(load_config(None, tiny_run(tmp_path)), 1) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(on, name, kind):
    on(name, 17 * GIB)
    if kind is None:
        with pytest.raises(ValueError, match="no rates"):
            gpu_here()
    else:
        assert gpu_here().name == kind and gpu_here().memory == 17 * GIB
