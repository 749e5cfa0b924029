"""A hand-written training loop on any layout, for the tests to interrupt: `python loop.py '{"steps": 4, ...}'`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import expertmesh
from expertmesh.bench.tiny import tiny_model
from expertmesh.checkpoint.publish import newest_complete
from expertmesh.checkpoint.state import BackgroundSaver, load_checkpoint, save_checkpoint


def start(ranks: int, **options) -> subprocess.Popen:
    """The loop in `ranks` processes of its own; `options` as in `loop`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = (command if ranks > 1 else [sys.executable]) + [__file__, json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on(rank: int, options: dict) -> None:
    """`loop`, for `on_ranks`."""
    loop(**options)


def finish(process: subprocess.Popen) -> None:
    """Wait for it; it must have ended well."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:] + errors[-6000:]


def source(folder: Path, family: str) -> Path:
    """The checkpoint that every loop starts from, with tied weights and dropout."""
    path = folder / family
    if not path.exists():
        tiny_model(family, tie_word_embeddings=True, attention_dropout=0.1).save_pretrained(path)
    return path


def loop(
    source: str,
    steps: int,
    output: str = "",
    layout: dict | None = None,
    save_every: int = 0,
    background: bool = False,
    resume: str | None = None,
    dump: str | None = None,
    dump_loaded: str | None = None,
    optimizer: str = "AdamW",
    dtype: str = "float32",
) -> None:
    """Trains for `steps` optimizer steps. resume: a checkpoint, or "newest". dump, dump_loaded: files for all
    that must agree, after the last step and before the first.
    """
    transformers.set_seed(int(os.environ.get("RANK", 0)))
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    model = expertmesh.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).train()
    optim = {"ours": expertmesh.AdamW}.get(optimizer) or getattr(torch.optim, optimizer)
    optim = optim(groups(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
    step, losses = 0, []
    last = newest_complete(output) if resume == "newest" else resume
    if last:
        resumed = load_checkpoint(last, model=model, optimizer=optim, scheduler=scheduler)
        step, losses = resumed.step, (resumed.extra or resumed.extras[0])["losses"]
    if dump_loaded:
        write(dump_loaded, model, optim, losses)
    saver = BackgroundSaver() if background else None
    if os.environ.get("RANK", "0") == "0":
        print("ready", flush=True)
    while step < steps:
        ids = torch.randint(0, 128, (2, 16))  # the next data: from the generators that are saved
        ids[0, 0], ids[0, 1] = random.randrange(128), np.random.randint(128)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        scheduler.step()
        step += 1
        losses.append(loss.item())
        if save_every and step % save_every == 0:
            what = {"model": model, "optimizer": optim, "scheduler": scheduler, "step": step, "keep": 2}
            extra = {"losses": losses}
            saver.save(output, **what, extra=extra) if saver else save_checkpoint(output, **what, extra=extra)
    if saver:
        saver.wait()
    if dump:
        write(dump, model, optim, losses)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def write(path: str, model, optim, losses: list[float]) -> None:
    """Rank 0 writes what must be the same in every layout."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: full(state) for parameter, state in optim.state.items()}
    rates = [group["lr"] for group in optim.param_groups]
    everything = {"losses": losses, "lr": rates[0], "weights": full(model.state_dict()), "optimizer": state}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(everything, path)


def groups(model) -> list[dict]:
    """One parameter group per mesh, and decay for matrices only."""
    found: dict = {}
    for parameter in model.parameters():
        key = (getattr(parameter, "device_mesh", None), parameter.ndim > 1)
        found.setdefault(key, []).append(parameter)
    return [{"params": members, "weight_decay": 0.1 * decay} for (_, decay), members in found.items()]


def full(state: dict) -> dict:
    """Every value of a state dict as it would be in one process."""
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


if __name__ == "__main__":
    loop(**json.loads(sys.argv[1]))
