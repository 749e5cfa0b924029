"""A run from its configuration: what it leaves behind, and that it can be repeated, interrupted and resumed."""

import json
import os
import signal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import expertmesh
from expertmesh.adapters.layouts import read_adapter, skeleton
from expertmesh.moe.block import routers
from expertmesh.train.config import ConfigError, load_config
from expertmesh.train.metrics import read_metrics
from expertmesh.train.run import build, run, train
from expertmesh.weights.files import DamagedError
from tests.train.runs import checkpoint, data_file, tiny_run


def configured(output_dir, **changes):
    return load_config(None, tiny_run(output_dir, **changes))


def final_weights(result):
    return load_file(result.final / "model.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_everything_behind(tmp_path):
    trainer = build(configured(tmp_path))
    result = train(configured(tmp_path), trainer)
    assert result.exit_code == 0 and result.metrics["eval_loss"] > 0
    assert load_config(tmp_path / "config.yaml") == configured(tmp_path)
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert {fusion["name"] for fusion in environment["fusions"]} >= {"experts", "router"}

    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [2, 4]
    for record in records:
        assert {"step", "time"} <= record.keys()
        if "loss" in record:
            moe = {"moe/load_cv", "moe/max_vio", "moe/dead_frac", "moe/entropy", "moe_layers"}
            assert {"grad_norm", "learning_rate", "tokens_per_second", "epoch"} | moe <= record.keys()
            assert len(record["moe_layers"]["load_cv"]) == 2  # three layers, one of them dense
    assert "eval_loss" in records[-1]

    for picture in ("loss.png", "router.png"):
        assert (tmp_path / "plots" / picture).read_bytes().startswith(b"\x89PNG")
    stock = transformers.AutoModelForCausalLM.from_pretrained(result.final)
    assert_equal(stock.state_dict(), trainer.model.state_dict())
    assert stock.generation_config.eos_token_id is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.final)
    assert tokenizer.chat_template and "{%- generation %}" in tokenizer.chat_template


def test_the_saved_configuration_repeats_the_run_bit_for_bit(tmp_path):
    first = run(configured(tmp_path / "a"))
    again = run(load_config(tmp_path / "a" / "config.yaml", [f"save.output_dir={tmp_path / 'b'}"]))
    assert_equal(final_weights(first), final_weights(again))
    assert first.metrics["eval_loss"] == again.metrics["eval_loss"]


def test_a_new_run_in_an_old_folder_replaces_its_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    run(configured(tmp_path))
    assert max(record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")) == 4


def interrupt_at(step, number=signal.SIGINT):
    class Kill(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

    return Kill()


@pytest.mark.parametrize("changes", [{}, {"lora": "{r: 4}"}, {"data__packing": "true"}, {"model__name": "demo"}])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, changes):
    whole = run(configured(tmp_path / "whole", train__max_steps=6, **changes))

    config = configured(tmp_path / "parts", train__max_steps=6, **changes)
    trainer = build(config)
    trainer.add_callback(interrupt_at(2))
    stopped = train(config, trainer)
    assert stopped.exit_code == 130 and stopped.final is None
    assert (tmp_path / "parts" / "checkpoint-3").is_dir()

    resumed = run(configured(tmp_path / "parts", train__max_steps=6, save__resume_from_checkpoint="auto", **changes))
    name = "adapter_model.safetensors" if "lora" in changes else "model.safetensors"
    assert_equal(load_file(whole.final / name), load_file(resumed.final / name))
    assert whole.metrics["eval_loss"] == resumed.metrics["eval_loss"]
    steps = [record["step"] for record in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in record]
    assert steps == [2, 4, 6]


def test_the_handlers_of_the_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(configured(tmp_path))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_interrupt_in_the_last_step_finishes_the_run(tmp_path):
    config = configured(tmp_path)
    trainer = build(config)
    trainer.add_callback(interrupt_at(3, signal.SIGTERM))
    assert train(config, trainer).exit_code == 0


def test_auto_resume_starts_where_there_is_nothing_to_resume(tmp_path):
    assert run(configured(tmp_path, save__resume_from_checkpoint="auto")).exit_code == 0


def test_auto_resume_goes_past_a_newer_folder_that_is_no_checkpoint(tmp_path, caplog):
    run(configured(tmp_path, save__save_steps=2))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5.incomplete" / "of an earlier time").mkdir(parents=True)
    result = run(configured(tmp_path, train__max_steps=6, save__resume_from_checkpoint="auto"))
    assert result.exit_code == 0 and "checkpoint-5 is incomplete: it is moved aside" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 6


def test_a_run_starts_only_where_its_model_has_room(tmp_path, monkeypatch):
    config = configured(tmp_path)
    trainer = build(config)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"save.output_dir: the trained model takes .* GB"):
        train(config, trainer)


