"""`expertmesh launch`: write the file with which Slurm or SkyPilot runs `expertmesh train` on several machines."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

SBATCH = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Slurm sends SIGTERM 300 seconds before the time limit, which leaves time to finish the step and save a checkpoint.

trap : TERM  # this shell must survive SIGTERM and wait for the ranks, which save and exit with 75
srun --kill-on-bad-exit=1 {command}
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

SKYPILOT = """\
# Start it with `sky launch`, or on spot machines with `sky jobs launch`, which restarts it. A restart resumes from
# its newest checkpoint if save.output_dir is on storage shared by all machines, old and new. The workdir is copied to
# the machines and must contain a clone of expertmesh.
name: {name}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: {accelerator}:{gpus}
setup: |
  pip install './expertmesh[train,plots,gpu]'
run: |
  torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" \\
    --node-rank="$SKYPILOT_NODE_RANK" --master-addr="$(head -n1 <<< "$SKYPILOT_NODE_IPS")" --master-port=29500 \\
    -m {command}
"""


def launch(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a file for sbatch.")] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="Write a SkyPilot task.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per machine; each gets a rank.")] = 8,
    gpu: Annotated[str, typer.Option(help="GPU type by SkyPilot's name; Slurm uses the partition's.")] = "H200",
    out: Annotated[Path | None, typer.Option(help="File to write; default: print the text.")] = None,
) -> None:
    """Write the file with which Slurm or SkyPilot runs CONFIG. An interrupted run resumes automatically.

    Exit code 2 if CONFIG is not valid, or its `parallel` sizes do not fit nodes x gpus-per-node ranks.
    """
    from expertmesh.train.config import load_config
    from expertmesh.train.errors import ConfigError
    from expertmesh.train.launch import layout

    if slurm == skypilot:
        raise ConfigError("Say for which scheduler: --slurm or --skypilot.")
    layout(load_config(config), nodes * gpus_per_node)
    command = f"expertmesh train {shlex.quote(str(config))} save.resume_from_checkpoint=auto"
    name = "".join(letter if letter.isalnum() else "-" for letter in config.stem).strip("-") or "expertmesh"
    text = (SBATCH if slurm else SKYPILOT).format(
        name=name,
        nodes=nodes,
        gpus=gpus_per_node,
        accelerator=gpu,
        command=command,
    )
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text)
    typer.echo(f"Wrote {out}. Start it with: {'sbatch' if slurm else 'sky launch'} {shlex.quote(str(out))}", err=True)
