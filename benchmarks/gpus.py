"""Time training steps of a whole model on all GPUs of a node: stock Transformers and expertmesh, in one job.

    torchrun --nproc-per-node 4 benchmarks/gpus.py --work qwen3-30b-a3b --out benchmarks/results/NAME.json

Every arm has the same weights and tokens. A step is forward, backward, clipping and AdamW, with states in the weights'
dtype and a learning rate of 0; `--no-update` omits clipping and AdamW. Stock clips and updates with PyTorch's functions
(with experts on several meshes it clips with ours), ours with `expertmesh.AdamW`, which also clips. An arm is `stock`
or `expertmesh` with these suffixes:

-ep         experts are divided over all ranks; -ep-half: over half of them, with FSDP2 over the rest. Else: FSDP2 only
-compiled   each decoder layer is compiled (stock)
-recompute  the activations of each layer are recomputed (ours)
-experts    only the experts' up-projections and activations without a matrix product are recomputed (ours)
-graph      forward and backward are one CUDA graph (ours)
-8bit       AdamW's states have 8 bits (ours)
-released   gradients are released within the backward, clipped by the norms of earlier steps (ours, no CUDA graph)

`ARM:1,2` sets the batch sizes of an arm. `--trace` adds a breakdown of a step's milliseconds. Without GPUs the script
runs a tiny model.
"""

import gc
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from shared import Result, parser
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM as StockAuto
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from expertmesh import AdamW, AutoModelForCausalLM, GradientRelease
from expertmesh.bench.flops import step_flops
from expertmesh.bench.gate import set_routing
from expertmesh.bench.works import NEMOTRON_3_NANO, WORKS, config_of, top_k_and_experts
from expertmesh.parallel.clip import clip_grad_norm
from expertmesh.train.graphed import WARM_UP, GraphedStep

ARMS = "stock stock-ep stock-compiled expertmesh expertmesh-ep expertmesh-ep-half expertmesh-ep-graph".split()
LAYERS = {"qwen3-30b-a3b": 48, "nemotron-3-nano": len(NEMOTRON_3_NANO)}
ROUTINGS = "random-init", "balanced"  # in this order: the hooks of the second stay
PHASES = "forward_ms", "backward_ms", "clip_ms", "optimizer_ms"
EXCHANGES = "barrier_kernel", "nccl", "PtoP"  # parts of the names of communication in a trace
NOTES = "FSDP", "nccl:", "## ", "ProfilerStep"  # prefixes of annotations in a trace


def begin() -> torch.device:
    """Initialize the process group; return this rank's device. NVLink multicast is off: it can break shared links."""
    os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


class RanksResult(Result):
    """The result of a run on several ranks. Rank 0 prints and writes it."""

    def __init__(self, options: Any, **more: Any):
        ranks = dist.get_world_size()
        super().__init__(options, gpus=ranks if torch.cuda.is_available() else 0, **more)
        self.content["command"] = f"torchrun --nproc-per-node {ranks} {' '.join(sys.argv)}"

    def add(self, row: dict[str, Any], key: str = "rows") -> None:
        if dist.get_rank() == 0:
            super().add(row, key)


def build(arm: str, config: Any, device: torch.device) -> Any:
    """Return a sharded model of this arm, with the same weights in every arm and layout."""
    ranks = dist.get_world_size()
    ep_size = 1 if "-ep" not in arm else ranks // 2 if "-half" in arm else ranks
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arm.startswith("stock"):
        setup, _, meshes = PreTrainedModel.prepare_distribute_model(DistributedConfig(fsdp_size=ranks, ep_size=ep_size))
        with torch.device("meta"):
            model = StockAuto.from_config(config, dtype=dtype)
        model = type(model).maybe_distribute_model(model, setup, meshes)
        model.to_empty(device=device)
    else:
        setup = {
            "ep_size": ep_size,
            "activation_checkpointing": "experts" if "-experts" in arm else "-recompute" in arm,
        }
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, distributed_setup=setup)
    fill(model, config, device)
    if "-compiled" in arm:
        torch._dynamo.reset()
        for layer in model.base_model.layers:
            layer.compile()
    return model.train()


@torch.no_grad()
def fill(model: Any, config: Any, device: torch.device) -> None:
    """Initialize weights at random, seeded by the parameter's name only."""
    for name, parameter in model.named_parameters():
        torch.manual_seed(zlib.crc32(name.encode()))
        full = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            full.normal_(0, 0.3 if name.endswith("gate.weight") else 0.02)
        full = full.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(full)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            steps = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
            buffer.copy_(1.0 / (config.rope_parameters["rope_theta"] ** steps))
        else:  # correction biases of routers
            buffer.zero_()


def tokens(config: Any, batch: int, seq: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(0, config.vocab_size, (batch, seq), generator=generator).to(device)


def adamw(arm: str, model: Any) -> torch.optim.Optimizer:
    """Return our AdamW, or PyTorch's fused one with a group per mesh, as one call cannot update several meshes."""
    if not arm.startswith("stock"):
        return AdamW(model.parameters(), lr=0.0, max_grad_norm=1.0, states="8bit" if "-8bit" in arm else None)
    groups: dict[Any, list] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=0.0, fused=True)


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def step(model: Any, runner: Any, optimizer: Any, clip: Any, ids: torch.Tensor, device: torch.device) -> list[Any]:
    """Run one step and return the time marks between its phases. `runner` runs forward and backward as one phase;
    without it they are two. optimizer None: only forward and backward; clip None: the optimizer clips.
    """
    marks = [mark(device)]
    model.zero_grad(set_to_none=True)
    if isinstance(runner, GradientRelease):
        runner.backward(lambda: model(input_ids=ids, labels=ids).loss)
    elif runner:
        runner(input_ids=ids, labels=ids)
    else:
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(mark(device))
        loss.backward()
    marks.append(mark(device))
    if optimizer is not None:
        if clip is not None:
            clip(model.parameters(), 1.0)
        marks.append(mark(device))
        optimizer.step()
        marks.append(mark(device))
    return marks


