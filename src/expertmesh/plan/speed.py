"""How long a step takes: what was traced, at rates that were measured.

A product takes its FLOPs at a share of the GPU's GEMM rate, and its bytes at a share of its copy rate; everything else
its bytes, and a launch. These shares are the only constants, one pair for each kind of work, fitted by hand to these
configurations; rows of benchmarks/results that measured others are checks (docs/plan.md):

    Qwen3, 8 layers, batch 1 and 4, and its components (h200_profile)
    DeepSeek V3's components, batch 1 (h200_deepseek_profile)
    Nemotron 3, batch 1 (the scan)
    Qwen3, 8 layers, our trainer, batch 1 (the optimizer)
    Qwen3, 48 layers on two GPUs, batch 1 (the wire)
    Qwen3, 8 layers, adapters on attention and experts, batch 4 (experts with adapters)

They hold for a step that the CPU does not slow down, as recorded ones (docs/cuda-graphs.md), with balanced experts.
"""

from dataclasses import dataclass

from expertmesh.plan.gpus import GPU
from expertmesh.plan.memory import OPTIMIZERS, Job
from expertmesh.plan.trace import Trace, Work

#: kind of work -> (share of the GEMM rate, share of the copy rate)
SHARES = {
    "dense": (0.93, 3.0),  # above 1: most bytes travel while it multiplies
    "head": (0.97, 2.0),
    "experts": (1.0, 1.6),
    "experts, backward": (0.92, 0.8),
    "experts, adapters": (0.56, 1.0),  # by Triton, where adapters are added inside
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
    """seconds: of one optimizer step, by component. tokens: of one rank in it (of a batch that
    tp_size ranks share, its part).
    """

    seconds: dict[str, float]
    tokens: int

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.step


def speed_of(job: Job, found: Trace, gpu: GPU, micro_batches: int = 1, steps: bool = True) -> Speed:
    """The time of a step of so many traced micro-batches. steps: clipping and the optimizer are in it."""
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
        here, host = _optimizer_bytes(job, found)
        seconds[kind] = seconds_of(kind, Work(0.0, here, 2), gpu)
        if job.offloaded:
            seconds[STATES] = host / gpu.host
    return Speed(seconds, job.batch * job.seq * micro_batches // job.tp_size)


def seconds_of(kind: str, work: Work, gpu: GPU) -> float:
    """The time of one kind of work."""
    link = kind.partition(",")[0]
    if link in ("wire", "network", "host"):
        return work.bytes / getattr(gpu, link)
    rate, copies = SHARES[kind]
    return work.flops / (rate * gpu.flops) + work.bytes / (copies * gpu.copies) + work.times * LAUNCH


def _not_hidden(found: Trace, gpu: GPU) -> float:
    """How much longer inputs of layers take to the host and back than the forward and the backward beside them."""

    def seconds(work: dict[str, Work], copies: bool) -> float:
        return sum(seconds_of(kind, one, gpu) for kind, one in work.items() if (kind in COPIES) == copies)

    forward, out = (seconds(found.forward, copies) for copies in (False, True))
    both, copied = (seconds(found.work, copies) for copies in (False, True))
    return max(0.0, out - forward) + max(0.0, copied - out - (both - forward))


def _optimizer_bytes(job: Job, found: Trace) -> tuple[float, float]:
    """(of the GPU's memory, of the host's). Read and written: weights and states; read twice, once by clipping:
    gradients. What is read from the host goes the other way at the same time as what is written there.
    """
    here = host = 0.0
    for elements, size, learns in found.parameters.values():
        states = learns * elements * OPTIMIZERS[job.optimizer](size)
        far = job.on_host(elements * size)
        here += learns * 4 * elements * size + (0 if far else 2 * states)
        host += states if far else 0
    return here, host
