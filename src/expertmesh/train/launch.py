"""Start, monitor and stop the ranks of a run on this machine.

A process that torchrun or Slurm started is a rank already. Otherwise `launch` starts one process per GPU and waits. If
a rank fails, the others are killed at once and the error is printed once: every rank writes its error to a file
(TORCHELASTIC_ERROR_FILE, as under torchrun), and the launcher prints the first. The launcher forwards signals to all
ranks, which then save a checkpoint (callbacks.py). If the launcher dies, the ranks' stdin closes and they exit.
"""

import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any

from expertmesh.train.errors import (
    EXIT_CODES,
    ConfigError,
    as_config_error,
    first_numbers,
    short_message,
    signal_handler,
)

if TYPE_CHECKING:
    from expertmesh.parallel.setup import DistributedSetup
    from expertmesh.train.config import Config

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_WATCH = "EXPERTMESH_LAUNCHER"  # set in ranks that must exit when their stdin is closed
_POLL = 0.1  # seconds between two checks of the ranks
_stores: list[Any] = []  # keeps the store alive until the process ends: rank 0's is the server of all ranks
_SHOWN = 20  # last lines of output that are printed for a rank that ended without an error file


def is_rank() -> bool:
    """Whether torchrun, Slurm or `launch` started this process as a rank. Set torchrun's variables from Slurm's."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_variables(os.environ))
    if os.environ.get(_WATCH):
        threading.Thread(target=_follow_launcher, daemon=True).start()
    return "RANK" in os.environ


def slurm_variables(task: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a Slurm task. The last two keep set values.

    Raises ConfigError if Slurm's variables are incomplete.
    """
    with as_config_error("This looks like a Slurm task without all of srun's variables (else unset SLURM_PROCID)"):
        job, hosts = int(task["SLURM_JOB_ID"]), task["SLURM_JOB_NODELIST"]
        # rank 0 runs on the first host of `node[08-09,12],login`; SLURM_LAUNCH_NODE_IPADDR is the host that ran srun
        first_host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).partition(",")[0]
        return {
            "RANK": task["SLURM_PROCID"],
            "LOCAL_RANK": task["SLURM_LOCALID"],
            "WORLD_SIZE": task["SLURM_NTASKS"],
            "MASTER_ADDR": task.get("MASTER_ADDR") or first_host,
            # below Linux's ephemeral ports (from 32768), and different for each job on a shared host
            "MASTER_PORT": task.get("MASTER_PORT") or str(10_000 + job % 20_000),
        }


def layout(config: "Config", num_ranks: int) -> "DistributedSetup | None":
    """Return the DistributedSetup of `config` for `num_ranks`, None for one rank. Raise ConfigError for bad sizes."""
    from expertmesh.parallel.setup import DistributedSetup

    if config.train.optim_offload and num_ranks > 1:
        raise ConfigError("train.optim_offload: it works on one GPU only: set parallel.nproc to 1, or remove it.")
    sizes = config.parallel.model_dump(exclude={"nproc", "start_timeout_minutes"})
    sizes |= {"ep_size": 1} if sizes["ep_size"] == "auto" else {}  # the value is chosen when the run starts
    with as_config_error("parallel"):
        setup = DistributedSetup(**sizes, world_size=num_ranks)
    return setup if num_ranks > 1 else None


