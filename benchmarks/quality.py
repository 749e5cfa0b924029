"""What low-memory states of AdamW and gradient release do to a model: trained on real text, by held-out loss.

    python benchmarks/quality.py --out benchmarks/results/h200_quality.json

A Qwen3-MoE of 47 million bfloat16 weights (32 experts, 4 of them for each token) learns the sources of Python's
standard library; one file of twenty is held out. Arms: AdamW's states in float32, 24 or 8 bits, each with gradients
that stand until the optimizer's step, and released within backward (`running`). Arms of a seed have the same first
weights and the same batches. Runs are processes, `--workers` at a time.
"""

import math
import random
import sysconfig
import zlib
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, parser
from transformers import Qwen3MoeConfig

import expertmesh
from expertmesh.data import demo_tokenizer
from expertmesh.data.tokenizer import VOCABULARY

STATES, RELEASES, SEEDS = ("float32", "24bit", "8bit"), (None, "running"), (0, 1, 2)
PEAK_LR, WARM_UP, MAX_NORM, WEIGHT_DECAY = 1e-3, 100, 1.0, 0.1
SIZES = {"hidden_size": 384, "moe_intermediate_size": 192, "num_hidden_layers": 6, "num_experts": 32,
         "num_experts_per_tok": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
TINY = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
CURVE_POINTS = 20


def text_tokens(folder: Path, seq: int, tiny: bool) -> None:
    """Writes rows of tokens [rows, seq] as train.pt and held-out.pt: files behind one another, each with an end."""
    tokenizer = demo_tokenizer()
    rows: dict[str, list[int]] = {"train": [], "held-out": []}
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    for path in files[:16] if tiny else files:
        name = path.relative_to(library).as_posix()
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # tests of other encodings
            continue
        part = "held-out" if zlib.crc32(name.encode()) % (4 if tiny else 20) == 0 else "train"
        rows[part] += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for part, tokens in rows.items():
        whole = len(tokens) // seq
        torch.save(torch.tensor(tokens[: whole * seq], dtype=torch.int32).view(whole, seq), folder / f"{part}.pt")


def rate(step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to a tenth."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * (0.55 + 0.45 * math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor, batch: int) -> float:
    model.eval()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.float() * len(ids) for ids in rows.split(batch)]
    model.train()
    return round(sum(loss.item() for loss in losses) / len(rows), 5)


def run(
    folder: Path, tiny: bool, states: str, release: str | None, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """The row of one run: held-out loss at the end, and both losses on the way."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**(TINY if tiny else SIZES), vocab_size=VOCABULARY, rope_theta=1e4)
    with torch.device(DEVICE):
        model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=DTYPE).train()
    train, held_out = (torch.load(folder / f"{part}.pt").long().to(DEVICE) for part in ("train", "held-out"))
    rows = [row for _ in range(steps * batch // len(train) + 1) for row in torch.randperm(len(train)).tolist()]
    optimizer = expertmesh.AdamW(
        model.parameters(),
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
        states=states,
    )
    released = expertmesh.GradientRelease(optimizer, release) if release else None
    curve, every = [], max(steps // CURVE_POINTS, 1)
    for step in range(steps):
        ids = train[rows[step * batch : (step + 1) * batch]]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        forward = lambda ids=ids: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        if released:
            loss = released.backward(forward)
        else:
            loss = forward()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            point = held_out_loss(model, held_out[: 4 * batch], batch)
            curve.append({"step": step + 1, "train": round(loss.item(), 5), "held_out": point})
    row = {"arm": states + (f"-{release}" if release else ""), "states": states, "release": release, "seed": seed}
    size = sum(parameter.numel() for parameter in model.parameters())
    return row | {"parameters": size, "held_out_loss": held_out_loss(model, held_out, batch), "curve": curve}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--batch", type=int, default=16, help="rows of a step")
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--workers", type=int, default=9)
    options.add_argument("--folder", default="/tmp/quality", help="of the tokens")
    options = options.parse_args()
    if options.tiny:
        options.steps, options.batch, options.seq, options.seeds = 10, 2, 64, [0]
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    text_tokens(folder, options.seq, options.tiny)
    result = Result(options, steps=options.steps, batch=options.batch, seq=options.seq)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        job = folder, options.tiny
        pool.submit(run, *job, STATES[0], None, 0, 2, options.batch).result()  # compiles for all
        arms = list(product(options.seeds, STATES, RELEASES))
        random.Random(0).shuffle(arms)  # a worker's runs are of all kinds
        runs = [pool.submit(run, *job, states, how, seed, options.steps, options.batch) for seed, states, how in arms]
        for finished in runs:
            result.add(finished.result())


if __name__ == "__main__":
    main()
