"""A task of a Slurm job as a rank: torch.distributed's variables from Slurm's.

The address is that of the first host of the job's list, where rank 0 runs, and not SLURM_LAUNCH_NODE_IPADDR: that is
the machine on which srun was typed, often a login node.
"""

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping

from expertmesh.train.errors import ConfigError


def is_slurm_rank(environment: Mapping[str, str]) -> bool:
    """Whether Slurm started this process as one of several tasks."""
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a Slurm task.

    MASTER_ADDR and MASTER_PORT that are set already are kept. Raises ConfigError if Slurm's variables are incomplete.
    """
    try:
        job, hosts = int(environment["SLURM_JOB_ID"]), environment["SLURM_JOB_NODELIST"]
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "MASTER_ADDR": environment.get("MASTER_ADDR") or expand_hosts(hosts)[0],
            # below the ports that Linux hands out by itself (from 32768), and another one for each job on a shared host
            "MASTER_PORT": environment.get("MASTER_PORT") or str(10_000 + job % 20_000),
        }
    except KeyError as missing:
        raise ConfigError(
            f"This looks like a task of a Slurm job, but {missing.args[0]} is not set. Start it with srun, or unset "
            "SLURM_PROCID to run without Slurm."
        ) from None


def expand_hosts(hosts: str) -> list[str]:
    """The hosts of a list as Slurm writes it: `node[01-03,7],login` is node01, node02, node03, node7, login."""
    if shutil.which("scontrol"):
        asked = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.split()
    # containers seldom have scontrol
    names = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", hosts)
    return [host for name in names for host in _expand_name(name)]


def _expand_name(name: str) -> list[str]:
    """`rack[1-2]n[03,5]`: every combination, the last bracket fastest."""
    parts = re.split(r"\[([^\]]*)\]", name)  # text and brackets by turns
    choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(ranges: str) -> list[str]:
    """`01-03,7`: 01, 02, 03, 7."""
    ends = [one.partition("-") for one in ranges.split(",")]
    return [f"{n:0{len(first)}}" for first, _, last in ends for n in range(int(first), int(last or first) + 1)]
