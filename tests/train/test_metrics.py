"""metrics.jsonl: one JSON object per line, whatever happens."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from expertmesh import Trainer
from expertmesh.bench.tiny import tiny_model
from expertmesh.train.metrics import MetricsFile, read_metrics
from expertmesh.train.routing import RouterLoad


def at(step):
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def log(file, step, **logs):
    file.on_log(None, at(step), None, logs=logs)


def metrics_file(folder):
    return MetricsFile(folder, RouterLoad(torch.nn.Identity()))


def steps(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    log(metrics_file(tmp_path), 1, loss=float("nan"), grad_norm=torch.tensor(float("inf")), epoch=torch.tensor(0.5))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda constant: (_ for _ in ()).throw(ValueError(constant)))
    assert record["loss"] is None and record["grad_norm"] is None and record["epoch"] == 0.5


def test_a_new_run_keeps_what_it_measured_before_its_first_step_and_nothing_older(tmp_path):
    log(metrics_file(tmp_path), 7, loss=1.0)
    file = metrics_file(tmp_path)
    log(file, 0, eval_loss=2.0)
    file.on_train_begin(None, at(0), None)
    log(file, 1, loss=1.5)
    assert steps(tmp_path) == [0, 1]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    old = metrics_file(tmp_path)
    for step in (1, 2, 3):
        log(old, step, loss=1.0)
    file = metrics_file(tmp_path)
    file.on_train_begin(None, at(2), None)
    log(file, 3, loss=0.5)
    assert steps(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5


def test_evaluating_in_an_old_folder_loses_nothing(tmp_path):
    log(metrics_file(tmp_path), 7, loss=1.0)
    log(metrics_file(tmp_path), 0, eval_loss=2.0)
    assert steps(tmp_path) == [7, 0]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert steps(tmp_path) == [1] and not caplog.text, "a kill does that, it is no damage"
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_damaged_lines_are_named_and_left_out_and_a_run_goes_on(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\x00ep\n[1]\n{"loss": 2}\n\n{"step": 2}\n{"step": 3}\n')
    assert steps(tmp_path) == [1, 2, 3]
    assert f"{path} is damaged: it is read without line 2, 3, 4, 5." in caplog.text
    file = metrics_file(tmp_path)
    file.on_train_begin(None, at(2), None)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tokens_per_second_are_what_a_stopwatch_says(tmp_path, monkeypatch):
    """Loading, steps and logging count; padding, evaluation and checkpoints do not."""
    clock = [100.0]
    monkeypatch.setattr("expertmesh.train.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def collate(rows):
        clock[0] += 50 if "held out" in rows[0] else 1
        ids = torch.tensor([row["ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1] * 6 + [0] * 2] * len(rows))}

    class Takes(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock[0] += 2

        def on_log(self, *_, **__):
            clock[0] += 4

        def on_save(self, *_, **__):
            clock[0] += 1000

    rows = [{"ids": list(range(3, 11))} for _ in range(24)]
    held_out = [row | {"held out": True} for row in rows[:4]]
    steps = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1}
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    args = transformers.TrainingArguments(str(tmp_path), **steps, **often, **quiet)
    trainer = Trainer(tiny_model("qwen3_moe"), args, collate, rows, held_out, callbacks=[Takes()])
    trainer.train()
    rates = [record["tokens_per_second"] for record in trainer.state.log_history if "tokens_per_second" in record]
    # three batches are loaded up to the end of the first step, none in the last two; logging is in the window behind it
    seconds = [3 + 2, 1 + 2 + 4, 1 + 2 + 4, 1 + 2, 2 + 4, 2]
    assert rates == [pytest.approx(4 * 6 / each, abs=0.06) for each in seconds]
