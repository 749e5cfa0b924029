"""Predict the memory of a rank in a training run, on any machine and without reading weights.

    job = Job(config, batch=4, seq=4096, world_size=2, ep_size=2)
    need = memory_of(job, trace(job, gpu.memory))

The model is created on the meta device with this rank's shard, and one step is traced (trace.py). This file adds what
a trace does not contain, by rules: optimizer states, weights gathered by FSDP, and fragmentation.
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
from expertmesh.plan.shards import Gradients, Share, keep_local_experts, shares_by_rule
from expertmesh.plan.trace import StepRecorder, Trace, Work, quiet, watched
from expertmesh.plan.wire import PlannedDispatch
from expertmesh.weights.four_bit import ExpertsQuantConfig, pack

GIB = 2**30
#: optimizer -> bytes of state per element, for an element size in bytes
OPTIMIZERS = {
    "adamw": lambda size: 2 * size,
    "adamw-float32": lambda size: 12 if size < 4 else 8,
    "adamw-24bit": lambda size: (3 if size < 4 else 2) + 2 * 4 / 256,
    "adamw-8bit": lambda _: 2 + 2 * 4 / 256,  # two moments, and a float32 scale for each block of 256
    "sgd": lambda _: 0,
}
#: cuBLAS workspace on Hopper and newer, in PyTorch's memory
WORKSPACE = 32 * 2**20
#: reserved memory beyond allocated memory, as a share of it: `reserved_gib` / `peak_gib` in
#: benchmarks/results/h200_{loops,packed_loop*}.json is 1.03 to 1.11; when memory is scarce PyTorch frees its cache
FRAGMENTATION = 0.06
#: CUDA context, loaded modules and NCCL buffers, which are outside PyTorch's memory
CONTEXT = 1.0 * GIB


@dataclass(frozen=True)
class Job:
    """A training job. batch: rows of `seq` tokens in a micro-batch of this rank, each of `documents` equal documents.
    optimizer: one of `OPTIMIZERS`. released: the optimizer updates a parameter in the backward as soon as its gradient
    is complete, then frees the gradient; "exact" runs a first backward for the norm. offloaded: optimizer states of
    large weights are in host memory. recompute: `activation_checkpointing` of the setup. adapt: function applied to the
    model before training, such as PEFT's `get_peft_model`. experts: the format of 4-bit routed experts. accumulates: a
    step has several micro-batches, so gradients are always allocated. mtp: the checkpoint has modules for multi-token
    prediction, which are frozen. per_node: GPUs of a node.
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
        """Number of forward and backward passes per micro-batch."""
        return 2 if self.released == "exact" else 1

    def on_host(self, size: float) -> bool:
        """Return whether the optimizer states of a weight of `size` bytes are in host memory."""
        return self.offloaded and size >= low_memory.LARGE

    def setup(self) -> DistributedSetup:
        """Return the layout. Raise ValueError for incompatible sizes."""
        return DistributedSetup(
            world_size=self.world_size,
            ep_size=self.ep_size,
            dp_replicate_size=self.dp_replicate_size,
            tp_size=self.tp_size,
            activation_checkpointing=self.recompute,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part of the model. pieces: allocated at the peak. kept: activations saved for the backward.
    host: in pinned host memory. `peak` is what PyTorch allocates, `needed` what the GPU must have.
    """

    pieces: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Peak of bytes in tensors."""
        return sum(self.pieces.values())

    @property
    def needed(self) -> int:
        """Peak of bytes taken from the GPU."""
        return int(self.peak * (1 + FRAGMENTATION) + CONTEXT)


def model_of(job: Job) -> Any:
    """Return the full training model on the meta device. Raise ValueError if Transformers cannot create it there."""
    return adapted(job, base_of(job))


def adapted(job: Job, model: Any) -> Any:
    """Return the model in training mode after the job's `adapt`, which runs after the layout."""
    return (job.adapt(model) if job.adapt else model).train()


def base_of(job: Job) -> Any:
    """Return the model as loaded, before `adapt`. Raise ValueError as `model_of` does."""
    with torch.device("meta"), quiet():
        options: dict[str, Any] = {"attn_implementation": job.attention} if job.attention else {}
        options |= {"mtp_loss_weight": 1.0} if job.mtp else {}
        model: Any = AutoModelForCausalLM.from_config(job.config, dtype=job.dtype, fused=job.fused, **options)
        if job.mtp:  # as for a checkpoint whose modules are kept but not trained
            model.mtp_loss_weight = None
            for parameter in model._mtp.parameters_of(model):
                parameter.requires_grad_(False)
        if job.experts:
            pack(model, ExpertsQuantConfig(job.experts))
    return model


def trace(job: Job, memory: int, shares: dict[str, Share] | None = None) -> Trace:
    """Trace a forward and backward of the job on a rank whose GPU has `memory` bytes. shares: of all parameters, if
    not by rule (simulate.py). Raise ValueError for a model that cannot be traced and for incompatible sizes.
    """
    if job.tp_size == 1:
        return _trace(model_of(job), job, memory, shares)
    with rank_of(job.tp_size):  # the real tensor-parallel code, on a fake process group
        model = lay_out(base_of(job), DistributedSetup(tp_size=job.tp_size), memory)
        return _trace(adapted(job, model), job, memory, shares)


def _trace(model: Any, job: Job, memory: int, shares: dict[str, Share] | None) -> Trace:
    traced = Trace()
    watch = StepRecorder(traced, mean_keys(job.seq // job.documents), group_of(range(job.tp_size), job.per_node))
    shares = shares or shares_by_rule(model, job, memory)
    keep_local_experts(model, job.ep_size)
    if job.ep_size > 1:
        near = job.ep_size <= NEAR and job.per_node % job.ep_size == 0
        ranks, tp_mesh = (
            group_of(range(job.ep_size), job.per_node),
            model._device_mesh["tp"] if job.tp_size > 1 else None,
        )
        for module in filter(is_experts, model.modules()):
            module.forward = PlannedDispatch(module, ranks, watch, near, tp_mesh)
    with quiet():
        recompute(model, job.recompute)
    if job.recompute and job.adapt:
        model.enable_input_require_grads()
    gradients = Gradients(watch, job)
    units: dict[str, int] = defaultdict(int)  # FSDP unit -> bytes that it gathers and frees again
    for name, parameter in model.named_parameters():
        share, whole, size = shares[name], local_shard(parameter), parameter.element_size()
        parts = [whole]
        if isinstance(whole, Packed):
            parts = [whole.codes, whole.scales]
            size = sum(part.nbytes for part in parts) / whole.numel()
            watch.attribute(whole.buffer.take(whole.shape, whole), "decoded experts")
        traced.parameters[name] = share.elements, size, parameter.requires_grad
        for part in parts:
            watch.exclude(part)
        watch.count("parameters", int(share.elements * size))
        if share.kept:
            watch.count("gathered weights", whole.nbytes)
        elif share.gathered:
            units[share.unit] += whole.nbytes
        watch.record_sent(", FSDP", *share.sends(whole.nbytes, parameter.requires_grad))
        if parameter.requires_grad:
            if job.accumulates:
                watch.count("gradients", share.elements * size)
            parameter.register_post_accumulate_grad_hook(gradients.of(share))
    for buffer in model.buffers():
        watch.attribute(buffer, "parameters")
    watch.count("gathered weights", sum(sorted(units.values())[-2:]))  # the current and the prefetched unit
    watch.count("libraries", WORKSPACE)
    constant = watch.live_bytes()
    with watched(watch, memory):
        ids = torch.empty(job.batch, job.seq, dtype=torch.long, device="meta")
        try:
            loss = model(input_ids=ids, labels=ids).loss
            live = watch.live_bytes()
            traced.kept = {p: n - constant.get(p, 0) for p, n in live.items() if n > constant.get(p, 0)}
            traced.forward = dict(traced.work)
            loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot be planned: its code reads values of tensors, which have none here: "
                f"{error}. Measure a few steps with few layers instead."
            ) from error
    return traced


def mean_keys(seq: int) -> float:
    """Return how many tokens a token attends to on average under a causal mask, itself included."""
    return (seq + 1) / 2


def memory_of(job: Job, found: Trace) -> Memory:
    """Return the memory of a traced step with the job's optimizer."""
    host = {"layer inputs": found.forward.get("host", Work()).bytes, "optimizer states": 0.0}
    device = 0.0
    for elements, size, learns in found.parameters.values():
        states = learns * elements * OPTIMIZERS[job.optimizer](size)
        if job.on_host(elements * size):
            host["optimizer states"] += states
        else:
            device += states
    on_host = {name: int(size) for name, size in host.items() if size}
    return Memory({"optimizer states": int(device)} | found.peak, found.kept, on_host)
