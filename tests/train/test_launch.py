"""Ranks live and die together. The ranks here are small scripts; tests/cli/test_train_ranks.py has real ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertmesh.timeouts import RanksError
from expertmesh.train import launch as launching
from expertmesh.train.config import load_config
from expertmesh.train.errors import ConfigError, signal_handler

LAUNCH = """
import sys
from pathlib import Path
from expertmesh.train.launch import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])))
"""
PREPARE = """
import os, signal, sys, time
from pathlib import Path
from expertmesh.train.launch import is_rank, record_error
assert is_rank()
rank = int(os.environ["RANK"])
folder = Path({folder!r})
def ready():
    (folder / f"pid-{{rank}}").write_text(str(os.getpid()))
"""


def start(script, nproc, folder):
    """The launcher of `nproc` ranks that run `script`."""
    command = [sys.executable, "-c", LAUNCH, PREPARE.format(folder=str(folder)) + script, str(nproc), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


def pids(folder: Path, nproc: int) -> list[int]:
    """The process ids of all ranks, once they are ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        written = [file.read_text() for file in folder.glob("pid-*")]
        if len(written) == nproc and all(written):
            return [int(text) for text in written]
        time.sleep(0.02)
    raise TimeoutError("the ranks did not start")


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(all_pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(gone, all_pids)):
        time.sleep(0.05)
    return all(map(gone, all_pids))


