"""`expertmesh plan`: predict whether a run fits a type of GPU, how fast it is, and which layouts are faster."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.cli.train import configuration

if TYPE_CHECKING:
    from expertmesh.kernels.recompute import Policy
    from expertmesh.plan import Plan
    from expertmesh.plan.layouts import Layout
    from expertmesh.plan.simulate import Simulation

GIB = 2**30
SHOWN = 10  # number of layouts that are listed
SMALLEST = 0.005 * GIB  # smaller pieces of memory are not listed
SIMULATE = "Shard the model for this number of ranks with the real code, and plan from the shards of one rank."
GPU = "GPU type: h200, h100-80gb, b200, a100-80gb or rtx-4090."


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY.SUB=VALUE]...",
            help="The arguments of `expertmesh train`: a YAML file, and keys that override it.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; default: parallel.nproc, or 1.")] = None,
    gpu: Annotated[str, typer.Option(help=GPU)] = "h200",
    simulate: Annotated[int | None, typer.Option(min=1, help=SIMULATE, show_default=False)] = None,
    per_node: Annotated[int, typer.Option(min=1, help="With --simulate: GPUs per node.")] = 8,
    network: Annotated[float, typer.Option(min=0.1, help="With --simulate: GB/s per GPU to other nodes.")] = 40.0,
    layouts: Annotated[bool, typer.Option(help="Search for faster layouts, which takes a few minutes.")] = True,
) -> None:
    """Predict the memory of each GPU in detail, the time of a step, and the layouts that fit, fastest first.

    Only the model's config.json is read, and no GPU is needed. Exit codes: 0 if the run fits, 1 if it does not, 2 for
    wrong usage or configuration.
    """
    from expertmesh.plan.gpus import GPUS
    from expertmesh.plan.layouts import search
    from expertmesh.plan.simulate import simulate as simulation_of
    from expertmesh.train.errors import as_config_error, check_choice
    from expertmesh.train.planned import as_arguments, auto_values, fastest_settings, job_of, open_keys, plan_of

    config = configuration(arguments or [])
    check_choice("--gpu", gpu, list(GPUS))
    kind = replace(GPUS[gpu], network=network * 1e9) if simulate else GPUS[gpu]
    ranks = simulate or gpus or config.parallel.nproc or 1
    if keys := open_keys(config):
        config = fastest_settings(config, ranks, kind)
        typer.echo(f"auto: {as_arguments({key: auto_values(config)[key] for key in keys})}\n")
    if simulate:
        job = replace(job_of(config, simulate), per_node=per_node)
        with as_config_error("The run cannot be planned"):
            simulation = simulation_of(job, kind, config.train.gradient_accumulation_steps)
        typer.echo("\n".join([*simulated(simulation), "", *report(simulation.plan)]))
        raise typer.Exit(0 if simulation.plan.fits else 1)
    with as_config_error("The run cannot be planned"):
        run_plan = plan_of(config, ranks, kind)
    typer.echo("\n".join(report(run_plan)))
    if layouts:
        typer.echo("\n".join(ranked(search(run_plan.layout.job, run_plan.gpu))))
    raise typer.Exit(0 if run_plan.fits else 1)


def report(found: "Plan") -> list[str]:
    """Format a plan as lines of text."""
    job, memory, speed, gpu = found.layout.job, found.layout.memory, found.layout.speed, found.gpu
    rates = "measured on it" if gpu.measured else "assumed from its data sheet"
    lines = [
        f"{job.world_size} x {gpu.name} (rates {rates}): {named(found.layout)}",
        "",
        "memory of a GPU at the peak        GiB",
        *_gib(memory.pieces),
        f"  {'together':<28} {memory.peak / GIB:>9.2f}",
        f"  {'fragmentation, CUDA':<28} {(memory.needed - memory.peak) / GIB:>9.2f}",
        f"  {'needed':<28} {memory.needed / GIB:>9.2f}   of {gpu.memory / GIB:.1f}: "
        + (f"fits, {found.left / GIB:.1f} are left" if found.fits else f"does not fit, {-found.left / GIB:.1f} lack"),
        "",
        "kept from forward to backward      GiB",
        *_gib(memory.kept),
        *_offloaded(found),
        "",
        "step, predicted                     ms",
        *(f"  {name:<28} {seconds * 1e3:>9.1f}" for name, seconds in speed.seconds.items()),
        f"  {'together':<28} {speed.step * 1e3:>9.1f}   {speed.tokens_per_second:,.0f} tokens/s on each GPU",
    ]
    return lines


def simulated(found: "Simulation") -> list[str]:
    """Format the result of --simulate as lines of text."""
    job, speed = found.plan.layout.job, found.plan.layout.speed
    least = speed.step - found.seconds_hidden
    return [
        f"{found.parameters / 1e9:.1f}B parameters, sharded by the real code for {job.world_size} ranks, "
        f"{job.per_node} on a node",
        "",
        "shards of a GPU                    GiB",
        *_gib(found.held),
        "",
        "sent by a GPU in a step        GB: NVLink   network",
        *(f"  {name:<28} {sent.wire / 1e9:>9.2f} {sent.network / 1e9:>9.2f}" for name, sent in found.sent.items()),
        "",
        f"a step takes {speed.step:.2f} s if nothing overlaps, {least:.2f} s if what FSDP sends is hidden: "
        f"{speed.tokens_per_second:,.0f} to {speed.tokens / least:,.0f} tokens/s on each GPU",
    ]


def ranked(found: "list[Layout]") -> list[str]:
    """Format the fastest layouts as lines of text."""
    if not found:
        return ["", "No layout fits: take more GPUs, fewer tokens (data.max_length), or adapters (lora)."]
    best = [
        f"  {layout.speed.tokens_per_second:>12,.0f} {layout.memory.needed / GIB:>10.1f}   {named(layout)}"
        for layout in found[:SHOWN]
    ]
    return ["", "layouts that fit, fastest first", "  tokens/s/GPU        GiB", *best]


def named(layout: "Layout") -> str:
    """Describe a layout in words."""
    job = layout.job
    words = [f"{job.batch} x {job.seq} tokens"]
    shards = job.world_size // job.dp_replicate_size // job.tp_size
    words += [f"ep_size {job.ep_size}", f"{shards} shards"] * (job.world_size > 1)
    words += [f"tp_size {job.tp_size}"] * (job.tp_size > 1)
    released = ["gradients released" + (", clipped exactly" if job.released == "exact" else "")] if job.released else []
    where = [job.optimizer + ", states on the host" * job.offloaded]
    return ", ".join([*words, *_recomputed(job.recompute), *where, *released])


def _recomputed(policy: "Policy") -> list[str]:
    if policy in (True, "full", False):
        return ["layers recomputed"] * bool(policy)
    level, layers = next(iter(policy.items())) if isinstance(policy, dict) else (policy, None)
    return [f"recompute {level}" + (f" in {layers} layers" if layers else "")]


def _offloaded(found: "Plan") -> list[str]:
    host, rate = found.layout.memory.host, found.gpu.host
    lines = [f"  {name:<28} {n / GIB:>9.2f}   {n / rate * 1e3:,.0f} ms each way over PCIe" for name, n in host.items()]
    return ["", "in pinned memory of the host       GiB", *lines] if host else []


def _gib(pieces: dict[str, int]) -> list[str]:
    largest = sorted(pieces.items(), key=lambda piece: -piece[1])
    return [f"  {name:<28} {size / GIB:>9.2f}" for name, size in largest if size >= SMALLEST]
