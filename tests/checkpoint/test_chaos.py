"""Killed at any moment, a run goes on from its newest checkpoint as if nothing had happened, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from expertmesh.checkpoint.publish import checkpoints, newest_complete, verify
from tests.checkpoint.loop import finish, loop, source, start
from tests.checkpoint.test_state import same
from tests.models import SEED

LAYOUTS = {1: None, 2: {"fsdp_size": 2, "ep_size": 2}}


def kill(process, output, during_save: bool, draw: random.Random) -> None:
    """SIGKILL to all its processes: inside a save that is seen to run, or after a random part of a few steps."""
    deadline = time.monotonic() + 300
    first = len(checkpoints(output))

    def wait_for(what):
        while not what():
            assert process.poll() is None, f"it ended by itself: {process.communicate()[1][-3000:]}"
            assert time.monotonic() < deadline, f"nothing was saved in time; there is {os.listdir(output)}"
            time.sleep(0.0005)  # polling must not take the core that the loop needs

    try:
        assert process.stdout.readline() == "ready\n"
        if during_save:
            wait_for(lambda: list(output.glob(".checkpoint-*.incomplete")))
        time.sleep(draw.random() * (0.01 if during_save else 0.3))
        wait_for(lambda: first or checkpoints(output))  # the first life must leave something to go on from
    finally:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # each in its own session
        for pid in [process.pid, *map(int, ranks)]:
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def survive(tmp_path, ranks: int, background: bool, kills: int, steps: int) -> None:
    draw, output = random.Random(SEED), tmp_path / "run"
    options = {"source": str(source(tmp_path, "qwen3_moe")), "layout": LAYOUTS[ranks], "steps": steps}
    whole, last = str(tmp_path / "whole.pt"), str(tmp_path / "last.pt")
    finish(start(ranks, **options, dump=whole)) if ranks > 1 else loop(**options, dump=whole)
    options |= {"output": str(output), "save_every": 1, "resume": "newest", "background": background}
    for number in range(kills):
        kill(start(ranks, **options), output, number % 2 == 0, draw)
        verify(newest_complete(output))
    reached = int(newest_complete(output).name.removeprefix("checkpoint-"))
    assert reached < steps, "it was never killed"
    finish(start(ranks, **options, dump=last))
    assert not list(output.glob(".checkpoint-*"))
    assert same(torch.load(whole), torch.load(last))


def test_a_kill(tmp_path):
    survive(tmp_path, ranks=1, background=False, kills=1, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(ranks, background, tmp_path):
    survive(tmp_path, ranks, background, kills=20, steps=500 if ranks == 1 else 150)
