"""Every YAML file in examples/ is a configuration, and those that need no download train."""

import importlib.util
from pathlib import Path

import pytest

from expertmesh import cli
from expertmesh.train.config import DEMO, load_config
from expertmesh.train.metrics import read_metrics

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_resolves(path, capsys):
    assert cli.run(["train", str(path), "--dry-run"]) == 0
    assert load_config(path).model.name in capsys.readouterr().out
    assert f"expertmesh train examples/{path.name}" in path.read_text()


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


def test_the_demo_example_is_what_runs_without_a_file():
    (demo,) = [path for path in EXAMPLES if path.name == "demo.yaml"]
    assert load_config(demo) == load_config()
    assert DEMO["model"]["name"] == "demo"


@pytest.mark.parametrize("name", ["demo.yaml", "own-data.yaml"])
def test_an_example_without_download_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES[0].parents[1])
    short = ["train.max_steps=2", "train.per_device_train_batch_size=2", "data.max_length=32", "log.logging_steps=1"]
    assert cli.run(["train", f"examples/{name}", *short, f"save.output_dir={tmp_path}"]) == 0
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_a_whole_model_on_one_gpu_needs_no_weights_and_no_network(tmp_path):
    """The example's keys, on a tiny model and the files that scripts/offline_inputs.py makes."""
    spec = importlib.util.spec_from_file_location("inputs", EXAMPLES[0].parents[1] / "scripts" / "offline_inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    inputs.write_model(tmp_path / "model", "qwen3-30b-a3b", 1, tiny=True)
    assert inputs.write_text(tmp_path / "text.jsonl", 400, limit=24) == 24
    assert not list((tmp_path / "model").glob("*.safetensors"))
    (path,) = [path for path in EXAMPLES if path.name == "one-gpu-full.yaml"]
    words = [f"model.name={tmp_path}/model", f"data.name={tmp_path}/text.jsonl", f"save.output_dir={tmp_path}/run"]
    words += ["data.packing=false", "data.max_length=32", "train.per_device_train_batch_size=8", "train.max_steps=6"]
    assert cli.run(["train", str(path), *words, "log.logging_steps=1", "train.learning_rate=0.01"]) == 0
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert not (tmp_path / "run" / "final").exists()
