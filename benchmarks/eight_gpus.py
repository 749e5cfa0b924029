"""Training steps of a whole model on all GPUs of a node: stock Transformers and expertmesh, in turn, in one job.

    torchrun --nproc-per-node 8 benchmarks/eight_gpus.py --work qwen3-30b-a3b --out benchmarks/results/NAME.json

Every arm has the same weights and tokens: forward, backward, clipping (PyTorch's or ours) and fused AdamW, whose states
have the weights' dtype and whose learning rate is 0; `--no-update` leaves clipping and AdamW out. `-ep`: all ranks
share the experts; `-ep-half`: half of the ranks, FSDP2 over the rest; `-graph`: forward and backward are one CUDA
graph. Half of Nemotron-3-Nano's layers on two GPUs:

    torchrun --nproc-per-node 2 benchmarks/eight_gpus.py --work nemotron-3-nano --layers 26 --no-update \
        --arms stock expertmesh expertmesh-graph expertmesh-ep expertmesh-ep-graph --batches 1 2 --routings random-init

Without GPUs it is a tiny model, to try this.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from two_gpus import begin, fill, free, origin_of_all, say, stock_model, tokens

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.flops import step_flops
from expertmesh.bench.gate import set_routing
from expertmesh.bench.origin import write
from expertmesh.bench.works import NEMOTRON_3_NANO, WORKS, config_of, top_k_and_experts
from expertmesh.parallel.clip import clip_grad_norm
from expertmesh.train.graphed import WARM_UP, GraphedStep

ARMS = (
    "stock", "expertmesh-ep-graph", "expertmesh-ep", "stock-compiled", "stock-ep", "expertmesh-ep-half", "expertmesh",
    "expertmesh-graph",
)  # fmt: skip
LAYERS = {"qwen3-30b-a3b": 48, "nemotron-3-nano": len(NEMOTRON_3_NANO)}
ROUTINGS = "random-init", "balanced"  # in this order: the second stays
PHASES = "forward_ms", "backward_ms", "clip_ms", "optimizer_ms"


def build(arm, config, device):
    ranks = dist.get_world_size()
    ep_size = 1 if "-ep" not in arm else ranks // 2 if arm.endswith("half") else ranks
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arm.startswith("stock"):
        model = stock_model(config, dtype, device, ep_size)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, distributed_setup={"ep_size": ep_size})
    fill(model, config, device, "random-init")
    if arm == "stock-compiled":
        torch._dynamo.reset()
        for layer in model.base_model.layers:
            layer.compile()
    return model.train()


def adamw(model):
    """Fused AdamW; parameters of different meshes cannot be updated by one call."""
    groups = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=0.0, fused=True)


def mark(device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def step(model, recorded, optimizer, clip, ids, device):
    """One step; the marks around its phases. optimizer None: forward and backward alone."""
    marks = [mark(device)]
    model.zero_grad(set_to_none=True)
    if recorded:
        recorded(input_ids=ids, labels=ids)
    else:
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(mark(device))
        loss.backward()
    marks.append(mark(device))
    if optimizer is not None:
        clip(model.parameters(), 1.0)
        marks.append(mark(device))
        optimizer.step()
        marks.append(mark(device))
    return marks


def measure(model, recorded, optimizer, clip, config, batch, seq, device, warmup=2, repeats=5):
    """Medians of steps one behind the other, each up to where the next begins."""
    ids, on_gpu = tokens(config, batch, seq, device), device.type == "cuda"
    for number in range(warmup + WARM_UP if recorded else warmup):
        if on_gpu and recorded and number == WARM_UP:  # the recording, whose memory all replays keep
            torch.cuda.reset_peak_memory_stats()
        step(model, recorded, optimizer, clip, ids, device)
    if on_gpu and not recorded:
        torch.cuda.reset_peak_memory_stats()
    steps = [step(model, recorded, optimizer, clip, ids, device) for _ in range(repeats)]
    steps.append([mark(device)])
    if on_gpu:
        torch.cuda.synchronize()
    names = PHASES if not recorded else ("forward_backward_ms", *PHASES[2:])
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


def rows_of(arm, batches, options, device):
    """A row for each routing and each batch size that fits."""
    on_gpu = device.type == "cuda"
    layers = options.layers or (LAYERS[options.work] if on_gpu else None)
    config = config_of(WORKS[options.work], layers, tiny=not on_gpu)
    model = build(arm, config, device)
    # PyTorch's own cannot clip over the meshes of Transformers' expert parallelism
    clip = torch.nn.utils.clip_grad_norm_ if arm in ("stock", "stock-compiled") else clip_grad_norm
    for routing in sorted(options.routings, key=ROUTINGS.index):
        set_routing(model, routing, top_k_and_experts(config)[0])
        for batch in batches:
            recorded = GraphedStep(model) if arm.endswith("graph") else None
            try:
                optimizer = adamw(model) if options.update else None
                measured = measure(model, recorded, optimizer, clip, config, batch, options.seq, device)
            except torch.OutOfMemoryError:
                say(arm, routing, batch, "out of memory")
                break
            finally:
                if recorded:
                    recorded.close()
                optimizer = recorded = None
                model.zero_grad(set_to_none=True)
                free()
            row = {"work": options.work, "arm": arm, "layers": config.num_hidden_layers, "batch": batch}
            yield row | {"seq": options.seq, "routing": routing, **measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="qwen3-30b-a3b", choices=list(LAYERS))
    parser.add_argument("--arms", nargs="+", default=ARMS, help="ARM:1,2 has batch sizes of its own")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--routings", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--no-update", dest="update", action="store_false", help="forward and backward alone")
    parser.add_argument("--out")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    device = begin()
    result = origin_of_all(options.commit) | {"rows": []}
    for arm, _, own in (arm.partition(":") for arm in options.arms):
        if arm not in ARMS:
            parser.error(f"There is no arm {arm!r}: {', '.join(ARMS)}.")
        if arm.endswith("graph") and device.type == "cpu":
            continue
        for row in rows_of(arm, [int(batch) for batch in own.split(",")] if own else options.batches, options, device):
            result["rows"].append(row)
            say(row)
            if dist.get_rank() == 0:  # a later row may fail
                write(result, options.out)
        free()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
