"""`expertmesh plan`: what it prints, and its exit codes."""

import pytest

from expertmesh import cli
from expertmesh.bench.tiny import tiny_config
from expertmesh.bench.works import WORKS, config_of
from expertmesh.plan import layouts
from expertmesh.plan.speed import FIRST

#: a few megabytes
SMALL = {"hidden_size": 1024, "moe_intermediate_size": 256, "vocab_size": 8192}


@pytest.fixture
def planned(tmp_path, capsys):
    """Plans a run of a model configuration: (exit code, output, errors)."""

    def planned(config, *arguments):
        config.save_pretrained(tmp_path / "model")
        text = f"model: {{name: '{tmp_path / 'model'}', dtype: bfloat16}}\ndata: {{name: 'demo:all', max_length: 64}}\n"
        (tmp_path / "run.yaml").write_text(text)
        code = cli.run(["plan", str(tmp_path / "run.yaml"), *arguments])
        return code, *capsys.readouterr()

    return planned


def test_a_run_that_fits_is_planned_without_weights_data_or_gpu(planned, monkeypatch):
    monkeypatch.setattr(layouts, "MOST_ROWS", 1)
    keys = ["parallel.ep_size=2", "train.gradient_accumulation_steps=2", "train.activation_checkpointing=true"]
    code, said, errors = planned(tiny_config("qwen3_moe", **SMALL), *keys, "--gpus", "2")
    assert code == 0 and errors == ""
    for line in ("2 x h200", "parameters", "optimizer states", "fits, ", "experts", "tokens/s", "fastest first"):
        assert line in said


def test_adapters_need_neither_gradients_nor_states_of_frozen_weights(planned):
    pytest.importorskip("peft")
    whole, adapters = (
        planned(tiny_config("qwen3_moe", **SMALL), "--no-layouts", *keys)[1] for keys in ((), ("lora={}",))
    )
    assert "optimizer states" in whole and "optimizer states" not in adapters


def test_experts_in_4_bits_are_planned_and_simulated(planned):
    pytest.importorskip("peft")
    keys = ["lora.target_modules=all-linear", "quantization.experts=nf4", "parallel.ep_size=2"]
    for places in (("--gpus", "2", "--no-layouts"), ("--simulate", "2")):
        code, said, errors = planned(
            tiny_config("qwen3_moe", **SMALL | {"moe_intermediate_size": 2048}), *keys, *places
        )
        assert code == 0 and errors == "" and "decoded experts" in said


def test_small_states_and_gradients_that_do_not_stand_are_planned(planned):
    keys = ["train.optim_states=8bit", "train.gradient_release=running"]
    _, said, _ = planned(tiny_config("qwen3_moe", **SMALL), "--no-layouts", *keys)
    assert "adamw-8bit, gradients released" in said


def test_the_price_of_exact_clipping_is_said(planned):
    for how in ("running", "exact"):
        _, said, _ = planned(tiny_config("qwen3_moe", **SMALL), "--no-layouts", f"train.gradient_release={how}")
        assert ("gradients released, clipped exactly" in said) == (how == "exact") == (FIRST in said)


def test_ranks_that_do_not_exist_are_simulated(planned):
    keys = ["parallel.ep_size=4", "parallel.tp_size=2", "--simulate", "8", "--per-node", "2", "--network", "12.5"]
    code, said, errors = planned(tiny_config("qwen3_moe", **SMALL), *keys)
    assert code == 0 and "fastest first" not in said and "tp_size 2" in said
    for line in (
        "sharded by the real code for 8 ranks, 2 on a node",
        "shards of a GPU",
        "tensor parallelism",
        "network",
    ):
        assert line in said


def test_what_is_left_to_the_plan_is_chosen_first(planned):
    config = tiny_config("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[])
    code, said, _ = planned(config, "parallel=auto", "--gpus", "2", "--no-layouts")
    size = said.splitlines()[0].partition("auto: parallel.ep_size=")[2]
    assert code == 0 and size in ("1", "2") and f"ep_size {size}, 2 shards" in said


def test_a_run_that_does_not_fit_exits_with_1(planned):
    config = config_of(WORKS["qwen3-30b-a3b"], 4)
    code, said, _ = planned(config, "--gpu", "rtx-4090", "--no-layouts")
    assert code == 1 and "does not fit" in said and "assumed" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--gpu", "h200x"], "did you mean 'h200'"),
        (["--gpus", "2", "parallel.ep_size=3"], "ep_size=3"),
        (["--gpus", "3", "parallel.tp_size=2"], "tp_size=2"),
        (["--gpus", "2", "train.optim_offload=true"], "works on one GPU only"),
        (["--simulate", "2", "parallel.tp_size=4"], "tp_size=4"),
        (["lora={}", "quantization.experts=nf4"], "rows of 32 weights cannot be packed in nf4"),
        (["train.bf16=true"], "autocast"),
        (["train.optim=lion_32bit"], "train.optim"),
        (["model.nam=x"], "model.nam"),
    ],
)
def test_what_cannot_be_planned_exits_with_2(planned, arguments, why):
    code, _, errors = planned(tiny_config("qwen3_moe"), *arguments)
    assert code == 2 and why in errors
