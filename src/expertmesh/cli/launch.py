"""`expertmesh launch`: the file with which Slurm or SkyPilot runs `expertmesh train` on several machines."""

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
# Slurm sends SIGTERM 300 seconds before the time limit: time to end the step and save a checkpoint.

trap : TERM  # this shell waits for the ranks, which save and exit with 75
srun --kill-on-bad-exit=1 {command}
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

SKYPILOT = """\
# sky launch, or for machines that may be taken away `sky jobs launch`: it starts again, and the run goes on from its
# newest checkpoint, if save.output_dir is on storage that all machines and the next ones see. The workdir is copied to
# the machines: put a clone of expertmesh into it.
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
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine, one rank for each.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, by SkyPilot's name; Slurm takes the partition's.")] = "H200",
    out: Annotated[Path | None, typer.Option(help="File to write; without it the text is printed.")] = None,
) -> None:
    """Write the file with which Slurm or SkyPilot trains as CONFIG says; an interrupted run resumes by itself.

    Exit code 2 if CONFIG is wrong, or its `parallel` sizes do not fit nodes x gpus-per-node ranks.
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
