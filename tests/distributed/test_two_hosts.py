"""Two network namespaces, which have nothing but a cable between them, train one group of experts like one host."""

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from expertmesh.train.metrics import read_metrics
from tests.train.runs import tiny_run

HOSTS = ("10.203.7.1", "10.203.7.2")
LINKS = ("cable0", "cable1")  # a different name on each side: GLOO_SOCKET_IFNAME is each host's own


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two namespaces with a cable between them; a skip where that is not allowed."""
    if sys.platform != "linux" or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux and the command `ip` (iproute2)")
    unique = uuid.uuid4().hex[:8]
    names = [f"expertmesh-{unique}-{i}" for i in range(2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            first, second = (["netns", name] for name in names)
            ip("link", "add", LINKS[0], *first, "type", "veth", "peer", "name", LINKS[1], *second)
            for name, link, address in zip(names, LINKS, HOSTS, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield names


def torchrun(arguments: list[str], training: list[str], host: str | None = None, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "expertmesh", "train", *training]
    within = ["ip", "netns", "exec", host] if host else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    return subprocess.Popen(
        within + command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_two_hosts_train_what_one_host_trains(hosts, tmp_path):
    settings = {"log__logging_steps": 1, "data__eval_fraction": 0, "parallel__ep_size": 2}
    running = [
        torchrun(
            ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS[0]}:29500"]
            # both have this machine's name, by which torchrun would find out who is the host of the rendezvous
            + [f"--rdzv-id={hosts[0]}", f"--local-addr={address}", f"--rdzv-conf=is_host={int(address == HOSTS[0])}"],
            tiny_run(tmp_path / "two", **settings),
            host,
            GLOO_SOCKET_IFNAME=link,
        )
        for host, link, address in zip(hosts, LINKS, HOSTS, strict=True)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert "Done: the model is in" in "".join(said)

    alone = torchrun(["--standalone", "--nproc-per-node=2"], tiny_run(tmp_path / "one", **settings))
    said_alone = alone.communicate(timeout=240)[0]
    assert alone.returncode == 0, said_alone
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
