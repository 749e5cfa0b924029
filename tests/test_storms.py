"""Storms: many random damages and starts. Slow; `STORM_SEED` draws others. Kills are in checkpoint/test_chaos.py and
weights/test_files.py.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import expertmesh
from expertmesh import backends
from expertmesh.train.metrics import read_metrics
from tests.cli.test_verbs import process
from tests.models import SEED, load_ours
from tests.train.runs import tiny_run

pytestmark = pytest.mark.slow


def damage(folder: Path, draw: random.Random) -> str:
    """Do to one file of an export what disks, people and broken copies do; returns what."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    file, other = draw.choice(files), draw.choice(files)
    content = file.read_bytes()
    kind = draw.choice(["flip", "flip", "flip", "cut", "lengthen", "remove", "empty", "mix", "value"])
    at = draw.randrange(len(content))
    if kind == "flip":
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
    elif kind == "cut":
        file.write_bytes(content[:at])
    elif kind == "lengthen":
        file.write_bytes(content + b"x" * draw.randrange(1, 100))
    elif kind == "remove":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "mix":
        other.write_bytes(content)
    else:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        key = draw.choice(sorted(name for name, value in config.items() if isinstance(value, (int, float))))
        file.write_text(json.dumps(config | {key: config[key] + 1}))
    return f"{kind} {file.name} at {at} of {len(content)}"


def test_a_hundred_damaged_exports_are_refused_or_load_what_was_saved(tmp_path, caplog, monkeypatch):
    """A configuration that still can be read loads as well, and is named: people edit it."""
    draw, kinds = random.Random(SEED), {"refused": 0, "unharmed": 0}
    monkeypatch.setattr(backends.logger(), "propagate", True)
    model = load_ours("qwen3_moe")
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    want, config = model.state_dict(), json.loads((tmp_path / "whole" / "config.json").read_text())
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        what = damage(folder, draw)
        caplog.clear()
        try:
            found = expertmesh.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
            assert str(error), what
            kinds["refused"] += 1
        else:
            got = found.state_dict()
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want), what
            found.config.save_pretrained(tmp_path / "config")
            same = json.loads((tmp_path / "config" / "config.json").read_text()) == config
            assert same or "config.json in" in caplog.text, what
            kinds["unharmed"] += 1
        shutil.rmtree(folder)
    assert kinds["refused"] > 50, kinds


def test_of_runs_that_start_in_one_folder_one_trains_and_the_others_say_why(tmp_path):
    """Four times five starts; whoever comes when another is done goes on or says that there is a run already."""
    for number in range(4):
        folder = tmp_path / str(number)
        settings = tiny_run(folder, log__logging_steps=1, train__max_steps=20, save__save_steps=5)
        runs = [process("train", *settings) for _ in range(5)]
        said = ["".join(run.communicate(timeout=600)) for run in runs]
        codes = [run.returncode for run in runs]
        assert codes.count(0) >= 1 and set(codes) <= {0, 1}, list(zip(codes, said, strict=True))
        for code, text in zip(codes, said, strict=True):
            assert "Traceback" not in text, text
            assert code == 0 or text.count("expertmesh: error:") == 1, text
        losses = [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        assert losses == list(range(1, 21))
        expertmesh.AutoModelForCausalLM.from_pretrained(folder / "final")
