"""What ranks do with a bfloat16 model whose routers may be float32."""

from pathlib import Path
from typing import Any

import torch

import expertmesh
from expertmesh.parallel.clip import clip_grad_norm
from tests.distributed.work import Case, full, load, loss_of, train
from tests.models import saved


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def step_and_save(rank: int, family: str, layout: dict[str, Any], out: Path) -> dict[str, Any]:
    """Gradients of a batch, norms of two steps by each optimizer, and how the model looks before and after."""
    folder, results = saved(family, torch.bfloat16), {}
    for name, clip in (("torch", clip_grad_norm), ("ours", None)):
        model, setup = load(folder, Case(layout), torch.bfloat16)
        results["loaded"] = dtypes(model)
        loss_of(model, setup, rank).backward()
        results["gradients"] = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        before = {n: full(p.detach()).clone() for n, p in model.named_parameters()}
        results[name] = train(model, 2, lambda m=model, s=setup: loss_of(m, s, rank).backward(), clip)
        after = {n: full(p.detach()) for n, p in model.named_parameters()}
        results["moved"] = {n for n in after if not torch.equal(before[n], after[n])}
    assert dtypes(model) == results["loaded"]
    model.save_pretrained(out)
    return results | {"weights": after}


def new(rank: int, family: str, layout: dict[str, Any]) -> dict[str, torch.dtype]:
    """The dtypes of a model that is made, not loaded, after a step."""
    config = load(saved(family, torch.bfloat16), Case({}))[0].config
    config.distributed_config = None
    setup = expertmesh.DistributedSetup(**layout)
    model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, distributed_setup=setup)
    train(model.train(), 1, lambda: loss_of(model, setup, rank).backward(), None)
    return dtypes(model)
