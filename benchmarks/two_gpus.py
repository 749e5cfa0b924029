"""Qwen3-30B-A3B on two GPUs or more: stock FSDP2, stock expert parallelism and expertmesh, in turn, in one job.

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --out benchmarks/results/NAME.json

First the gradients of an 8-layer model, whose every arm gets the same weights and tokens: errors against stock in
float32 and against each other. Then all 48 layers, forward and backward by CUDA events, median of several, and peak
memory. `-recompute` checkpoints every layer, `-graph` replays forward and backward as one CUDA graph. `--probe`
measures what the exchanges of gather.py take alone, of 16,384 tokens with top-8 of 128 experts at random.
"""

import argparse
import gc
import os
import statistics
import sys
import zlib
from functools import partial

import torch
import torch.distributed as dist
from timing import median_ms
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM as StockAuto
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.gate import skewed
from expertmesh.bench.origin import origin, write
from expertmesh.kernels.combine import combine
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.moe.exchange import Outputs
from expertmesh.moe.links import Collectives, link_of
from expertmesh.train.graphed import WARM_UP, GraphedStep

WIDTHS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    max_position_embeddings=40960, use_cache=False,
)  # fmt: skip
TINY = WIDTHS | dict(
    vocab_size=256, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, moe_intermediate_size=32,
    num_experts=8, num_experts_per_tok=2,
)  # fmt: skip
FLOAT32 = "stock-float32"
FSDP_ONLY = (FLOAT32, "stock", "expertmesh")  # in all other arms all ranks share out the experts
ARMS = (
    "stock", "stock-ep", "expertmesh", "expertmesh-ep", "expertmesh-gather", "expertmesh-gather-graph",
    "expertmesh-gather-recompute", "expertmesh-gather-recompute-graph",
)  # fmt: skip
EXCHANGES = "barrier_kernel", "nccl", "PtoP"  # parts of the names of what does not compute in a trace


def build(arm, config, device, routing="random-init"):
    """A sharded model of this arm with the same weights in every arm and layout."""
    ep_size = 1 if arm in FSDP_ONLY else dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" and arm != FLOAT32 else torch.float32
    if arm.startswith("stock"):
        model = stock_model(config, dtype, device, ep_size)
    else:
        setup = {
            "ep_size": ep_size,
            "dispatch": "gather" if "gather" in arm else "all_to_all",
            "activation_checkpointing": "recompute" in arm,
        }
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, distributed_setup=setup)
    fill(model, config, device, routing)
    return model.train()


def stock_model(config, dtype, device, ep_size):
    """Transformers' model under its own FSDP2 over all ranks and expert parallelism; weights are not set yet."""
    setup = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=ep_size)
    setup, _, meshes = PreTrainedModel.prepare_distribute_model(setup)
    with torch.device("meta"):
        model = StockAuto.from_config(config, dtype=dtype)
    model = type(model).maybe_distribute_model(model, setup, meshes)
    model.to_empty(device=device)
    return model


@torch.no_grad()
def fill(model, config, device, routing):
    for name, parameter in model.named_parameters():
        torch.manual_seed(zlib.crc32(name.encode()))
        full = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            full.normal_(0, 0.3 if name.endswith("gate.weight") else 0.02)
        if routing == "skewed" and name.endswith("gate.weight"):
            full = skewed(full, config.num_experts_per_tok, seed=zlib.crc32(name.encode()))
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
        else:  # routers' corrections
            buffer.zero_()


