"""How much memory a rank of a training run needs, found on any machine before a weight is read.

    job = Job(config, batch=4, seq=4096, world_size=2, ep_size=2)
    need = memory_of(job, trace(job, gpu.memory))

The model is made on the meta device, cut to this rank's share, and one step of it is traced (trace.py). What a trace
does not hold is added here, each by its rule: optimizer states, what FSDP gathers, and what allocators lose.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from expertmesh.auto import AutoModelForCausalLM
from expertmesh.kernels.packed import Packed
from expertmesh.kernels.recompute import Policy
from expertmesh.memory import states as low_memory
from expertmesh.moe.experts import is_experts
from expertmesh.parallel.clip import local_shard
from expertmesh.parallel.setup import NEAR, DistributedSetup, recompute
from expertmesh.plan.links import group_of
from expertmesh.plan.ranks import lay_out, rank_of
from expertmesh.plan.shards import Gradients, Share, cut_experts, spread
from expertmesh.plan.trace import Trace, Watch, Work, quiet, watched
from expertmesh.plan.wire import Alone
from expertmesh.weights.four_bit import ExpertsQuantConfig, pack

GIB = 2**30
#: bytes of optimizer states for a parameter of so many bytes
OPTIMIZERS = {
    "adamw": lambda size: 2 * size,
    "adamw-float32": lambda size: 12 if size < 4 else 8,
    "adamw-24bit": lambda size: (3 if size < 4 else 2) + 2 * 4 / 256,
    "adamw-8bit": lambda _: 2 + 2 * 4 / 256,  # two moments, and a float32 scale for each block of 256
    "sgd": lambda _: 0,
}
#: cuBLAS' workspace on Hopper and newer, from PyTorch's memory
WORKSPACE = 32 * 2**20
#: of what is allocated, so much more is taken from the GPU: blocks that fit nothing. `reserved_gib` over `peak_gib` of
#: benchmarks/results/h200_{loops,packed_loop*}.json is 1.03 to 1.11 where memory is not scarce; PyTorch gives back what
#: is cached before it fails
FRAGMENTATION = 0.06
#: the CUDA context with its modules and NCCL's buffers, outside of PyTorch's memory
CONTEXT = 1.0 * GIB


@dataclass(frozen=True)
class Job:
    """What is trained, and how. batch: rows of seq tokens in a micro-batch of this rank, each of so many `documents` of
    equal length. optimizer: one of `OPTIMIZERS`. released: the optimizer steps a parameter as soon as its gradient is
    there, so that gradients never stand together; "exact": after a first backward for their norm. offloaded: states of
    large weights lie in memory of the host. recompute: as a
    setup's `activation_checkpointing`. adapt: what becomes of the model before it is trained (PEFT's `get_peft_model`,
    say). experts: the format of routed experts that are in 4 bits. accumulates: a step has several micro-batches, so
    that gradients stand from the first on. mtp: the checkpoint has modules for multi-token prediction, which stay as
    they are. per_node: GPUs of a machine.
    """

    config: PreTrainedConfig
    batch: int = 1
    seq: int = 4096
    world_size: int = 1
    ep_size: int = 1
    dp_replicate_size: int = 1
    tp_size: int = 1
    recompute: Policy = False
    optimizer: str = "adamw"
    released: bool | str = False
    offloaded: bool = False
    dtype: torch.dtype = torch.bfloat16
    documents: int = 1
    fused: Any = True
    attention: str | None = None
    adapt: Any = None
    experts: str | None = None
    mtp: bool = False
    per_node: int = 8
    accumulates: bool = False

    @property
    def passes(self) -> int:
        """Forwards and backwards of a micro-batch."""
        return 2 if self.released == "exact" else 1

    def on_host(self, size: float) -> bool:
        """Whether the states of a weight of so many bytes lie there."""
        return self.offloaded and size >= low_memory.LARGE

    def setup(self) -> DistributedSetup:
        """The layout. Raises ValueError for sizes that do not fit each other."""
        return DistributedSetup(
            world_size=self.world_size,
            ep_size=self.ep_size,
            dp_replicate_size=self.dp_replicate_size,
            tp_size=self.tp_size,
            activation_checkpointing=self.recompute,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. pieces: those that stand when the peak is reached, by what they are for. kept: activations
    that wait for the backward, by piece. host: what lies in pinned memory of the host, by what it is. peak is what
    PyTorch allocates, needed what the GPU must have.
    """

    pieces: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Most bytes in tensors at once."""
        return sum(self.pieces.values())

    @property
    def needed(self) -> int:
        """Most bytes that are taken from the GPU."""
        return int(self.peak * (1 + FRAGMENTATION) + CONTEXT)


def model_of(job: Job) -> Any:
    """The model as it trains, whole, without memory. Raises ValueError for one that Transformers cannot make so."""
    return adapted(job, base_of(job))


def adapted(job: Job, model: Any) -> Any:
    """The model with what becomes of it behind its layout."""
    return (job.adapt(model) if job.adapt else model).train()


def base_of(job: Job) -> Any:
    """The model as it is loaded. Raises ValueError as `model_of`."""
    with torch.device("meta"), quiet():
        options: dict[str, Any] = {"attn_implementation": job.attention} if job.attention else {}
        options |= {"mtp_loss_weight": 1.0} if job.mtp else {}
        model: Any = AutoModelForCausalLM.from_config(job.config, dtype=job.dtype, fused=job.fused, **options)
        if job.mtp:  # as those of a checkpoint are kept where nobody trains them
            model.mtp_loss_weight = None
            for parameter in model._mtp.parameters_of(model):
                parameter.requires_grad_(False)
        if job.experts:
            pack(model, ExpertsQuantConfig(job.experts))
    return model


def trace(job: Job, memory: int, shares: dict[str, Share] | None = None) -> Trace:
    """One forward and backward of the job on a rank whose GPU has so many bytes. shares: of all parameters, if not
    by rule (simulate.py). Raises ValueError for a model that cannot be traced, and for sizes that do not fit.
    """
    if job.tp_size == 1:
        return _trace(model_of(job), job, memory, shares)
    with rank_of(job.tp_size):  # tensor parallelism is real, among ranks that do not exist
        model = lay_out(base_of(job), DistributedSetup(tp_size=job.tp_size), memory)
        return _trace(adapted(job, model), job, memory, shares)


def _trace(model: Any, job: Job, memory: int, shares: dict[str, Share] | None) -> Trace:
    found = Trace()
    watch = Watch(found, mean_keys(job.seq // job.documents), group_of(range(job.tp_size), job.per_node))
    shares = shares or spread(model, job, memory)
    cut_experts(model, job.ep_size)
    if job.ep_size > 1:
        near = job.ep_size <= NEAR and job.per_node % job.ep_size == 0
        ranks, tp_mesh = (
            group_of(range(job.ep_size), job.per_node),
            model._device_mesh["tp"] if job.tp_size > 1 else None,
        )
        for module in filter(is_experts, model.modules()):
            module.forward = Alone(module, ranks, watch, near, tp_mesh)
    with quiet():
        recompute(model, job.recompute)
    if job.recompute and job.adapt:
        model.enable_input_require_grads()
    gradients = Gradients(watch, job)
    units: dict[str, int] = defaultdict(int)  # bytes that FSDP gathers together and frees again
    for name, parameter in model.named_parameters():
        share, whole, size = shares[name], local_shard(parameter), parameter.element_size()
        parts = [whole]
        if isinstance(whole, Packed):
            parts = [whole.codes, whole.scales]
            size = sum(part.nbytes for part in parts) / whole.numel()
            watch.own(whole.buffer.take(whole.shape, whole), "decoded experts")
        found.parameters[name] = share.elements, size, parameter.requires_grad
        for part in parts:
            watch.disown(part)
        watch.take("parameters", int(share.elements * size))
        if share.kept:
            watch.take("gathered weights", whole.nbytes)
        elif share.gathered:
            units[share.unit] += whole.nbytes
        watch.sends(", FSDP", *share.sends(whole.nbytes, parameter.requires_grad))
        if parameter.requires_grad:
            if job.accumulates:
                watch.take("gradients", share.elements * size)
            parameter.register_post_accumulate_grad_hook(gradients.of(share))
    for buffer in model.buffers():
        watch.own(buffer, "parameters")
    watch.take("gathered weights", sum(sorted(units.values())[-2:]))  # a layer's, and the next one's, which come then
    watch.take("libraries", WORKSPACE)
    constant = watch.standing()
    with watched(watch, memory):
        ids = torch.empty(job.batch, job.seq, dtype=torch.long, device="meta")
        try:
            loss = model(input_ids=ids, labels=ids).loss
            stands = watch.standing()
            found.kept = {p: n - constant.get(p, 0) for p, n in stands.items() if n > constant.get(p, 0)}
            found.forward = dict(found.work)
            loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot be planned. It runs without values here, and its code looks at them: "
                f"{error}. Measure a few steps with few layers instead."
            ) from error
    return found


def mean_keys(seq: int) -> float:
    """How many tokens a causal token sees on average, itself included."""
    return (seq + 1) / 2


def memory_of(job: Job, found: Trace) -> Memory:
    """The memory of a traced step, by the job's optimizer."""
    host = {"layer inputs": found.forward.get("host", Work()).bytes, "optimizer states": 0.0}
    here = 0.0
    for elements, size, learns in found.parameters.values():
        states = learns * elements * OPTIMIZERS[job.optimizer](size)
        if job.on_host(elements * size):
            host["optimizer states"] += states
        else:
            here += states
    away = {name: int(size) for name, size in host.items() if size}
    return Memory({"optimizer states": int(here)} | found.peak, found.kept, away)
