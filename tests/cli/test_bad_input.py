"""What is wrong with the input is said in one paragraph that names the fix, and the exit code is not 0.

What is found before the model is loaded is in test_before_loading.py.
"""

import contextlib
import io
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from expertmesh import cli
from tests.train.runs import checkpoint, tiny_run


def stderr_of(arguments):
    """(exit code, stderr) of one command line.

    Not by capsys: loggers keep the stderr they first see, and must not find it closed in the next test.
    """
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.run(arguments)
    return code, said.getvalue()


@pytest.fixture
def complain(tmp_path, monkeypatch):
    """Runs `expertmesh train` with a tiny configuration and returns (exit code, the paragraph)."""
    monkeypatch.delenv("EXPERTMESH_DEBUG", raising=False)

    def run(**changes):
        code, said = stderr_of(["train", *tiny_run(tmp_path / "run", **changes)])
        assert "Traceback" not in said, said
        paragraphs = [line for line in said.splitlines() if line.startswith("expertmesh: error: ")]
        assert len(paragraphs) == 1, said
        return code, paragraphs[0]

    return run


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_unknown_key(complain):
    code, said = complain(train__learning_rat=1)
    assert code == 2 and "did you mean `train.learning_rate`?" in said


def test_two_configuration_files():
    code, said = stderr_of(["train", "a.yaml", "b.yaml"])
    assert code == 2 and "Only one configuration file is expected" in said


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", b"{broken"), ("rows.parquet", b"PAR1"), ("rows.jsonl", b"")]
)
def test_an_unreadable_data_file(complain, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    code, said = complain(data__name=tmp_path / name)
    assert code == 2 and str(tmp_path / name) in said


def test_a_data_file_that_is_not_there(complain, tmp_path):
    code, said = complain(data__name=tmp_path / "absent.jsonl")
    assert code == 2 and "does not exist" in said


@pytest.mark.parametrize("packing", ["true", "false"])
def test_data_in_which_every_label_is_masked(complain, tmp_path, packing):
    talk = [{"messages": [{"role": "user", "content": "Nobody answers."}]} for _ in range(20)]
    code, said = complain(
        data__name=write(tmp_path / "rows.jsonl", talk),
        data__assistant_only_loss="true",
        data__packing=packing,
        data__eval_fraction=0,
    )
    assert code != 0 and "assistant" in said


@pytest.mark.parametrize("packing", ["true", "false"])
def test_answers_that_are_cut_off(complain, tmp_path, packing):
    cut = [{"prompt": "word " * 50, "completion": "late"}] * 20
    code, said = complain(
        data__name=write(tmp_path / "rows.jsonl", cut),
        data__assistant_only_loss="false",
        data__max_length=16,
        data__packing=packing,
        data__eval_fraction=0,
    )
    assert code != 0 and "masked" in said and ("data.max_length" in said or "maximum length" in said)


@pytest.mark.parametrize(
    "lost",
    [
        "mlp.experts",
        "layers.2.mlp.experts.3",
        "mlp.gate.weight",
        "1.self_attn.q_proj",
        "lm_head",
        "embed",
        "model.norm",
    ],
)
def test_a_checkpoint_with_missing_weights(complain, tmp_path, lost):
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    left = {name: weight for name, weight in weights.items() if lost not in name}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    code, said = complain(model__name=folder)
    assert code == 1 and "lacks weights" in said and lost.partition("s.")[0] in said and str(folder) in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_checkpoint_file(complain, tmp_path, name):
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    (folder / name).write_bytes(b"\x00 this is not what it should be")
    code, said = complain(model__name=folder)
    assert code != 0 and str(folder) in said


def test_a_folder_without_a_model(complain, tmp_path):
    (tmp_path / "empty").mkdir()
    code, said = complain(model__name=tmp_path / "empty")
    assert code == 2 and "model.name" in said and str(tmp_path / "empty") in said


def test_a_model_id_that_is_not_in_the_cache_offline(complain, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = complain(model__name="nobody/no-such-model")
    assert code == 2 and "nobody/no-such-model" in said
    assert "HF_HUB_OFFLINE" in said and "hf download nobody/no-such-model" in said


def test_frozen_routers_of_a_model_without_routers(complain, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(
        checkpoint(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(folder)
    code, said = complain(model__name=folder, moe__freeze_router="true")
    assert code == 2 and "moe.freeze_router" in said
    code, said = complain(model__name=folder, moe__router_aux_loss_coef=0.1)
    assert code == 2 and "router_aux_loss_coef" in said


def test_a_run_that_diverges(complain):
    code, said = complain(train__learning_rate=1e30, train__lr_scheduler_type="constant", train__warmup_steps=0)
    assert code == 1 and "was stopped before the optimizer ran" in said and "lower the learning rate" in said


def test_debug_shows_the_traceback_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_DEBUG", "1")
    code, said = stderr_of(["train", *tiny_run(tmp_path, model__name="nobody/no-such-model")])
    assert code == 2 and "Traceback" in said and "expertmesh: error: model.name" in said


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("expertmesh.train.config.load_config", lambda *_: {}["key"])
    code, said = stderr_of(["train"])
    assert code == 1 and "KeyError" in said
