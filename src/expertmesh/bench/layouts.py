"""Compare loss and gradients under layouts of several ranks with stock Transformers on one process.

`expertmesh check MODEL --ranks N` starts N processes on this machine (gloo, float32 on the CPU) and distributes the
model over them: plain FSDP2 and expert parallelism, with and without activation checkpointing. The ranks' batches
differ in length; stock gets all of them, one by one. Each tensor may differ by at most 1e-5 of its largest value.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as StockAutoModelForCausalLM

from expertmesh.bench.parity import CPU_TOLERANCE, without_mtp
from expertmesh.bench.rows import Row, relative_error, worst_error
from expertmesh.moe.experts import is_experts
from expertmesh.parallel.setup import DistributedSetup

_LENGTHS = (11, 7, 13, 5)  # uneven on purpose


def check_layouts(path: str | Path, num_ranks: int) -> list[Row]:
    """Return the rows of all layouts of `num_ranks` ranks that fit the checkpoint at `path` (a directory or Hub id)."""
    stock: Any = StockAutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    experts: list[Any] = [module for module in stock.modules() if is_experts(module)]
    divisible = experts and all(module.num_experts % num_ranks == 0 for module in experts)
    layouts = [1, num_ranks] if divisible else [1]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_on_one_process(stock, num_ranks), Path(folder, "stock.pt"))
        del stock
        # this process hosts the store, so that the port is bound before the ranks start
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.start_processes(_rank, (num_ranks, store.port, folder, str(path), layouts), num_ranks, start_method="spawn")
        return torch.load(Path(folder, "rows.pt"), weights_only=False)


def _batches(vocab_size: int, num_ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab_size, (2, _LENGTHS[rank % len(_LENGTHS)]), generator=generator)
        for rank in range(num_ranks)
    ]


def _loss(model: Any, batch: torch.Tensor, batches: list[torch.Tensor]) -> torch.Tensor:
    labelled = sum(2 * (other.shape[1] - 1) for other in batches)
    return model(input_ids=batch, labels=batch, num_items_in_batch=labelled, use_cache=False).loss


def _on_one_process(model: Any, num_ranks: int) -> dict[str, Any]:
    batches = _batches(model.config.get_text_config().vocab_size, num_ranks)
    model.train()
    total = torch.zeros(())
    for batch in batches:
        loss = _loss(model, batch, batches)
        loss.backward()
        total += loss.detach()
    return {"loss": total, "gradients": {name: p.grad for name, p in model.named_parameters()}}


def become_rank(rank: int, num_ranks: int, port: int) -> None:
    """Make this process a rank of this machine, with one CPU thread. A TCPStore must listen on `port`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)


def _rank(rank: int, num_ranks: int, port: int, folder: str, path: str, layouts: list[int]) -> None:
    become_rank(rank, num_ranks, port)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    want = torch.load(Path(folder, "stock.pt"))
    rows = []
    for ep_size in layouts:
        for recompute in (False, True):
            rows += _compare(path, rank, DistributedSetup(ep_size=ep_size, activation_checkpointing=recompute), want)
    if rank == 0:
        torch.save(rows, Path(folder, "rows.pt"))
    dist.destroy_process_group()


def _compare(path: str, rank: int, setup: DistributedSetup, want: dict[str, Any]) -> list[Row]:
    from expertmesh import AutoModelForCausalLM

    options: dict[str, Any] = {"distributed_setup": setup} | without_mtp(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).train()
    batches = _batches(model.config.get_text_config().vocab_size, dist.get_world_size())
    loss = _loss(model, batches[rank], batches)
    (loss * dist.get_world_size()).backward()  # data-parallel ranks average gradients
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
    error, where = worst_error(gradients, want["gradients"])
    name = f"fsdp {setup.fsdp_size}, ep {setup.ep_size}{', recomputed' * bool(setup.activation_checkpointing)}"
    return [
        Row(name, "loss", relative_error(total, want["loss"]), CPU_TOLERANCE),
        Row(name, "gradients", error, CPU_TOLERANCE, where),
    ]


def _whole(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
