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
        (["--work", "qwen3-30b"], "Did you mean 'qwen3-30b-a3b'?"),
        (["--arms", "stock,expertmsh"], "Did you mean 'expertmesh'?"),
        (["--arms", "expertmesh-no-routers"], "Did you mean 'expertmesh-no-router'?"),
        (["--routing", "zipf,balanced"], "There is no routing 'zipf'"),
        (["--routing", "balanced", "--batch", "1", "--seq", "33"], "change --batch or --seq"),
        (["--batch", "1,many"], "--batch takes numbers"),
        (["--packed"], "--seq 32 is not divisible"),
        (["--arms", "stock-liger"], "run on GPUs only"),
        (["--arms", "stock-flash-attn-4"], "flash-attn-4 is not installed, or this is no Hopper GPU"),
        (["--arms", "expertmesh-no-qk_norm_rope", "--work", "gpt-oss-20b"], "is off for gpt_oss anyway"),
        (["--device", "gpu"], "--device is cpu or cuda"),
    ],
)
def test_what_makes_no_sense_exits_with_2_and_names_the_fix(arguments, named):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.run([*TINY, *arguments]) == 2
    assert named in said.getvalue() and "Traceback" not in said.getvalue()


def test_big_models_are_refused_on_the_cpu():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.run(["bench", "--device", "cpu"]) == 2
    assert "add --tiny" in said.getvalue()
