"""Measure the effect of AdamW's low-memory states and gradient release on the held-out loss, with real text.

    python benchmarks/quality.py --out benchmarks/results/h200_quality.json

A Qwen3-MoE with 28 million bfloat16 weights (top-4 of 32 experts) trains on the Python sources of the standard library,
PyTorch and Transformers, without repeating a row; every 20th row is held out. The arms are AdamW's states in float32,
24 or 8 bits, each with gradients kept until the optimizer step and with gradients released within the backward
(`running`). All arms of a seed have the same initial weights and batches. On a GPU a whole step is one CUDA graph, and
`--together` arms train concurrently, each on its own stream. `arms` of the result compares losses with `float32`.
"""

import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from shared import DEVICE, DTYPE, Result, parser

import expertmesh
from expertmesh.data import demo_tokenizer
from expertmesh.data.tokenizer import VOCABULARY
from expertmesh.memory import release as gradient_release
from expertmesh.train.graphed import GraphedStep

STATES, RELEASES, SEEDS = ("float32", "24bit", "8bit"), (None, "running"), (0, 1, 2)
PEAK_LR, WARM_UP, MAX_NORM, WEIGHT_DECAY = 5e-4, 100, 1.0, 0.1
SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 32,
         "num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
TINY = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
FOLDERS = [Path(sysconfig.get_paths()["stdlib"]), *(Path(each.__file__).parent for each in (torch, transformers))]
HELD_OUT = 20  # one of this many rows is held out
CURVE_POINTS, CURVE_ROWS, EVAL_ROWS = 10, 128, 64  # losses during training, their rows, rows per forward
Training = Generator[None, None, dict[str, Any]]  # runs one step per next(), and returns the row of the arm


def text(rows: int, seq: int) -> torch.Tensor:
    """Return tokens [rows, seq] of joined files, with EOS after each. Raise ValueError if the text is too short."""
    files = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))
             if "site-packages" not in path.relative_to(folder).parts]  # fmt: skip
    tokenizer, tokens = demo_tokenizer(), list[int]()
    for first in range(0, len(files), 256):
        texts = [path.read_text("utf-8", errors="replace") for path in files[first : first + 256]]
        for ids in tokenizer(texts)["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
        if len(tokens) >= rows * seq:
            return torch.tensor(tokens[: rows * seq]).view(rows, seq)
    raise ValueError(f"{len(files)} files have {len(tokens)} tokens, and {rows * seq} are to be learned: fewer steps.")


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to 0."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over all tokens, a scalar on the device."""
    model.eval()
    losses = [
        len(ids) * model(input_ids=ids, labels=ids, use_cache=False).loss.float() for ids in rows.split(EVAL_ROWS)
    ]
    model.train()
    return torch.stack(losses).sum() / len(rows)


def whole_step(model: Any, optimizer: expertmesh.AdamW, release: str | None) -> Callable[..., torch.Tensor]:
    """Return a function of a batch that runs forward, backward and update, and leaves no gradient."""
    released = expertmesh.GradientRelease(optimizer, release) if release else None  # type: ignore[arg-type]
    running = torch.zeros((), device=DEVICE)  # at a fixed address, for the CUDA graph

    def step(ids: torch.Tensor) -> torch.Tensor:
        if released:
            loss = released.backward(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
            (group,) = optimizer.param_groups
            running.copy_(group[gradient_release.RUNNING])
            group[gradient_release.RUNNING] = running
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def training(data: torch.Tensor, sizes: dict, states: str, release: str | None, seed: int, batch: int) -> Training:
    """Train one arm on all rows of data that are not held out, one step per next()."""
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        **sizes, vocab_size=VOCABULARY, rope_theta=1e4, initializer_range=sizes["hidden_size"] ** -0.5
    )
    with torch.device(DEVICE):
        model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=DTYPE).train()
    # update each stack of experts alone within the backward, as for large models
    gradient_release.BYTES = min(weight.nbytes for weight in model.parameters() if weight.ndim == 3)
    lr = torch.zeros((), device=DEVICE)
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM}
    run = whole_step(model, expertmesh.AdamW(model.parameters(), lr=lr, states=states, **options), release)
    step_on = GraphedStep(model, run) if DEVICE == "cuda" else run
    is_held_out = torch.arange(len(data), device=DEVICE) % HELD_OUT == 0
    held_out, train = data[is_held_out], data[~is_held_out]
    batches = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(DEVICE).split(batch)
    curve, since, summed, begin = [], 0, torch.zeros((), device=DEVICE), time.perf_counter()
    for step, rows in enumerate(batches, 1):
        lr.fill_(rate(step - 1, len(batches)))
        summed += step_on(ids=train[rows])
        if step * CURVE_POINTS // len(batches) > (step - 1) * CURVE_POINTS // len(batches):
            curve.append((step, summed / (step - since), held_out_loss(model, held_out[:CURVE_ROWS])))
            since, summed = step, torch.zeros_like(summed)
        yield
    final = round(held_out_loss(model, held_out).item(), 5)
    if isinstance(step_on, GraphedStep):
        step_on.close()
    names = "step", "train", "held_out"
    points = [dict(zip(names, (step, *(round(x.item(), 5) for x in losses)), strict=True)) for step, *losses in curve]
    row = {"arm": states + (f"-{release}" if release else ""), "states": states, "release": release, "seed": seed}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(time.perf_counter() - begin, 1)}
    return row | {"held_out_loss": final, "curve": points}


def together(runs: list[Training]) -> Iterator[dict[str, Any]]:
    """Yield the rows of runs whose steps are interleaved, each on its own stream."""
    on = {run: torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext() for run in runs}
    while on:
        for run, stream in list(on.items()):
            try:
                with stream:
                    next(run)
            except StopIteration as end:
                del on[run]
                yield end.value


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each arm's mean over seeds, and its difference in percent from float32 with gradients kept."""
    base = {row["seed"]: row["held_out_loss"] for row in rows if row["arm"] == STATES[0]}
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        losses = {row["seed"]: row["held_out_loss"] for row in rows if row["arm"] == arm}
        above = [round(100 * (loss / base[seed] - 1), 3) for seed, loss in losses.items()]
        mean = statistics.mean(losses.values())
        percent = round(100 * (mean / statistics.mean(base[seed] for seed in losses) - 1), 3)
        found.append({"arm": arm, "held_out_loss": round(mean, 5), "percent_above": percent, "of_seeds": above})
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--batch", type=int, default=16, help="rows of a step")
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--together", type=int, default=6, help="arms that train at the same time")
    options = options.parse_args()
    if options.tiny:
        options.steps, options.batch, options.seq, options.seeds = 10, 2, 64, [0]
    torch.set_num_threads(1)
    data = text(math.ceil(options.steps * options.batch / (1 - 1 / HELD_OUT)), options.seq).to(DEVICE)
    result = Result(options, steps=options.steps, batch=options.batch, seq=options.seq, peak_lr=PEAK_LR)
    for seed in options.seeds:
        arms = list(product(STATES, RELEASES))
        for first in range(0, len(arms), options.together):
            some = arms[first : first + options.together]
            sizes = TINY if options.tiny else SIZES
            for row in together([training(data, sizes, *arm, seed, options.batch) for arm in some]):
                result.add(row)
    result.content["arms"] = compared(result.content["rows"])
    result.save()
    print(*result.content["arms"], sep="\n")


if __name__ == "__main__":
    main()
