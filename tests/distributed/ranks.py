"""Run a function on several ranks of this machine and collect what each returns."""

import contextlib
import faulthandler
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expertmesh.bench.layouts import become_rank

# the server that forks the ranks imports these once, with all that they import: a rank alone takes seconds for them
_PRELOADED = ["tests.distributed.work", "expertmesh.train.sft", "peft", "pytest"]


def on_ranks(num_ranks: int, function: Callable, *args: Any, seconds: float = 240, gpus: bool = False) -> list[Any]:
    """[function(rank, *args) for every rank], run at the same time. `function` must be importable by name.

    Ranks see no GPU, or with `gpus` all. An exception on any rank ends all and is raised here with its traceback; so
    does silence for `seconds`.
    """
    # the store lives here, not on rank 0: its port is taken before anybody else can take it
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        with _environment(gpus):
            mp.get_context("forkserver").set_forkserver_preload(_PRELOADED)
            ranks = mp.start_processes(
                _rank,
                (num_ranks, store.port, folder, seconds, function, args),
                num_ranks,
                join=False,
                start_method="spawn" if gpus else "forkserver",
            )
        deadline = time.monotonic() + seconds
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {num_ranks} ranks did not end in {seconds} s: a deadlock?")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(num_ranks)]


def on_the_same_ranks(num_ranks: int, function: Callable, several: list[tuple], **options: Any) -> list[list[Any]]:
    """[on_ranks(num_ranks, function, *args) for args in several], on ranks that are started once, which takes long."""
    return [list(results) for results in zip(*on_ranks(num_ranks, _each, function, several, **options), strict=True)]


def _each(rank: int, function: Callable, several: list[tuple]) -> list[Any]:
    return [function(rank, *args) for args in several]


@contextlib.contextmanager
def _environment(gpus: bool) -> Iterator[None]:
    """What the ranks inherit: where pytest's settings find modules, and whether there are GPUs."""
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _rank(rank: int, num_ranks: int, port: int, folder: str, seconds: float, function: Callable, args: tuple) -> None:
    faulthandler.enable()  # a crash shows where, and a deadlock
    faulthandler.dump_traceback_later(seconds - 5)
    become_rank(rank, num_ranks, port)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # every torch.empty is filled with NaN: an element that nobody writes shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        result = function(rank, *args)
        Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
