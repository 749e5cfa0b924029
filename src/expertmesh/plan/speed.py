"""Predict the time of a step from traced work and measured rates.

A matrix product takes its FLOPs at a share of the GPU's GEMM rate plus its bytes at a share of its copy rate. Other
work takes its bytes plus a launch. The shares are the only constants, one pair for each kind of work. They were fitted
by hand to these configurations; other rows of benchmarks/results serve as checks (docs/plan.md):

    Qwen3, 8 layers, batch 1 and 4, and its components (h200_profile)
    DeepSeek V3's components, batch 1 (h200_deepseek_profile)
    Nemotron 3, batch 1 (the scan)
    Qwen3, 8 layers, our trainer, batch 1 (the optimizer)
    Qwen3, 48 layers on two GPUs, batch 1 (the wire)
    Qwen3, 8 layers, adapters on attention and experts, batch 4 (experts with adapters)

They hold for balanced experts and steps that the CPU does not slow down, as with CUDA graphs (docs/cuda-graphs.md).
"""

from dataclasses import dataclass

from expertmesh.plan.gpus import GPU
from expertmesh.plan.memory import OPTIMIZERS, Job
from expertmesh.plan.trace import Trace, Work

#: kind of work -> (share of the GEMM rate, share of the copy rate)
SHARES = {
    "dense": (0.93, 3.0),  # above 1: most bytes are copied during the computation
    "head": (0.97, 2.0),
    "experts": (1.0, 1.6),
    "experts, backward": (0.92, 0.8),
    "experts, adapters": (0.56, 1.0),  # by Triton, with the adapters fused
    "attention": (0.75, 1.0),
    "attention, backward": (0.62, 1.0),
    "memory": (1.0, 0.85),
    "scan": (1.0, 0.25),
    "optimizer and clipping": (1.0, 0.8),
}
LAUNCH = 2e-6  # seconds
INPUTS = "layer inputs, not hidden"  # the copies of `activation_checkpointing: offload`
STATES = "states over PCIe"
COPIES = ("host", "host, backward")
FIRST = "a first pass, for the norm"  # the price of `gradient_release: exact`
#: kind of work -> what it is called in a plan
COMPONENTS = {
    "dense": "dense products",
    "head": "head and loss",
    "experts": "experts",
    "experts, backward": "experts",
    "experts, adapters": "experts",
    "attention": "attention",
    "attention, backward": "attention",
    "memory": "norms, RoPE, routing, sums",
    "scan": "Mamba2",
    "wire": "wire: tokens of experts",
    "wire, FSDP": "wire: weights and gradients",
    "wire, TP": "wire: tensor parallelism",
    "network": "network: tokens of experts",
    "network, FSDP": "network: weights, gradients",
    "network, TP": "network: tensor parallelism",
}


@dataclass(frozen=True)
class Speed:
    """seconds: of one optimizer step, by component. tokens: of one rank in it, its 1/tp_size of a shared batch."""

    seconds: dict[str, float]
    tokens: int

    @property
    def step(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.step


def speed_of(job: Job, found: Trace, gpu: GPU, micro_batches: int = 1, steps: bool = True) -> Speed:
    """Return the time of a step of `micro_batches` traced micro-batches. steps: include clipping and the optimizer."""
    seconds: dict[str, float] = {}
    for kind, work in found.work.items():
        if kind in COPIES:
            continue
        name = COMPONENTS[kind]
        seconds[name] = seconds.get(name, 0.0) + micro_batches * seconds_of(kind, work, gpu)
    if "host" in found.work:
        seconds[INPUTS] = micro_batches * _not_hidden(found, gpu)
    if job.passes > 1:
        seconds[FIRST] = (job.passes - 1) * sum(seconds.values())
    if steps:
        kind = "optimizer and clipping"
        device, host = _optimizer_bytes(job, found)
        seconds[kind] = seconds_of(kind, Work(0.0, device, 2), gpu)
        if job.offloaded:
            seconds[STATES] = host / gpu.host
    return Speed(seconds, job.batch * job.seq * micro_batches // job.tp_size)


def seconds_of(kind: str, work: Work, gpu: GPU) -> float:
    """Return the time of one kind of work."""
    link = kind.partition(",")[0]
    if link in ("wire", "network", "host"):
        return work.bytes / getattr(gpu, link)
    rate, copies = SHARES[kind]
    return work.flops / (rate * gpu.flops) + work.bytes / (copies * gpu.copies) + work.times * LAUNCH


def _not_hidden(traced: Trace, gpu: GPU) -> float:
    """Return the time of copying layer inputs to the host and back that the forward and backward do not hide."""

    def seconds(work: dict[str, Work], copies: bool) -> float:
        return sum(seconds_of(kind, part, gpu) for kind, part in work.items() if (kind in COPIES) == copies)

    forward, out = (seconds(traced.forward, copies) for copies in (False, True))
    both, copied = (seconds(traced.work, copies) for copies in (False, True))
    return max(0.0, out - forward) + max(0.0, copied - out - (both - forward))


def _optimizer_bytes(job: Job, traced: Trace) -> tuple[float, float]:
    """Return the optimizer's bytes (in GPU memory, over PCIe in each direction). Weights and states are read and
    written, gradients are read twice, once by clipping. PCIe copies in both directions at once.
    """
    device = host = 0.0
    for elements, size, learns in traced.parameters.values():
        states = learns * elements * OPTIMIZERS[job.optimizer](size)
        on_host = job.on_host(elements * size)
        device += learns * 4 * elements * size + (0 if on_host else 2 * states)
        host += states if on_host else 0
    return device, host
