"""Files for Slurm and SkyPilot: valid, complete, and the sbatch file does on exit 75 what it says."""

import os
import subprocess

import pytest
import yaml

from expertmesh import cli

WRITE = ["--nodes", "2", "--gpus-per-node", "4"]


@pytest.fixture
def config(tmp_path):
    """A configuration whose path a shell would take apart."""
    path = tmp_path / "my run.yaml"
    path.write_text("model: {name: demo}\ndata: {name: 'demo:all'}\nparallel: {ep_size: 8}\n")
    return path


def test_the_sbatch_file_trains_on_every_gpu_of_every_node(config, tmp_path):
    out = tmp_path / "job.sbatch"
    assert cli.run(["launch", str(config), "--slurm", *WRITE, "--out", str(out)]) == 0
    assert subprocess.run(["bash", "-n", out], capture_output=True, text=True).stderr == ""
    lines = out.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert lines.index("#SBATCH --nodes=2") < next(i for i, line in enumerate(lines) if line[:1] not in "#")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_job_goes_back_into_the_queue_only_with_a_checkpoint(config, tmp_path, code, requeued):
    out, commands = tmp_path / "job.sbatch", tmp_path / "bin"
    assert cli.run(["launch", str(config), "--slurm", *WRITE, "--out", str(out)]) == 0
    commands.mkdir()
    for name, exits in (("srun", code), ("scontrol", 0)):
        (commands / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path / "called"}\nexit {exits}\n')
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    assert subprocess.run(["bash", out], env=environment).returncode == code
    called = (tmp_path / "called").read_text().splitlines()
    train = ["expertmesh", "train", str(config), "save.resume_from_checkpoint=auto"]
    assert called == ["srun", "--kill-on-bad-exit=1", *train, *["scontrol", "requeue", "4711"] * requeued]


def test_the_skypilot_task_is_yaml_and_its_command_is_shell(config, capsys):
    assert cli.run(["launch", str(config), "--skypilot", *WRITE, "--gpu", "H100"]) == 0
    task = yaml.safe_load(capsys.readouterr().out)
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "H100:4"}
    probe = f"torchrun() {{ printf '%s\\n' \"$@\"; }}\n{task['run']}"
    names = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "4", "NODE_RANK": "1", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = os.environ | {f"SKYPILOT_{name}": value for name, value in names.items()}
    said = subprocess.run(["bash", "-euc", probe], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        *("--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"),
        *("-m", "expertmesh", "train", str(config), "save.resume_from_checkpoint=auto"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--slurm or --skypilot"),
        (["--slurm", "--skypilot"], "--slurm or --skypilot"),
        (["--slurm", "--nodes", "3", "--gpus-per-node", "2"], "parallel: ep_size=8 does not fit"),
    ],
)
def test_what_cannot_run_is_not_written(config, capsys, arguments, said):
    assert cli.run(["launch", str(config), *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