def test_every_rank_gets_its_place_and_rank_0_the_screen(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    ranks = start(f"print(*(os.environ[n] for n in '{names}'.split()))", 3, tmp_path)
    said, errors = ranks.communicate(timeout=60)
    assert ranks.returncode == 0, errors
    first = said.split()
    assert first[:5] == ["0", "0", "3", "3", "127.0.0.1"]
    for rank in (1, 2):
        assert (tmp_path / f"rank-{rank}.txt").read_text().split() == [str(rank), str(rank), *first[2:]]


def test_a_rank_that_fails_ends_the_others_and_is_heard_once(tmp_path):
    fail = """
ready()
while rank != 1 or not (folder / "go").exists():
    time.sleep(0.02)
record_error("Traceback: it was rank 1\\n")
os._exit(3)
"""
    ranks = start(fail, 3, tmp_path)
    all_pids = pids(tmp_path, 3)
    (tmp_path / "go").touch()
    said = "".join(ranks.communicate(timeout=20))
    assert ranks.returncode == 3
    assert said.count("it was rank 1") == 1
    assert wait_until_gone(all_pids)


def test_an_error_of_all_ranks_is_heard_once(tmp_path):
    ranks = start("record_error('expertmesh: error: wrong\\n'); os._exit(2)", 3, tmp_path)
    assert ranks.communicate(timeout=20)[1].count("expertmesh: error: wrong") == 1
    assert ranks.returncode == 2


def test_a_rank_that_is_killed_is_named_with_its_last_words(tmp_path):
    follow = "print('last words', flush=True); ready()\nif rank == 0: time.sleep(600)\ntime.sleep(600)"
    ranks = start(follow, 2, tmp_path)
    all_pids = pids(tmp_path, 2)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    errors = ranks.communicate(timeout=20)[1]
    assert ranks.returncode == 1
    assert "rank 1 was ended by SIGKILL" in errors and "last words" in errors
    assert wait_until_gone(all_pids)


def test_ranks_that_agree_to_stop_are_no_failure(tmp_path):
    ranks = start("time.sleep(rank); os._exit(75)", 2, tmp_path)  # a signal that came to a rank, not to the launcher
    assert ranks.communicate(timeout=20) == ("", "") and ranks.returncode == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_a_signal_reaches_all_ranks_and_their_answer_is_the_exit_code(tmp_path, number, code):
    answer = f"""
def stop(*_):
    (folder / f"saved-{{rank}}").touch()
    time.sleep(0.3 * rank)  # not all at the same moment
    os._exit({code})
signal.signal({int(number)}, stop)
ready()
time.sleep(600)
"""
    ranks = start(answer, 2, tmp_path)
    all_pids = pids(tmp_path, 2)
    ranks.send_signal(number)
    errors = ranks.communicate(timeout=20)[1]
    assert ranks.returncode == code, errors
    assert len(list(tmp_path.glob("saved-*"))) == 2 and wait_until_gone(all_pids)


def test_a_signal_before_training_is_told_by_its_usual_code(tmp_path):
    ranks = start("ready()\ntime.sleep(600)", 2, tmp_path)
    pids(tmp_path, 2)
    ranks.send_signal(signal.SIGTERM)
    assert ranks.communicate(timeout=20) == ("", "") and ranks.returncode == 128 + signal.SIGTERM


def test_ranks_do_not_outlive_their_launcher(tmp_path):
    ranks = start("ready()\ntime.sleep(600)", 2, tmp_path)
    all_pids = pids(tmp_path, 2)
    ranks.kill()
    assert wait_until_gone(all_pids)
    ranks.communicate(timeout=20)


def test_an_error_is_left_in_the_form_that_torchrun_reads(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.delenv(launching.ERROR_FILE, raising=False)
    assert not launching.record_error("nobody waits for it")
    monkeypatch.setenv(launching.ERROR_FILE, str(tmp_path / "error.json"))
    assert launching.record_error("it broke")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert "it broke" in json.dumps(failure.message) and abs(failure.timestamp - time.time()) < 60


def test_ranks_that_do_not_find_each_other_say_why_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as free:
        port_of_none = free.getsockname()[1]
        free.close()
        wrong = {
            "RANK": "1",
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(silent.getsockname()[1]),
        }
        for name, value in (wrong | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).items():
            monkeypatch.setenv(name, value)
        for rank, port, why in (
            ("1", None, "PyTorch's rank 0 does not answer"),
            ("0", None, "another run has that port"),
            ("0", port_of_none, "of 3 ranks 1, 2 did not connect"),
            ("0", "", "another process also has RANK=0"),
            ("3", "", "RANK=3 is none of WORLD_SIZE=3"),
        ):
            monkeypatch.setenv("RANK", rank)
            if port:
                monkeypatch.setenv("MASTER_PORT", str(port))
            begin = time.monotonic()
            with pytest.raises(RanksError, match=f"{why}.*raise parallel.start_timeout_minutes"):
                launching.join_ranks(0.02)
            assert time.monotonic() - begin < 10


def test_a_slurm_task_is_a_rank(monkeypatch):
    for name in "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split():
        monkeypatch.setenv(name, "")  # so that what is set here is taken back at the end
        monkeypatch.delenv(name)
    for tasks in ({}, {"SLURM_NTASKS": "4"}, {"SLURM_PROCID": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}):
        with monkeypatch.context() as patch:
            for name, value in tasks.items():
                patch.setenv(name, value)
            assert not launching.is_rank()
    task = {"PROCID": "3", "LOCALID": "1", "NTASKS": "4", "JOB_ID": "7", "JOB_NODELIST": "host"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launching.is_rank() and os.environ["RANK"] == "3" and os.environ["WORLD_SIZE"] == "4"


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    replaced = signal_handler(lambda *_: None)
    try:
        assert signal.SIGHUP not in replaced and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert {signal.SIGTERM, signal.SIGINT} <= set(replaced)
    finally:
        for number, handler in {**replaced, signal.SIGHUP: before}.items():
            signal.signal(number, handler)


def test_sizes_that_do_not_fit_the_ranks_are_an_error_of_the_configuration():
    config = load_config(None, ["parallel.ep_size=3"])
    with pytest.raises(ConfigError, match="parallel: ep_size=3 does not fit"):
        launching.layout(config, 4)
    assert launching.layout(config, 6).ep_size == 3
    assert launching.layout(load_config(None, ["parallel.timeout_minutes=7"]), 2).timeout_minutes == 7
    assert launching.layout(load_config(None), 1) is None
    assert launching.layout(load_config(None, ["parallel=auto"]), 4).ep_size == 1  # until it is chosen