def measure(
    model: Any, runner: Any, optimizer: Any, clip: Any, config: Any, batch: int, seq: int, device: torch.device,
    warmup: int = 2, repeats: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Return medians over consecutive steps, each timed from its start to the start of the next."""
    ids, on_gpu, recorded = tokens(config, batch, seq, device), device.type == "cuda", isinstance(runner, GraphedStep)
    for number in range(warmup + WARM_UP if recorded else warmup):
        if on_gpu and recorded and number == WARM_UP:  # the step that is recorded; replays keep its memory
            torch.cuda.reset_peak_memory_stats()
        step(model, runner, optimizer, clip, ids, device)
    if on_gpu and not recorded:
        torch.cuda.reset_peak_memory_stats()
    steps = [step(model, runner, optimizer, clip, ids, device) for _ in range(repeats)]
    steps.append([mark(device)])
    if on_gpu:
        torch.cuda.synchronize()
    names = PHASES if not runner else ("forward_backward_ms", *PHASES[2:])
    parts = {
        name: statistics.median(milliseconds(marks[at], marks[at + 1]) for marks in steps[:-1])
        for at, name in enumerate(names[: len(steps[0]) - 1])
    }
    whole = statistics.median(milliseconds(a[0], b[0]) for a, b in zip(steps, steps[1:], strict=False))
    training = whole - parts.get("clip_ms", 0) - parts.get("optimizer_ms", 0)
    return {name: round(ms, 1) for name, ms in parts.items()} | {
        "step_ms": round(whole, 1),
        "tokens_per_second_per_gpu": round(batch * seq / whole * 1e3),
        "tflops_per_gpu": round(step_flops(config, batch, seq) / training / 1e9, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
    }


def trace(model: Any, runner: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return the milliseconds of one step on this GPU in which a compute kernel ran, in which only communication ran,
    and in which nothing ran.
    """
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        runner(input_ids=ids, labels=ids) if isinstance(runner, GraphedStep) else model(
            input_ids=ids, labels=ids
        ).loss.backward()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, any(name in event.name for name in EXCHANGES))
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(NOTES)
    ]
    whole = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy, computing = covered(spans), covered([span for span in spans if not span[2]])
    parts = {"compute_ms": computing, "exchange_ms": busy - computing, "idle_ms": whole - busy}
    return {name: round(microseconds / 1e3, 1) for name, microseconds in parts.items()}


def covered(spans: list[tuple]) -> float:
    """Return the total time covered by at least one span."""
    total, last = 0.0, float("-inf")
    for start, end, *_ in sorted(spans):
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total


def rows_of(arm: str, batches: list[int], options: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each routing and each batch size that fits."""
    on_gpu = device.type == "cuda"
    layers = options.layers or (LAYERS[options.work] if on_gpu else None)
    config = config_of(WORKS[options.work], layers, tiny=not on_gpu)
    model = build(arm, config, device)
    # PyTorch's function cannot clip over the several meshes of Transformers' expert parallelism
    stock_clip = clip_grad_norm if "-ep" in arm else torch.nn.utils.clip_grad_norm_
    clip = stock_clip if arm.startswith("stock") else None
    for routing in sorted(options.routings, key=ROUTINGS.index):
        set_routing(model, routing, top_k_and_experts(config)[0])
        for batch in batches:
            row = {"work": options.work, "arm": arm, "layers": config.num_hidden_layers, "batch": batch}
            row |= {"seq": options.seq, "routing": routing}
            runner = None
            try:
                optimizer = adamw(arm, model) if options.update else None
                if "-graph" in arm:
                    runner = GraphedStep(model)
                elif "-released" in arm:
                    runner = GradientRelease(optimizer, "running")
                row |= measure(model, runner, optimizer, clip, config, batch, options.seq, device)
                if options.trace and on_gpu:
                    row["trace"] = trace(model, runner, tokens(config, batch, options.seq, device))
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            finally:
                model.zero_grad(set_to_none=True)  # before close(), which would copy gradients held by the graph
                if runner:
                    runner.close()
                optimizer = runner = None
                free()
            yield row
            if "failed" in row:
                break


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--work", default="qwen3-30b-a3b", choices=list(LAYERS))
    options.add_argument("--arms", nargs="+", default=ARMS)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options.add_argument("--routings", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    options.add_argument("--layers", type=int, help="default: all")
    options.add_argument("--seq", type=int, default=4096)
    options.add_argument("--no-update", dest="update", action="store_false", help="only forward and backward")
    options.add_argument("--trace", action="store_true")
    options = options.parse_args()
    device = begin()
    result = RanksResult(options)
    for arm, _, own in (arm.partition(":") for arm in options.arms):
        if "-graph" in arm and device.type == "cpu":
            continue
        for row in rows_of(arm, [int(batch) for batch in own.split(",")] if own else options.batches, options, device):
            result.add(row)
        free()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
