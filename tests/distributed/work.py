"""What ranks do in the parity tests, and the same on one process with stock Transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import expertmesh
from expertmesh.parallel import DistributedSetup

LENGTHS = (11, 7, 13, 5)  # tokens per data-parallel rank: uneven, and no multiple of anything


@dataclass(frozen=True)
class Case:
    """One run of a layout. force: the expert ids that every token gets, or None for the router's own."""

    setup: dict[str, Any]
    recompute: bool = False
    force: tuple[int, ...] | None = None

    def __str__(self) -> str:
        sizes = " ".join(f"{k.removesuffix('_size')}{v}" for k, v in self.setup.items())
        return f"{sizes or 'fsdp'}{' recompute' * self.recompute}{f' force {self.force}' if self.force else ''}"


def batches(dp_size: int) -> list[torch.Tensor]:
    """One batch [2, S] for each data-parallel rank, S different for each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (2, LENGTHS[r % 4]), generator=generator) for r in range(dp_size)]


def num_items(dp_size: int) -> int:
    """Labelled tokens of all batches."""
    return sum(2 * (b.shape[1] - 1) for b in batches(dp_size))


def force_choices(model: Any, ids: tuple[int, ...] | None) -> None:
    """Let every token choose these experts; weights stay the router's."""
    if ids is None:
        return
    routers = [m for name, m in model.named_modules() if name.endswith(("mlp.gate", "mlp.router", "mixer.gate"))]
    routers = [m for m in routers if "Router" in type(m).__name__]
    assert routers

    def forced(_: Any, __: Any, out: tuple) -> tuple:
        logits, weights, chosen = out
        return logits, weights, torch.tensor(ids).to(chosen).expand_as(chosen).contiguous()

    for router in routers:
        router.register_forward_hook(forced)


def reference(model: Any, dp_size: int, force: tuple[int, ...] | None) -> dict[str, Any]:
    """Loss and gradients of all batches on one process."""
    force_choices(model.train(), force)
    model.zero_grad()
    loss = 0.0
    for batch in batches(dp_size):
        part = model(input_ids=batch, labels=batch, num_items_in_batch=num_items(dp_size), use_cache=False).loss
        part.backward()
        loss += part.item()
    return {"loss": loss, "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def load(folder: Path, case: Case) -> tuple[Any, DistributedSetup]:
    """The model laid out as the case says."""
    setup = DistributedSetup(**case.setup, activation_checkpointing=case.recompute)
    model = expertmesh.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_setup=setup)
    force_choices(model.train(), case.force)
    return model, setup


def full(x: torch.Tensor) -> torch.Tensor:
    """A whole tensor from its shards; every rank must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def loss_of(model: Any, setup: DistributedSetup, rank: int) -> torch.Tensor:
    """This rank's part of the loss, times the data-parallel ranks that FSDP divides gradients by."""
    batch = batches(setup.dp_size)[rank // setup.tp_size]
    items = num_items(setup.dp_size)
    loss = model(input_ids=batch, labels=batch, num_items_in_batch=items, use_cache=False).loss
    return loss * setup.dp_size


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor relative to its largest element, and the tensor's name."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    errors = [(float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-8)), n) for n in want]
    bad = [e for e in errors if e[0] != e[0]]
    return max(bad or errors)


def parity(rank: int, folder: Path, cases: list[Case], references: Path) -> list[tuple[str, float, float, str]]:
    """For every case: (name, loss error, worst gradient error, its parameter)."""
    results = []
    for case in cases:
        model, setup = load(folder, case)
        want = torch.load(references / f"{setup.dp_size}-{case.force}.pt")
        loss = loss_of(model, setup, rank)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        grads = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        error, name = worst(grads, want["grads"])
        results.append((str(case), abs(float(mean) - want["loss"]) / want["loss"], error, name))
    return results
