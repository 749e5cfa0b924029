"""Qwen3-30B-A3B widths on one GPU: stock Transformers and expertmesh, same weights, same tokens, in turn, in one job.

    python benchmarks/one_gpu.py --out benchmarks/results/NAME.json

For each batch size and arm: forward and backward by CUDA events, median of several; tokens per second; peak memory.
Before that: bf16 errors of both sides against a float32 reference at the same widths (2 layers), and proof that a whole
expertmesh step never makes the CPU wait. Prints a table and writes JSON.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import traceback

import torch
import transformers
from transformers import AutoModelForCausalLM as StockAuto
from transformers import Qwen3MoeConfig

from expertmesh import AutoModelForCausalLM

WIDTHS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    max_position_embeddings=40960, use_cache=False,
)  # fmt: skip
TINY = WIDTHS | dict(
    vocab_size=512, hidden_size=64, num_attention_heads=4, head_dim=16, moe_intermediate_size=32, num_experts=8,
    num_experts_per_tok=2,
)  # fmt: skip


def build(auto, widths, layers, dtype, device, **options):
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(Qwen3MoeConfig(num_hidden_layers=layers, **widths), dtype=dtype, **options).train()


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gradients(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def parity(widths, tokens, device):
    """Loss and gradient errors of both sides in bf16 against stock in float32 (eager); same weights, 2 layers."""
    reference = build(StockAuto, widths, 2, torch.float32, device, experts_implementation="eager")
    for name, parameter in reference.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)  # clear choices: near-ties that flip in bf16 would hide the rest
        parameter.data = parameter.data.bfloat16().float()
    weights = {name: p.detach().bfloat16() for name, p in reference.named_parameters()}
    ids = torch.randint(0, widths["vocab_size"], (1, tokens), device=device)
    want_loss, want = gradients(reference, ids)
    want = {name: grad.cpu() for name, grad in want.items()}
    del reference
    release()
    rows = {}
    for arm, auto in (("stock", StockAuto), ("expertmesh", AutoModelForCausalLM)):
        model = build(auto, widths, 2, torch.bfloat16, device)
        model.load_state_dict(weights)
        loss, got = gradients(model, ids)
        errors = {name: ((got[name].float().cpu() - w).norm() / w.norm()).item() for name, w in want.items()}
        rows[arm] = {"loss_error": abs(loss - want_loss) / want_loss, "gradient_errors": errors}
        del model, got
        release()
    ratios = {n: rows["expertmesh"]["gradient_errors"][n] / rows["stock"]["gradient_errors"][n] for n in want}
    rows["worst_ratio"] = max(ratios.values())
    rows["worst_tensor"] = max(ratios, key=ratios.get)
    return rows


def time_arm(model, vocab, batch, seq, device, warmup=3, repeats=7):
    ids = torch.randint(0, vocab, (batch, seq), device=device)
    forward, backward = [], []
    for i in range(warmup + repeats):
        if i == warmup:
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        loss = model(input_ids=ids, labels=ids).loss
        marks[1].record()
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        if i >= warmup:
            forward.append(marks[0].elapsed_time(marks[1]))
            backward.append(marks[1].elapsed_time(marks[2]))
    f, b = statistics.median(forward), statistics.median(backward)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "forward_ms": round(f, 2),
        "backward_ms": round(b, 2),
        "tokens_per_second_per_gpu": round(batch * seq / (f + b) * 1e3),
        "peak_gib": round(peak, 2),
    }


def count_host_syncs(model, vocab, device):
    """Run one step in which any wait for the device is an error; returns the message of the first, or None."""
    ids = torch.randint(0, vocab, (1, 4096), device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids, labels=ids).loss.backward()
    except RuntimeError as error:
        return "".join(traceback.format_exception(error)[-5:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def profile(model, vocab, batch, seq, device, rows=30):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    ids = torch.randint(0, vocab, (batch, seq), device=device)
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    print(f"  device total {total / 1e3:.1f} ms, {sum(e.count for e in events)} kernels")
    table = []
    for e in events[:rows]:
        table.append({"kernel": e.key[:120], "ms": round(e.self_device_time_total / 1e3, 3), "count": e.count})
        print(f"  {table[-1]['ms']:8.2f} ms x{e.count:5d} {e.key[:100]}")
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--arms", nargs="+", default=["stock", "stock-compiled", "expertmesh"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--commit", default="")
    parser.add_argument("--tiny", action="store_true", help="dry run of the parity part on the CPU")
    options = parser.parse_args()
    if options.tiny:
        print(json.dumps(parity(TINY, 64, "cpu"), indent=1)[:600])
        return
    device, vocab = "cuda", WIDTHS["vocab_size"]
    commit = (
        options.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    import triton

    result = {
        "hardware": torch.cuda.get_device_name(), "gpus": 1, "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "commit": commit, "command": " ".join(["python", *sys.argv]),
        "parity": parity(WIDTHS, 2048, device), "rows": [], "profiles": {},
    }  # fmt: skip
    p = result["parity"]
    print(f"parity: loss error stock {p['stock']['loss_error']:.1e} ours {p['expertmesh']['loss_error']:.1e}; "
          f"worst gradient error ratio {p['worst_ratio']:.2f} ({p['worst_tensor']})", flush=True)  # fmt: skip
    for arm in options.arms:
        auto = AutoModelForCausalLM if arm.startswith("expertmesh") else StockAuto
        model = build(auto, WIDTHS, options.layers, torch.bfloat16, device)
        if arm.endswith("-compiled"):
            for layer in model.model.layers:
                layer.compile()
        for batch in options.batches:
            row = {"work": "qwen3-30b-a3b", "arm": arm, "layers": options.layers, "batch": batch, "seq": options.seq,
                   "routing": "random-init", **time_arm(model, vocab, batch, options.seq, device)}  # fmt: skip
            if arm.startswith("expertmesh"):
                row["host_syncs"] = count_host_syncs(model, vocab, device)
            result["rows"].append(row)
            print({k: row[k] for k in row if k not in ("work", "layers", "seq", "routing")}, flush=True)
        if options.profile and not arm.endswith("-compiled"):
            result["profiles"][arm] = profile(model, vocab, options.batches[-1], options.seq, device)
        del model
        release()
        os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
