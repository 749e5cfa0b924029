"""Run a function on several gloo ranks of this machine and collect what each returns."""

import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# the server that forks the ranks imports these once; every rank starts with them loaded
_PRELOADED = ["torch", "transformers", "transformers.models.auto.modeling_auto", "expertmesh.auto"]


def on_ranks(num_ranks: int, function: Callable, *args: Any, seconds: float = 240) -> list[Any]:
    """[function(rank, *args) for every rank], run at the same time. `function` must be importable by name.

    An exception on any rank ends all and is raised here with its traceback; so does silence for `seconds`.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server finds what pytest's settings add
    mp.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ranks = mp.start_processes(
            _rank, (num_ranks, port, folder, function, args), num_ranks, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + seconds
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {num_ranks} ranks did not end in {seconds} s: a deadlock?")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )
    torch.set_num_threads(1)
    # every torch.empty is filled with NaN: an element that nobody writes shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        result = function(rank, *args)
        Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