def join_ranks(minutes: float) -> None:
    """Wait until all ranks of the run have connected. Raise RanksError, with the cause or the missing ranks, if not."""
    import torch.distributed as dist

    from expertmesh.timeouts import RanksError

    if dist.is_initialized():
        return
    rank, size, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(minutes=minutes)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    errors = ["PyTorch's rank 0 does not answer"]  # the last entry counts: the error, or "" after success

    def meet() -> str:  # connects to the store of rank 0 and waits for all ranks; returns an error message, or ""
        if not 0 <= rank < size:
            return f"RANK={rank} is none of WORLD_SIZE={size}"
        is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:  # PyTorch connects its own store to the same server later
            store = dist.TCPStore(address, int(port), size, is_server, limit, wait_for_workers=False, multi_tenant=True)
        except Exception as error:
            taken = "another run has that port, or another process RANK=0"
            return taken if "EADDRINUSE" in str(error) else f"{errors[0]} ({short_message(error)})"
        _stores.append(store)
        registry = dist.PrefixStore(f"expertmesh/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if registry.add(str(rank), 1) > 1:
            return f"another process also has RANK={rank}"
        with suppress(dist.DistStoreError):
            registry.wait([str(number) for number in range(size)], limit * 0.8)
            return ""
        return (
            f"of {size} ranks {first_numbers([r for r in range(size) if not registry.check([str(r)])])} did not connect"
        )

    # in a thread, because PyTorch waits forever for a process that holds the port and never answers
    thread = threading.Thread(target=lambda: errors.append(meet()), daemon=True)
    thread.start()
    thread.join(limit.total_seconds())
    if why := errors[-1]:
        raise RanksError(
            f"Rank {rank} found no others at MASTER_ADDR={address} and MASTER_PORT={port}: {why}. These must name the "
            f"machine of rank 0 and a free port of it, and there must be one process for each RANK from 0 to "
            f"{size - 1}. If ranks only need longer than {minutes:g} minutes to start, raise "
            "parallel.start_timeout_minutes."
        )


def launch(command: Sequence[str], nproc: int, logs: Path) -> int:
    """Run `command` as `nproc` ranks on this machine and return the exit code of the run.

    Rank 0 inherits this process's output; the others write to `logs`/rank-<r>.txt. Returns 0 if all ranks succeeded, 75
    or 130 if they stopped after a signal, else the code of the rank that failed first, whose error is printed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // nproc)
    common = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": threads, _WATCH: os.getpid()}
    ranks, received = list[Popen](), list[int]()

    def forward(number: int, _: object) -> None:
        received.append(number)
        for rank in ranks:
            rank.send_signal(number)

    with ExitStack() as stack:  # its exit closes the stdin of every rank and waits until the rank has ended
        errors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-")))
        for number, handler in signal_handler(forward).items():
            stack.callback(signal.signal, number, handler)
        for number in range(nproc):
            log = None if number == 0 else stack.enter_context((logs / f"rank-{number}.txt").open("w"))
            per_rank = {"RANK": number, "LOCAL_RANK": number, ERROR_FILE: errors / f"{number}.json"}
            env = os.environ | {name: str(value) for name, value in (common | per_rank).items()}
            # in a new session: Ctrl-C reaches only the launcher, which forwards it, so that ranks do not get it twice
            process = Popen(command, env=env, stdin=PIPE, stdout=log, stderr=log, start_new_session=True)
            ranks.append(stack.enter_context(process))
        while not (failed := [n for n, rank in enumerate(ranks) if rank.poll()]):
            if all(rank.returncode == 0 for rank in ranks):
                return 0
            time.sleep(_POLL)
        if ranks[failed[0]].returncode in EXIT_CODES.values():
            return max(rank.wait() for rank in ranks)  # all stop after the same step, even if only one got the signal
        time.sleep(_POLL)  # let ranks with the same error finish writing it
        codes = {number: code for number, rank in enumerate(ranks) if (code := rank.poll())}
        for rank in ranks:
            rank.kill()
        return _report(codes, errors, logs, received)


def _report(codes: Mapping[int, int], errors: Path, logs: Path, received: Sequence[int]) -> int:
    """Print the error of the rank that failed first, and return its exit code. codes: {failed rank: exit code}."""
    by_time = (int(file.stem) for file in sorted(errors.iterdir(), key=lambda file: file.stat().st_mtime))
    # if a rank is killed, the others fail because of it: it comes first, although it leaves no error file
    killed = (rank for rank, code in codes.items() if code < 0)
    first = next(rank for rank in (*killed, *by_time, *codes) if rank in codes)
    code, file, log = codes[first], errors / f"{first}.json", logs / f"rank-{first}.txt"
    if -code in received:
        return 128 - code  # the signal came before the first step, or came twice: there is no checkpoint
    if file.exists():
        print(json.loads(file.read_text())["message"]["message"], file=sys.stderr)
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGABRT:
            how += f" (NCCL aborts a rank that waited too long for another: see its last lines and those in {logs})"
        print("\n".join(log.read_text().splitlines()[-_SHOWN:] if first else []), file=sys.stderr)
        print(f"expertmesh: error: rank {first} {how}; the other ranks were stopped.", file=sys.stderr)
    return code if code > 0 else 1


def record_error(text: str) -> bool:
    """Write `text` to this rank's error file, so that the launcher prints it once. Return False without a launcher."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    # torchrun prints py_callstack; for an error that a user can fix, the paragraph is more useful there
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    return True


def leave_ranks() -> int:
    """Wait for the other ranks, destroy the process group, and return this process's rank: 0 without a group."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers stop all ranks when the first one ends
    dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def _follow_launcher() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the launcher has closed its end of the pipe
    os.kill(os.getpid(), signal.SIGKILL)