def begin():
    """This rank's device; the ranks meet."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def origin_of_all(commit):
    """Where a result of all these ranks comes from."""
    ranks = dist.get_world_size()
    found = origin(["torchrun", "--nproc-per-node", str(ranks), *sys.argv], commit)
    return found | {"gpus": ranks if torch.cuda.is_available() else 0}


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tokens(config, batch, seq, device):
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(0, config.vocab_size, (batch, seq), generator=generator).to(device)


def gradients(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    whole = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }
    return loss.detach(), whole


def pin_routing(model):
    """Every gate chooses K fixed random experts per token, the same in every arm; the weights still follow the logits.

    Otherwise a near-tie that rounding decides differently sends a token to another expert, and one such token moves a
    gradient more than all the rounding that is to be compared.
    """
    for number, gate in enumerate(module for name, module in model.named_modules() if name.endswith(".gate")):

        def choose(gate, inputs, output, number=number):
            logits, _, ids = output
            generator = torch.Generator(logits.device).manual_seed(1000 * number + dist.get_rank())
            order = torch.rand(logits.shape, generator=generator, device=logits.device)
            ids = order.topk(ids.shape[-1], dim=-1).indices.to(ids.dtype)
            weights = logits.float().softmax(-1).gather(-1, ids.long())
            return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids

        gate.register_forward_hook(choose)


def agreement(arms, config, seq, device, pinned):
    """Relative gradient errors of every arm against stock FSDP2 in float32 and in bfloat16, and of expert parallelism
    against its own FSDP2.

    With the routers' own choices the arms differ by near-ties that rounding decides; with pinned choices by rounding
    alone.
    """
    ids = tokens(config, 1, seq, device)
    rows, known = [], {}
    for arm in (FLOAT32, *arms):
        model = build(arm, config, device)
        if pinned:
            pin_routing(model)
        loss, got = gradients(model, ids)
        for base, (base_loss, want) in known.items():
            error = {n: ((got[n].float() - w.float()).norm() / w.float().norm()).item() for n, w in want.items()}
            worst = max(error, key=error.get)
            rows.append(
                {
                    "arm": arm,
                    "against": base,
                    "routing": "pinned" if pinned else "own",
                    "loss_difference": abs((loss - base_loss).item()),
                    "mean_gradient_error": sum(error.values()) / len(error),
                    "worst_gradient_error": error[worst],
                    "worst_tensor": worst,
                }
            )
            say(rows[-1])
        if arm in FSDP_ONLY:
            known[arm] = loss, {name: grad.clone() for name, grad in got.items()}
        del model, got
        free()
    return rows


def time_arm(model, config, batch, seq, device, warmup=2, repeats=5, step=None):
    """Steps one behind the other, as in training: the CPU may be a step ahead, nothing waits for it in between.

    step: the model's `GraphedStep`, whose forward and backward are one.
    """
    ids = tokens(config, batch, seq, device)
    peak_from = 0
    if step is not None:
        warmup, peak_from = warmup + WARM_UP, -warmup  # the recording, whose memory all replays keep
    steps = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats + 1)]
    for i in range(-warmup, repeats):
        if i == peak_from:
            torch.cuda.reset_peak_memory_stats()
        steps[max(i, 0)][0].record()
        model.zero_grad(set_to_none=True)
        if step is not None:
            step(input_ids=ids, labels=ids)
            continue
        loss = model(input_ids=ids, labels=ids).loss
        steps[max(i, 0)][1].record()
        loss.backward()
        steps[max(i, 0)][2].record()
    steps[repeats][0].record()
    torch.cuda.synchronize()
    whole = statistics.median(start[0].elapsed_time(end[0]) for start, end in zip(steps, steps[1:], strict=False))
    parts = {}
    if step is None:
        forward = statistics.median(start.elapsed_time(middle) for start, middle, _ in steps[:-1])
        backward = statistics.median(middle.elapsed_time(end) for _, middle, end in steps[:-1])
        parts = {"forward_ms": round(forward, 1), "backward_ms": round(backward, 1)}
    return parts | {
        "step_ms": round(whole, 1),
        "tokens_per_second_per_gpu": round(batch * seq / whole * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def exposed(model, ids, step):
    """Where the milliseconds of one step went on this GPU, from a trace: `compute_ms` while a kernel computed,
    `exchange_ms` while rows, dense weights or gradients travelled or ranks met and nothing computed, `idle_ms`."""
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(input_ids=ids, labels=ids) if step else model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, any(name in event.name for name in EXCHANGES))
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("FSDP", "nccl:", "## ", "ProfilerStep"))
    ]
    whole = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy, computing = covered(spans), covered([span for span in spans if not span[2]])
    parts = {"compute_ms": computing, "exchange_ms": busy - computing, "idle_ms": whole - busy}
    return {name: round(microseconds / 1e3, 1) for name, microseconds in parts.items()}


def covered(spans):
    """How long at least one of them lasted."""
    total, last = 0, float("-inf")
    for start, end, *_ in sorted(spans):
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total


def probe(device, tokens, width, experts=128, top_k=8):
    """Microseconds of exchanges alone of [tokens, width] bfloat16, routed at random, with their barriers, and GB/s in
    one direction, which count the rows that some rank needs, each once per rank.

    gather: kept, as in the forward. gather in place: read in the mailbox, as in the backward. scatter: the way back of
    sums that are there, and the last sum. combine: the same with the experts' rows combined on the way.
    """
    ranks, rank, mailboxes = dist.get_world_size(), dist.get_rank(), link_of(dist.group.WORLD)
    x = torch.randn(tokens, width, device=device).bfloat16()
    xs = torch.randn(ranks * tokens, width, device=device).bfloat16()
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
    collectives = Collectives(dist.group.WORLD)
    needed = sum((ids // (experts // ranks) == other).any(-1).sum() for other in range(ranks) if other != rank)
    sent = int(needed) * width * x.element_size()
    (ids,) = collectives.all_gather([ids])
    position = group_by_expert(ids - rank * experts // ranks, experts // ranks).position_TK
    y = torch.randn(int(position.max()) + 1, width, device=device).bfloat16()
    weights = torch.rand(position.shape, device=device)
    runs = {"c10d": {"all-to-all": lambda: dist.all_to_all_single(torch.empty_like(xs), xs)}}
    for name, link in (("NCCL", collectives), ("mailboxes", mailboxes)):
        runs[name] = {"gather": partial(link.all_gather, [x])}
        runs[name]["scatter"] = partial(link.reduce_scatter, [xs])
    runs["mailboxes"]["gather in place"] = partial(mailboxes.all_gather, [x], copy=False)
    runs["mailboxes"]["combine"] = partial(mailboxes.combine_scatter, Outputs(y, position, weights))
    runs["this GPU alone"] = {"combine": lambda: combine(y, position, weights)}
    rows = []
    for name, exchanges in runs.items():
        for what, exchange in exchanges.items():
            us = median_ms(exchange, 6, queued=40) * 1e3
            rate = {} if "alone" in name else {"gb_per_second": round(sent / us / 1e3)}
            rows.append({"link": name, "exchange": what, "us": round(us, 1), **rate})
            say(rows[-1])
    return rows


def say(*what):
    if dist.get_rank() == 0:
        print(*what, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--commit", default="")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--arms", nargs="*", default=ARMS, help="none: gradients only; ARM:1,2 has batch sizes of its own"
    )
    parser.add_argument("--routings", nargs="+", default=["random-init", "skewed"])
    parser.add_argument("--agreement", nargs="*", default=["pinned", "own"], help="none: times only")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--trace", action="store_true", help="for expertmesh-gather: what exchanges cost in a step")
    options = parser.parse_args()
    for arm in options.arms:
        if arm.partition(":")[0] not in ARMS:
            parser.error(f"There is no arm {arm!r}: {', '.join(ARMS)}.")
    device = begin()
    on_gpu = device.type == "cuda"
    widths = WIDTHS if on_gpu else TINY
    arms = {arm.partition(":")[0]: arm.partition(":")[2] for arm in options.arms or ARMS}
    compared = [arm for arm in arms if not arm.endswith("graph")]  # a recorded step computes what its arm does
    small = Qwen3MoeConfig(num_hidden_layers=8 if on_gpu else 2, **widths)
    result = origin_of_all(options.commit) | {
        "agreement": [
            row
            for choice in options.agreement
            for row in agreement(compared, small, 4096 if on_gpu else 16, device, choice == "pinned")
        ],
        "exchanges": probe(device, 16384, 2048) if options.probe and on_gpu else [],
        "rows": [],
    }
    for arm, own in arms.items() if on_gpu and options.arms else ():
        batches = [int(batch) for batch in own.split(",")] if own else options.batches
        for routing in options.routings if arm.startswith("expertmesh") else options.routings[:1]:
            config = Qwen3MoeConfig(num_hidden_layers=options.layers, **widths)
            model = build(arm, config, device, routing)
            for batch in batches:
                step = GraphedStep(model) if arm.endswith("graph") else None
                try:
                    measured = time_arm(model, config, batch, 4096, device, step=step)
                    if options.trace and arm.startswith("expertmesh-gather"):
                        measured["trace"] = exposed(model, tokens(config, batch, 4096, device), step)
                except torch.OutOfMemoryError:
                    say(arm, batch, "out of memory")
                    break
                finally:
                    if step is not None:
                        step.close()
                    step = None
                    model.zero_grad(set_to_none=True)
                    free()
                row = {"work": "qwen3-30b-a3b", "arm": arm, "layers": options.layers, "batch": batch, "seq": 4096}
                result["rows"].append(row | {"routing": routing, **measured})
                say(result["rows"][-1])
                if dist.get_rank() == 0:  # a later row may fail
                    write(result, options.out)
            del model
            free()
    if dist.get_rank() == 0:
        write(result, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
