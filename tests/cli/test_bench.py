"""`expertmesh bench`: what it prints and writes, and what it refuses."""

import contextlib
import io
import json

import pytest

from expertmesh import cli

TINY = ["bench", "--tiny", "--device", "cpu", "--seq", "32", "--warmup", "1", "--repeats", "1"]


def test_a_run_prints_a_table_and_writes_json_and_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "tiny.json"
    arguments = ["--arms", "stock,expertmesh,expertmesh-no-router", "--batch", "1,2", "--profile", "--out", str(out)]
    assert cli.run([*TINY, *arguments]) == 0
    said = capsys.readouterr().out
    assert "qwen3-30b-a3b, 3 layers, 2 x 32 tokens, random-init routing" in said and "worth" in said
    result = json.loads(out.read_text())
    assert {"hardware", "gpus", "torch", "triton", "transformers", "commit", "command", "rows"} <= set(result)
    assert [row["arm"] for row in result["rows"]] == ["stock"] * 2 + ["expertmesh"] * 2 + ["expertmesh-no-router"] * 2
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"tiny-qwen3-30b-a3b-random-init-{kind}.png" for kind in ("times", "tokens", "components")
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--work", "qwen3-30b"], "did you mean 'qwen3-30b-a3b'?"),
        (["--arms", "stock,expertmsh"], "did you mean 'expertmesh'?"),
        (["--arms", "expertmesh-no-routers"], "did you mean 'expertmesh-no-router'?"),
        (["--routing", "zipf,balanced"], "--routing: there is no 'zipf'"),
        (["--routing", "balanced", "--batch", "1", "--seq", "33"], "change --batch or --seq"),
        (["--batch", "1,many"], "--batch takes numbers"),
        (["--packed"], "--seq 32 is not divisible"),
        (["--arms", "stock-liger"], "run on GPUs only"),
        (["--arms", "stock-flash-attn-4"], "flash-attn-4 is not installed, or this is no Hopper GPU"),
        (["--arms", "expertmesh-no-qk_norm_rope", "--work", "gpt-oss-20b"], "is off for gpt_oss anyway"),
        (["--device", "gpu"], "--device is cpu or cuda"),
        (["--loop", "sft-pack"], "did you mean 'sft-packed'?"),
        (["--loop", "trainer", "--packed", "--seq", "64"], "--loop sft-packed has packed rows"),
        (["--loop", "trainer", "--step"], "Leave --step out with --loop"),
        (["--loop", "trainer", "--profile"], "Leave --profile out with --loop"),
        (["--loop", "trainer", "--routing", "skewed"], "Leave --routing out with --loop"),
        (["--loop", "trainer", "--seq", "8"], "--seq 16 at least"),
        (["--arms", "stock,expertmesh-trainer"], "add --loop"),
    ],
)
def test_what_makes_no_sense_exits_with_2_and_names_the_fix(arguments, named):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.run([*TINY, *arguments]) == 2
    assert named in said.getvalue() and "Traceback" not in said.getvalue()


def test_a_loop_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "loop.json"
    arguments = ["--loop", "trainer-padded", "--arms", "stock,expertmesh-trainer", "--batch", "2", "--out", str(out)]
    assert cli.run([*TINY, *arguments]) == 0
    said = capsys.readouterr().out
    assert "trainer-padded: qwen3-30b-a3b, 3 layers, 2 x 32 tokens" in said and "x stock" in said
    assert [row["arm"] for row in json.loads(out.read_text())["rows"]] == ["stock", "expertmesh-trainer"]
    assert [path.name for path in tmp_path.iterdir()] == ["loop.json"]


def test_a_loop_says_which_package_it_lacks(monkeypatch):
    from expertmesh import backends

    monkeypatch.setattr(backends, "version_of", {"trl": "1.16.0", "datasets": "5.2.0"}.get)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.run([*TINY, "--loop", "dpo"]) == 2
    assert "--loop dpo needs peft: `pip install 'peft>=0.19'`" in said.getvalue()


def test_several_ranks_run_some_loops_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments, named in (
        ([], "add --loop trainer"),
        (["--loop", "trainer", "--ablate"], "Leave --ablate out"),
        (["--loop", "sft"], "On 2 ranks take --loop trainer"),
        (["--loop", "trainer", "--arms", "stock-compiled"], "there are stock, expertmesh, expertmesh-trainer"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert cli.run([*TINY, *arguments]) == 2
        assert named in said.getvalue()


def test_big_models_are_refused_on_the_cpu():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.run(["bench", "--device", "cpu"]) == 2
    assert "add --tiny" in said.getvalue()
