"""metrics.jsonl: one JSON object per line, whatever happens."""

import json
from types import SimpleNamespace

import torch

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


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert steps(tmp_path) == [1]
    assert read_metrics(tmp_path / "absent.jsonl") == []
