"""The ranks of a run on this machine: started, watched, and stopped together.

A process that torchrun or Slurm started is a rank already. Otherwise `launch` starts one process for each GPU and
waits. A rank that fails ends the others at once, and what went wrong is shown once: every rank writes its error into a
file (TORCHELASTIC_ERROR_FILE, as under torchrun), of which the first is printed. Signals go to all ranks; they answer
with a checkpoint (callbacks.py). Should this process die, the ranks see the end of their standard input and follow.
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
_WATCH = "EXPERTMESH_LAUNCHER"  # set in ranks whose standard input says whether the launcher lives
_POLL = 0.1  # seconds between two looks at the ranks
_stores: list[Any] = []  # rank 0's is the server of all ranks: keep it until the process ends
_SHOWN = 20  # last lines of a rank that ended without an error of its own


def is_rank() -> bool:
    """Whether torchrun, Slurm or `launch` started this process as a rank; Slurm's variables are translated."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_variables(os.environ))
    if os.environ.get(_WATCH):
        threading.Thread(target=_follow_launcher, daemon=True).start()
    return "RANK" in os.environ


def slurm_variables(task: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a Slurm task, the last two unless they are set.

    Raises ConfigError if Slurm's variables are incomplete.
    """
    with as_config_error(
        "This looks like a task of Slurm without all variables of srun (outside Slurm unset SLURM_PROCID)"
    ):
        job, hosts = int(task["SLURM_JOB_ID"]), task["SLURM_JOB_NODELIST"]
        # rank 0 runs on the first of `node[08-09,12],login`; SLURM_LAUNCH_NODE_IPADDR is where srun was typed
        first_host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).partition(",")[0]
        return {
            "RANK": task["SLURM_PROCID"],
            "LOCAL_RANK": task["SLURM_LOCALID"],
            "WORLD_SIZE": task["SLURM_NTASKS"],
            "MASTER_ADDR": task.get("MASTER_ADDR") or first_host,
            # below the ports that Linux hands out by itself (from 32768), and another one for each job on a shared host
            "MASTER_PORT": task.get("MASTER_PORT") or str(10_000 + job % 20_000),
        }


def layout(config: "Config", num_ranks: int) -> "DistributedSetup | None":
    """How `config` lays the model out over `num_ranks`, None for one. Raises ConfigError if its sizes do not fit."""
    from expertmesh.parallel.setup import DistributedSetup

    if config.train.optim_offload and num_ranks > 1:
        raise ConfigError("train.optim_offload: it is for a GPU that is alone: set parallel.nproc to 1, or remove it.")
    sizes = config.parallel.model_dump(exclude={"nproc", "start_timeout_minutes"})
    sizes |= {"ep_size": 1} if sizes["ep_size"] == "auto" else {}  # one that fits is chosen when the run starts
    with as_config_error("parallel"):
        setup = DistributedSetup(**sizes, world_size=num_ranks)
    return setup if num_ranks > 1 else None


def join_ranks(minutes: float) -> None:
    """Wait until all ranks of the run have come. Raises RanksError, which says what is wrong or who has not."""
    import torch.distributed as dist

    from expertmesh.timeouts import RanksError

    if dist.is_initialized():
        return
    rank, size, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(minutes=minutes)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    found = ["PyTorch's rank 0 does not answer"]  # at last what is wrong, "" if nothing is

    def meet() -> str:
        if not 0 <= rank < size:
            return f"RANK={rank} is none of WORLD_SIZE={size}"
        is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:  # PyTorch connects its own store to the same server later
            store = dist.TCPStore(address, int(port), size, is_server, limit, wait_for_workers=False, multi_tenant=True)
        except Exception as error:
            taken = "another run has that port, or another process RANK=0"
            return taken if "EADDRINUSE" in str(error) else f"{found[0]} ({short_message(error)})"
        _stores.append(store)
        book = dist.PrefixStore(f"expertmesh/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if book.add(str(rank), 1) > 1:
            return f"another process has RANK={rank}, too"
        with suppress(dist.DistStoreError):
            book.wait([str(number) for number in range(size)], limit * 0.8)
            return ""
        return f"of {size} ranks {first_numbers([r for r in range(size) if not book.check([str(r)])])} did not come"

    # a thread, as a port that is held by somebody who never answers would keep PyTorch waiting without end
    thread = threading.Thread(target=lambda: found.append(meet()), daemon=True)
    thread.start()
    thread.join(limit.total_seconds())
    if why := found[-1]:
        raise RanksError(
            f"Rank {rank} found no others by MASTER_ADDR={address} and MASTER_PORT={port}: {why}. These must name the "
            f"machine of rank 0 and a free port of it, and there must be one process for each RANK from 0 to "
            f"{size - 1}. If ranks only need longer than {minutes:g} minutes to start, raise "
            "parallel.start_timeout_minutes."
        )


def launch(command: Sequence[str], nproc: int, logs: Path) -> int:
    """Run `command` as `nproc` ranks of this machine, and return the exit code of the run.

    Rank 0 has this process's output; that of the others goes to `logs`/rank-<r>.txt. Returns 0 if all ranks did, 75 or
    130 if all stopped after a signal, else the code of the rank that failed first, whose error is printed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // nproc)
    alike = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alike |= {"OMP_NUM_THREADS": threads, _WATCH: os.getpid()}
    ranks, received = list[Popen](), list[int]()

    def forward(number: int, _: object) -> None:
        received.append(number)
        for rank in ranks:
            rank.send_signal(number)

    with ExitStack() as stack:  # behind it every rank has ended: its standard input is closed, and it is waited for
        errors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-")))
        for number, handler in signal_handler(forward).items():
            stack.callback(signal.signal, number, handler)
        for number in range(nproc):
            log = None if number == 0 else stack.enter_context((logs / f"rank-{number}.txt").open("w"))
            own = {"RANK": number, "LOCAL_RANK": number, ERROR_FILE: errors / f"{number}.json"}
            env = os.environ | {name: str(value) for name, value in (alike | own).items()}
            # in a session of its own: Ctrl-C reaches the launcher alone, which passes it on once, not twice
            start = Popen(command, env=env, stdin=PIPE, stdout=log, stderr=log, start_new_session=True)
            ranks.append(stack.enter_context(start))
        while not (failed := [n for n, rank in enumerate(ranks) if rank.poll()]):
            if all(rank.returncode == 0 for rank in ranks):
                return 0
            time.sleep(_POLL)
        if ranks[failed[0]].returncode in EXIT_CODES.values():
            return max(rank.wait() for rank in ranks)  # all stop after the same step, whoever received the signal
        time.sleep(_POLL)  # let ranks with the same error finish writing it
        codes = {number: code for number, rank in enumerate(ranks) if (code := rank.poll())}
        for rank in ranks:
            rank.kill()
        return _report(codes, errors, logs, received)


def _report(codes: Mapping[int, int], errors: Path, logs: Path, received: Sequence[int]) -> int:
    """Print why the first of the failed ranks (rank -> exit code) ended, and return its exit code."""
    told = (int(file.stem) for file in sorted(errors.iterdir(), key=lambda file: file.stat().st_mtime))
    # when a rank is killed, the others notice and fail as well: it comes first, though it leaves no error
    killed = (rank for rank, code in codes.items() if code < 0)
    first = next(rank for rank in (*killed, *told, *codes) if rank in codes)
    code, file, log = codes[first], errors / f"{first}.json", logs / f"rank-{first}.txt"
    if -code in received:
        return 128 - code  # the signal came before the first step, or twice: nothing is saved
    if file.exists():
        print(json.loads(file.read_text())["message"]["message"], file=sys.stderr)
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGABRT:
            how += f" (NCCL ends so a rank that waited for another: look at its last lines, and at those in {logs})"
        print("\n".join(log.read_text().splitlines()[-_SHOWN:] if first else []), file=sys.stderr)
        print(f"expertmesh: error: rank {first} {how}; the other ranks were stopped.", file=sys.stderr)
    return code if code > 0 else 1


def record_error(text: str) -> bool:
    """Leave `text` for whoever started this rank to print it, once for all ranks. False if nobody waits for it."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    # torchrun shows the call stack; for an error that a user can mend, the paragraph says more
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    return True


def leave_ranks() -> int:
    """Wait for the other ranks, leave them, and return which rank this was: 0 in a process of its own."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers stop all ranks when the first one ends
    dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def _follow_launcher() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the launcher's end of the pipe is closed
    os.kill(os.getpid(), signal.SIGKILL)
