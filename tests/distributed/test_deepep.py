"""`dispatch="deepep"` gives the gradients of all_to_all, with a stand-in for the package deep_ep; without it, an error.

The real package needs GPUs: nothing here shows that its kernels run.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from expertmesh import backends
from expertmesh.dispatch.all_to_all import AllToAll
from expertmesh.dispatch.deepep import DeepEP
from expertmesh.parallel import DistributedSetup
from tests.distributed import fake_deep_ep, work
from tests.distributed.ranks import on_ranks
from tests.distributed.work import Case
from tests.models import saved

LAYOUT = {"ep_size": 2}
CASES = [
    Case(LAYOUT),
    Case(LAYOUT, recompute=True, force=(0, 1)),  # nothing for rank 1
    Case(LAYOUT, recompute=True, force=(5, 5)),  # all for one expert of rank 1
]
NUM_MOE_LAYERS = 2


def gradients(rank: int, folder: Path, case: Case, dispatch: str) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a step in bfloat16."""
    setup = case.setup | {"dispatch": dispatch}
    model, setup = work.load(folder, Case(setup, case.recompute, case.force), torch.bfloat16)
    loss = work.loss_of(model, setup, rank)
    loss.backward()
    return {"loss": loss.detach()} | {n: work.full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def step_errors(rank: int, folder: Path) -> list[tuple[float, str, dict[str, int]]]:
    """For every case: the largest difference to all_to_all, where it is, and deep_ep's calls."""
    fake_deep_ep.install()
    results = []
    for case in CASES:
        want = gradients(rank, folder, case, "all_to_all")
        fake_deep_ep.calls.clear()
        results.append((*work.worst(gradients(rank, folder, case, "deepep"), want), dict(fake_deep_ep.calls)))
    return results


def layers(rank: int, tokens_of_ranks: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """One layer's output and gradients on this rank: [those of all_to_all, those of deepep, …]."""
    fake_deep_ep.install()
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    made = []
    for tokens in tokens_of_ranks:
        for implementation in (AllToAll, DeepEP):
            module = work.experts_of(8, slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)).to(torch.bfloat16)
            x, ids, weights, dout = work.layer_inputs(tokens[rank], None, seed=rank)
            x = x.detach().to(torch.bfloat16).requires_grad_()
            out = implementation(module, mesh["ep"], mesh["tp"])(x, ids, weights)
            out.backward(dout.to(out.dtype))
            made.append([out.detach(), x.grad, weights.grad, module.gate_up_proj.grad, module.down_proj.grad])
    return made


def buffers(rank: int) -> list[int]:
    """How many buffers were made after rows of 8, 16, 8, 16 values, of two layers each; and the bytes of the last."""
    fake_deep_ep.install()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    made = [DeepEP(work.experts_of(8, slice(0, 4)), mesh["ep"], mesh["tp"]) for _ in range(2)]
    counts = []
    for width in (8, 16, 8, 16):
        last = [layer.buffer(torch.empty(0, width, dtype=torch.bfloat16)) for layer in made]
        counts.append(fake_deep_ep.calls["buffers"])
    assert last[0] is last[1]
    return [*counts, last[0].num_nvl_bytes]


def error_in_float32(rank: int, folder: Path) -> str:
    fake_deep_ep.install()
    model, setup = work.load(folder, Case(LAYOUT | {"dispatch": "deepep"}))
    try:
        work.loss_of(model, setup, rank)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_step_has_the_gradients_of_all_to_all_and_a_recompute_asks_for_no_layout():
    for rank in on_ranks(2, step_errors, saved("qwen3_moe")):
        for case, (error, parameter, calls) in zip(CASES, rank, strict=True):
            assert error == 0, f"{case}: {parameter} {error:.1e}"
            assert calls["layouts"] == calls["dispatches"] == NUM_MOE_LAYERS
            assert calls["dispatches by handle"] == NUM_MOE_LAYERS * (2 if case.recompute else 1)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_layer_with_any_number_of_tokens_anywhere(num_ranks):
    tokens = [(6, 0, 5, 1), (0, 4, 0, 0), (0, 0, 0, 0), (1, 9, 2, 2)]
    for rank in on_ranks(num_ranks, layers, tokens):
        for want, got in zip(rank[::2], rank[1::2], strict=True):
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layers_share_a_buffer_that_grows_with_the_width_of_rows():
    assert on_ranks(2, buffers) == [[1, 2, 2, 2, 256 * 2 * 16 * 2]] * 2


def test_float32_is_an_error_that_says_what_to_do():
    for error in on_ranks(2, error_in_float32, saved("qwen3_moe")):
        assert error.startswith("dispatch='deepep' carries bfloat16, not torch.float32: load the model with dtype=")


def test_without_the_package_a_setup_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match=r"Install deep_ep from \S+ .* or set dispatch to 'all_to_all'"):
        DistributedSetup(dispatch="deepep", world_size=8)


def test_group_sizes_are_the_packages_and_auto_never_takes_it(monkeypatch):
    monkeypatch.setattr(backends, "deep_ep", lambda: fake_deep_ep)
    with pytest.raises(ValueError, match="ep_size=6: Unsupported number of EP ranks: 6"):
        DistributedSetup(dispatch="deepep", ep_size=6, world_size=6)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for ep_size in (1, 2, 4, 8, 16):
        asked = DistributedSetup(dispatch="deepep", ep_size=ep_size).to_transformers()
        assert asked.ep_implementation == "expertmesh-deepep"
        for gpus in (False, True):
            monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus)
            chosen = DistributedSetup(dispatch="auto", ep_size=ep_size).to_transformers().ep_implementation
            assert chosen != asked.ep_implementation