def test_a_full_disk_does_not_cost_the_trained_model(tmp_path, monkeypatch, caplog):
    config, waited = configured(tmp_path, train__max_steps=1), []
    trainer, save = build(config), expertmesh.weights.files.sync

    def full(path):
        if not waited and "final" in str(path):
            raise OSError(28, "No space left on device")
        save(path)

    monkeypatch.setattr("expertmesh.weights.files.sync", full)
    monkeypatch.setattr("time.sleep", waited.append)
    result = train(config, trainer)
    assert waited == [30] and "The disk is full. Free space" in caplog.text
    transformers.AutoModelForCausalLM.from_pretrained(result.final)


def test_a_changed_byte_of_the_model_is_named_before_it_is_trained(tmp_path):
    result = run(configured(tmp_path / "first", train__max_steps=1))
    weights = result.final / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"model.safetensors in .*final is not what was saved"):
        run(configured(tmp_path / "second", model__name=result.final))


def test_resuming_from_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is no checkpoint"):
        run(configured(tmp_path, save__resume_from_checkpoint=tmp_path))


def test_only_the_configured_checkpoints_are_kept(tmp_path):
    run(configured(tmp_path, save__save_steps=1, save__save_total_limit=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_frozen_routers_do_not_move_and_the_rest_does(tmp_path):
    config = configured(tmp_path, moe__freeze_router="true")
    trainer = build(config)
    frozen = {f"{name}.weight" for name, _ in routers(trainer.model)}
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    train(config, trainer)
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert frozen and not moved & frozen
    assert any("experts" in name for name in moved)


def test_lora_trains_the_adapter_alone(tmp_path):
    result = run(configured(tmp_path, lora="{r: 4, alpha: 8}"))
    adapter = load_file(result.final / "adapter_model.safetensors")
    assert len(adapter) == 2 * 4 * 3  # A and B, of q k v o, in three layers
    assert not (result.final / "model.safetensors").exists()
    settings = json.loads((result.final / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8) and "lora_B_layout" not in settings


def test_all_linear_reaches_experts_leaves_a_frozen_router_and_records_the_layout(tmp_path):
    """An adapter of a base with unsloth in its name would not be read without."""
    result = run(configured(tmp_path, lora="{r: 4, target_modules: all-linear}", moe__freeze_router="true"))
    names = load_file(result.final / "adapter_model.safetensors").keys()
    assert not any(".gate.lora" in name for name in names) and any(".experts.lora_B" in name for name in names)
    settings = json.loads((result.final / "adapter_config.json").read_text())
    assert settings["lora_B_layout"] == "rank_major"
    (result.final / "README.md").write_text("unsloth")
    base = skeleton(transformers.AutoConfig.from_pretrained(settings["base_model_name_or_path"]))
    assert read_adapter(result.final, base).layout == "rank-major"


def test_adapters_train_on_the_demo_s_experts_in_4_bits(tmp_path):
    adapters = "{r: 4, target_modules: [q_proj], target_parameters: [experts.gate_up_proj, experts.down_proj]}"
    changes = {"model__name": "demo", "lora": adapters, "quantization__experts": "mxfp4", "train__max_steps": 2}
    result = run(configured(tmp_path / "run", **changes))
    adapter = load_file(result.final / "adapter_model.safetensors")
    assert any("experts" in name and "lora_B" in name and weight.any() for name, weight in adapter.items())
    assert not (result.final / "model.safetensors").exists()
    with pytest.raises(ConfigError, match=r"cannot be split by `parallel.tp_size`: set it to 1"):
        configured(tmp_path, **changes, parallel__tp_size=2)
    with pytest.raises(ConfigError, match="rows of 16 weights cannot be packed in mxfp4"):
        run(configured(tmp_path / "unfit", **changes | {"model__name": checkpoint()}))


def test_the_configuration_reaches_the_trainer(tmp_path):
    changes = {
        "train__activation_checkpointing": "true",
        "train__optim": "sgd",
        "train__lr_scheduler_type": "linear",
        "train__warmup_steps": 2,
        "train__weight_decay": 0.25,
        "train__max_grad_norm": 0.5,
        "train__gradient_accumulation_steps": 2,
        "moe__router_aux_loss_coef": 0.125,
        "data__max_length": 32,
        "log__eval_steps": 2,
    }
    trainer = build(configured(tmp_path, **changes))
    args = trainer.args
    assert (args.optim, args.lr_scheduler_type, args.warmup_steps) == ("sgd", "linear", 2)
    assert (args.weight_decay, args.max_grad_norm, args.gradient_accumulation_steps) == (0.25, 0.5, 2)
    assert (args.max_length, args.eval_steps, args.eval_strategy) == (32, 2, "steps")
    assert not args.logging_nan_inf_filter and not args.bf16
    assert trainer.model.config.router_aux_loss_coef == 0.125
    trainer.train()
    assert trainer.model.is_activation_checkpointing


def test_layers_recompute_what_the_configuration_says_or_it_is_refused(tmp_path):
    trainer = build(configured(tmp_path, train__activation_checkpointing="{experts: 1}", lora="{r: 4}"))
    trainer.train()
    levels = [module._gradient_checkpointing_func.args[0] for module in trainer.model.model.model.layers]
    assert levels[:2] == ["experts", "light"] and not trainer.args.gradient_checkpointing
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing: .*'light' needs a fused model"):
        build(configured(tmp_path / "stock", train__activation_checkpointing="light", model__fused="false"))


@pytest.mark.parametrize(("every", "evaluated"), [(3, [3, 4]), (2, [2, 4])])
def test_the_finished_model_is_evaluated_and_not_twice(tmp_path, every, evaluated):
    result = run(configured(tmp_path, log__eval_steps=every, log__logging_steps=10))  # no record lies between
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in record]
    assert [record["step"] for record in records] == evaluated
    assert result.metrics["eval_loss"] == records[-1]["eval_loss"] != records[0]["eval_loss"]


def test_assistant_only_loss_masks_the_question(tmp_path):
    masked = build(configured(tmp_path, data__assistant_only_loss="true")).train_dataset[0]["labels"]
    whole = build(configured(tmp_path, data__assistant_only_loss="false")).train_dataset[0]["labels"]
    assert -100 in masked and -100 not in whole


def test_the_progress_line_says_loss_speed_and_balance(tmp_path, capfd):
    run(configured(tmp_path))
    said = capfd.readouterr().err
    for part in ("step 4/4", "loss", "tokens/s", "expert balance", "held-out loss"):
        assert part in said


def test_the_stock_model_and_the_fused_one_learn_the_same(tmp_path):
    ours, stock = (run(configured(tmp_path / str(fused), model__fused=fused)) for fused in (True, False))
    assert ours.metrics["eval_loss"] == pytest.approx(stock.metrics["eval_loss"], rel=1e-5)


def test_the_yaml_of_a_run_is_complete(tmp_path):
    sections = yaml.safe_load(configured(tmp_path).to_yaml())
    assert sections["model"]["name"] == str(checkpoint())
    assert sections["data"]["name"] == str(data_file())
    assert Path(sections["save"]["output_dir"]) == tmp_path


@pytest.mark.parametrize("lost", ["layers.2.mlp.experts.3", "layers.1.self_attn.q_proj"])
def test_a_checkpoint_that_was_cut_short_is_not_resumed(tmp_path, lost):
    run(configured(tmp_path, save__save_steps=2))
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    left = {name: weight for name, weight in weights.items() if lost not in name}
    save_file(left, tmp_path / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    resumed = configured(tmp_path / "resumed", save__resume_from_checkpoint=tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2 is not what was saved: model.safetensors has changed"):
        run(resumed)
    (tmp_path / "checkpoint-2" / "checkpoint.sha256").unlink()  # as after a save by another program
    with pytest.raises(ValueError, match=rf"checkpoint.* {lost.rpartition('.')[0]}|model.{lost.rpartition('.')[0]}"):
        run(resumed)


def test_the_best_checkpoint_is_loaded_with_its_experts(tmp_path):
    trainer = build(configured(tmp_path, save__save_steps=2))
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    best = expertmesh.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert not torch.equal(trainer.model.state_dict()["lm_head.weight"], best["lm_head.weight"])
    trainer._load_best_model()
    assert_equal(trainer.model.state_dict(), best)
