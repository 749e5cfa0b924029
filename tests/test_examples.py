"""Every YAML file in examples/ is a configuration, and those that need no download train."""

from pathlib import Path

import pytest

from expertmesh import cli
from expertmesh.train.config import DEMO, load_config

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
