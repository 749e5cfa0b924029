"""The command line: verbs, help, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import expertmesh
from expertmesh import backends, cli
from expertmesh.auto import AutoModelForCausalLM
from expertmesh.bench.tiny import FAMILIES, tiny_model
from expertmesh.checkpoint.state import save_checkpoint
from expertmesh.cli.doctor import REQUIRED, fusions_of, whether_tested, wrong_versions
from expertmesh.train.config import Config, load_config
from tests.train.runs import data_file, tiny_run

ROOT = Path(__file__).parents[2]


def process(*arguments, **options):
    command = [sys.executable, "-m", "expertmesh", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_help_lists_every_verb_and_imports_nothing_heavy():
    probe = (
        "import sys; from expertmesh.cli import run; code = run(['--help']); heavy = set(sys.modules) & "
        "{'torch', 'transformers', 'trl', 'datasets', 'matplotlib'}; sys.exit(f'{code} {heavy}')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "0 set()"
    for verb, sentence in cli.VERBS.items():
        assert verb in done.stdout and sentence.split()[0] in done.stdout


@pytest.mark.parametrize(("arguments", "code", "said"), [(["--help"], 0, "doctor"), (["frobnicate"], 2, "frobnicate")])
def test_the_package_runs_as_the_command(arguments, code, said):
    run = process(*arguments)
    assert said in "".join(run.communicate(timeout=60)) and run.returncode == code


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    assert cli.run([verb, "--help"]) == 0
    assert verb in capsys.readouterr().out


@pytest.mark.parametrize("how", ["export", "checkpoint"])
def test_check_names_a_changed_byte(how, tmp_path, capsys):
    model = expertmesh.fuse(tiny_model("qwen3_moe"))
    path = tmp_path / "export"
    if how == "export":
        model.save_pretrained(path)
    else:
        path = save_checkpoint(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters()), step=1)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cli.run(["check", str(path)]) in (1, 2)
    assert "model.safetensors" in (said := capsys.readouterr().err) and "is not what was saved" in said


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train", "--frobnicate"], ["doctor", "extra"], []])
def test_wrong_usage_exits_with_2(arguments):
    assert cli.run(arguments) == 2


def test_dry_run_prints_the_resolved_configuration(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"model: {{name: a/b}}\ndata: {{name: {data_file()}}}\n")
    assert cli.run(["train", str(tmp_path / "run.yaml"), "train.learning_rate=1e-3", "--dry-run"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    resolved = load_config(tmp_path / "resolved.yaml")
    assert resolved == load_config(tmp_path / "run.yaml", ["train.learning_rate=1e-3"])
    assert resolved.train.learning_rate == 1e-3


def test_train_says_where_the_model_is(tmp_path, capsys):
    assert cli.run(["train", *tiny_run(tmp_path)]) == 0
    assert f"the model is in {tmp_path / 'final'}" in capsys.readouterr().err


def test_schema_is_json_schema_of_the_configuration(capsys):
    assert cli.run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Config.model_json_schema()


def test_doctor_lists_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().out
    for row in backends.table():
        assert row.name in said
    assert f"Transformers {transformers.__version__} is tested" in said
    for family in FAMILIES:
        assert family in said


def test_doctor_counts_fusions_by_what_verified_them(monkeypatch):
    rows = [
        SimpleNamespace(name="experts", on=True, reason="", verified="table"),
        SimpleNamespace(name="router", on=True, reason="", verified="table"),
        SimpleNamespace(name="rope", on=True, reason="one class stays stock", verified="probe"),
        SimpleNamespace(name="add_norm", on=False, reason="runs code of its own", verified=""),
        SimpleNamespace(name="mamba2", on=False, reason="no module of the model needs it", verified=""),
    ]
    model = SimpleNamespace(fusion_report=lambda: rows)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config: model)
    assert fusions_of("mixtral") == {"table": ["experts", "router"], "probe": ["rope"], "off": ["add_norm"]}


def test_doctor_counts_the_fusions_of_a_real_model():
    found = fusions_of("nemotron_h")
    assert "mamba2" in found["table"] + found["probe"] and found["off"] == ["qk_norm_rope", "rope"]
    assert "mla_rope" not in sum(found.values(), []), "Nemotron has no latent attention"


def test_a_family_that_cannot_be_built_or_compared_is_a_verdict(monkeypatch, capsys):
    def breaks(*_, **__):
        raise AttributeError("'MixtralConfig' object has no attribute 'new_in_this_release'")

    monkeypatch.delenv("EXPERTMESH_DEBUG", raising=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", breaks)
    assert cli.run(["doctor"]) == 1
    assert "cannot be built" in capsys.readouterr().out
    monkeypatch.setattr("expertmesh.bench.parity.check_checkpoint", breaks)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert cli.run(["check", "mixtral"]) == 1
    said = capsys.readouterr()
    assert "new_in_this_release" in said.out and "5.99.0 is not tested" in said.out and "Traceback" not in said.err
    monkeypatch.setenv("EXPERTMESH_DEBUG", "1")
    assert cli.run(["check", "mixtral"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_doctor_says_whether_this_transformers_is_tested():
    assert whether_tested("5.24.1") == "Transformers 5.24.1 is tested, as are all from 5.23.0 to 5.24."
    assert "Transformers 5.25.0 is not tested[/], 5.23.0 to 5.24 are" in whether_tested("5.25.0")


def test_doctor_fails_where_a_required_version_is_wrong(monkeypatch, capsys):
    table = [row for row in backends.table() if row.name != "transformers"]
    old = backends.Backend("transformers", "4.57.0", "models", "nothing runs")
    monkeypatch.setattr(backends, "table", lambda: [*table, old])
    assert cli.run(["doctor"]) == 1
    assert "transformers 4.57.0 is not supported: install transformers>=5.23." in capsys.readouterr().out


def test_what_doctor_requires_is_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert REQUIRED["python"] == project["requires-python"]
    required = [dependency.split(",")[0] for dependency in project["dependencies"]]  # without the upper limits
    assert {f"{name}{REQUIRED[name]}" for name in ("torch", "transformers")} <= {*required}


def test_missing_and_unsupported_versions_are_told_apart():
    found = {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": None}
    assert wrong_versions(found) == {"transformers": "transformers is missing: install transformers>=5.23."}
    assert "2.4.0 is not supported" in wrong_versions(found | {"torch": "2.4.0"})["torch"]
    assert wrong_versions({"python": "3.13.0", "torch": "2.15.0.dev1", "transformers": "5.30.0"}) == {}


def test_sigterm_saves_a_checkpoint_and_exits_with_75(tmp_path):
    run = process("train", *tiny_run(tmp_path, train__max_steps=100000, log__logging_steps=1))
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 75, said
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "model.safetensors").exists() and (checkpoint / "optimizer").exists()
    assert "Traceback" not in said
    assert "To resume: expertmesh train" in said and "save.resume_from_checkpoint=auto" in said
