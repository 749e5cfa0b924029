"""Weights that are updated within backward are those of ordinary steps; gradients are gone when it ends."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import expertmesh
from expertmesh import backends
from expertmesh.bench.tiny import tiny_model
from expertmesh.fuse import fuse
from expertmesh.memory import release as module
from expertmesh.parallel.clip import grad_norm
from tests.distributed import work
from tests.distributed.ranks import on_ranks
from tests.models import saved

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """A few weights of a tiny model together, as a layer's norms and projections in a large one."""
    monkeypatch.setattr(module, "BYTES", 2**14)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (count, 2, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in ids]


def ordinary(model: torch.nn.Module, steps: int, **options: Any) -> list[torch.Tensor]:
    optimizer = expertmesh.AdamW(model.parameters(), **OPTIONS, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for batch in batches(steps):
        model(**batch).loss.backward()
        norms.append(grad_norm(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return norms


def released(model: torch.nn.Module, steps: int, clipping: Any = "running", **options: Any) -> list[torch.Tensor]:
    optimizer = expertmesh.AdamW(model.parameters(), **OPTIONS, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    release, norms = expertmesh.GradientRelease(optimizer, clipping), []
    for batch in batches(steps):
        release.backward(lambda batch=batch: model(**batch).loss)
        assert all(p.grad is None for p in model.parameters()), "freed before the step"
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
        scheduler.step()
    return norms


def recomputed(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def frozen(model: Any) -> None:
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "plain": ({}, lambda model: None),
    "tied": ({"tie_word_embeddings": True}, lambda model: None),
    "frozen": ({}, frozen),
    "recomputed": ({}, recomputed),
    "pieces recomputed": ({}, lambda model: model.activation_checkpointing_enable({"recompute": {"experts": 2}})),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_are_those_of_ordinary_steps_bit_for_bit(kind, monkeypatch):
    options, change = CHANGES[kind]
    ours = fuse(tiny_model("qwen3_moe", **options)).train()
    change(ours)
    theirs = copy.deepcopy(ours)
    before = copy.deepcopy(ours.state_dict())
    standing: list[int] = []
    plain = module.GradientRelease._release

    def watched(self, place, parameters):
        standing.append(sum(p.grad.nbytes for p in ours.parameters() if p.grad is not None))
        plain(self, place, parameters)

    monkeypatch.setattr(module.GradientRelease, "_release", watched)
    norms = zip(released(ours, 3), ordinary(theirs, 3), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in norms)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, before[name]) != a.requires_grad, name
    largest = max(p.nbytes for p in ours.parameters())
    assert len(standing) > 3 and max(standing) < module.BYTES + largest
    total = sum(p.nbytes for p in ours.parameters() if p.requires_grad)
    assert max(standing) < total / 3, "not all at once"


@pytest.mark.parametrize("max_norm", [0.05, 1e4], ids=["clips", "leaves"])
def test_exact_clipping_is_that_of_ordinary_steps(max_norm):
    """The second forward draws the random numbers of the first, or the norm would be another gradient's."""
    ours = fuse(tiny_model("qwen3_moe", attention_dropout=0.2)).train()
    theirs = copy.deepcopy(ours)
    torch.manual_seed(3)
    norms = released(ours, 3, "exact", max_grad_norm=max_norm)
    torch.manual_seed(3)
    torch.testing.assert_close(norms, ordinary(theirs, 3, max_grad_norm=max_norm), rtol=1e-6, atol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


class Weights(torch.nn.Module):
    """A loss whose gradients are given: the last weight's comes first."""

    def __init__(self, count: int = 2):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.ones(4) for _ in range(count))
        self.calls = 0

    def forward(self, *factors: float) -> torch.Tensor:
        self.calls += 1
        loss = torch.zeros(())
        for weight, factor in zip(self.weights, factors, strict=True):
            loss = loss + (weight * factor).sum()
        return loss


def pair(**options: Any) -> tuple[Weights, expertmesh.AdamW, expertmesh.GradientRelease]:
    model = Weights()
    clipping = options.pop("clipping", "running")
    optimizer = expertmesh.AdamW(model.parameters(), **OPTIONS, **options)
    return model, optimizer, expertmesh.GradientRelease(optimizer, clipping)


def test_running_clipping_is_by_the_formula_and_holds_a_spike_down(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 1)
    model, optimizer, release = pair(max_grad_norm=1.0)
    used: list[float] = []
    update = optimizer.update

    def noted(pairs, scale, found_inf):
        if pairs:
            used.append(float(scale))
        update(pairs, scale, found_inf)

    monkeypatch.setattr(optimizer, "update", noted)
    running, calls = None, 0
    for first, last in ((1.0, 2.0), (0.5, 1.0), (30.0, 40.0), (1.0, 1.0), (0.0, 0.0), (0.1, 0.1)):
        used.clear()
        release.backward(lambda first=first, last=last: model(first, last))
        optimizer.step()
        seen = [2 * last, 2 * (first**2 + last**2) ** 0.5]  # of 4 elements each, the last weight's first
        norm = seen[1]
        calls += 1 + (running is None)
        assert model.calls == calls, "only the first step measures"
        against = [norm, norm] if running is None else [max(running, part) for part in seen]
        assert used == pytest.approx([min(1.0, 1 / max(x, 1e-12)) for x in against], rel=1e-4)
        assert float(optimizer.grad_norm) == pytest.approx(norm)
        if norm > 0:
            running = norm if running is None else running * (norm / running) ** (1 - module.MEMORY)
        assert float(optimizer.param_groups[0]["running_norm"]) == pytest.approx(running, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "clipping": "exact"}], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(options):
    model, optimizer, release = pair(**options)
    state = copy.deepcopy
    for bad in (False, True, False, True):
        before = state((model.state_dict(), optimizer.state_dict()["state"]))
        loss = release.backward(lambda bad=bad: model(1.0, 2.0) + (float("inf") if bad else 0.0))
        assert not bad or not release.changed()
        optimizer.step()
        after = model.state_dict(), optimizer.state_dict()["state"]
        same = all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
        assert same == bad and torch.isfinite(loss) != bad and torch.isfinite(optimizer.grad_norm) != bad
        if bad:
            assert all(torch.equal(before[1][i][k], after[1][i][k]) for i in before[1] for k in before[1][i])


@pytest.mark.parametrize("clipping", ["running", "exact"])
def test_a_gradient_that_is_not_finite_stops_what_comes_after_it(clipping, monkeypatch):
    monkeypatch.setattr(module, "BYTES", 1)
    model, optimizer, release = pair(max_grad_norm=1.0, clipping=clipping)
    release.backward(lambda: model(1.0, 1.0))
    optimizer.step()
    before = [weight.detach().clone() for weight in model.weights]
    model.weights[0].register_hook(lambda gradient: gradient * float("nan"))
    release.backward(lambda: model(1.0, 1.0))
    assert release.changed() == (clipping == "running")
    optimizer.step()
    assert not torch.isfinite(optimizer.grad_norm)
    kept = [torch.equal(a, b) for a, b in zip(before, model.weights, strict=True)]
    assert kept == [True, clipping == "exact"], "the last weight's gradient came first"
    assert torch.isfinite(optimizer.param_groups[0].get("running_norm", torch.ones(())))


def test_what_cannot_be_combined_is_refused(monkeypatch):
    model, optimizer, release = pair(max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"without release.backward"):
        optimizer.step()
    model(1.0, 1.0).backward()
    with pytest.raises(RuntimeError, match=r"release.backward\(forward\) in place of loss.backward"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"in place of loss.backward"):
        release.backward(lambda: model(1.0, 1.0))
    optimizer.zero_grad()
    release.backward(lambda: model(1.0, 1.0))
    with pytest.raises(RuntimeError, match="cannot accumulate"):
        release.backward(lambda: model(1.0, 1.0))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 1.0)
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(ValueError, match="GradScaler"):
        optimizer.step()
    del optimizer.grad_scale
    optimizer.step()
    with pytest.raises(ValueError, match="not to SGD"):
        expertmesh.GradientRelease(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="'runing'"):
        expertmesh.GradientRelease(optimizer, "runing")
    with pytest.raises(ValueError, match="set max_grad_norm"):
        expertmesh.GradientRelease(expertmesh.AdamW(model.parameters()), "exact")
    release.close()
    for bound in (0.5, 3.0):
        other = expertmesh.GradientRelease(optimizer, "exact", bound)
        assert other.max_grad_norm == min(bound, 1.0), "the smaller of both"
        other.close()
    model(1.0, 1.0).backward()
    optimizer.step()
    assert model.weights[0].grad is not None, "as ever, once it is closed"


def test_an_error_leaves_no_gradient_behind(monkeypatch):
    model, optimizer, release = pair()

    def broken(_: torch.Tensor) -> None:
        raise OSError("broken")

    hook = model.weights[0].register_hook(broken)
    with pytest.raises(OSError, match="broken"):
        release.backward(lambda: model(1.0, 1.0))
    hook.remove()
    release.backward(lambda: model(1.0, 1.0))
    optimizer.step()


def test_a_weight_that_is_needed_later_or_gets_more_is_an_error_not_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 1)
    model, _, release = pair()
    first, last = model.weights

    def beside_the_graph() -> torch.Tensor:
        x = first * last.detach()  # its backward needs the weight that is updated before
        return (x * last).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        release.backward(beside_the_graph)

    def reentrant() -> torch.Tensor:
        x = torch.ones(4, requires_grad=True)
        for _ in range(2):
            x = checkpoint(lambda x: x * first, x, use_reentrant=True)
        return x.sum()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        release.backward(reentrant)


def test_the_running_norm_is_saved_with_the_optimizer(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 1)
    model, optimizer, release = pair(max_grad_norm=1.0)
    for factor in (1.0, 3.0):
        release.backward(lambda factor=factor: model(factor, factor))
        optimizer.step()
    again, other, resumed = pair(max_grad_norm=1.0)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its, each_release in ((model, optimizer, release), (again, other, resumed)):
        each_release.backward(lambda each=each: each(2.0, 1.0))
        its.step()
    assert again.calls == 1, "nothing to measure first"
    assert all(torch.equal(a, b) for a, b in zip(model.weights, again.weights, strict=True))


@pytest.mark.parametrize("states", [None, "8bit"])
def test_a_large_weight_takes_four_launches_and_hardly_another_operation(states, monkeypatch):
    """What a step of thousands of experts asks of the CPU within backward."""
    weights = [torch.nn.Parameter(torch.ones(32, 256, dtype=torch.bfloat16)) for _ in range(4)]
    optimizer = expertmesh.AdamW(weights, **OPTIONS, max_grad_norm=1.0, states=states)
    release = expertmesh.GradientRelease(optimizer)
    optimizer.param_groups[0]["running_norm"] = torch.ones(())
    launches: list[str] = []
    counts: list[int] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += 1
            return func(*args, **kwargs or {})

    plain = module.GradientRelease._release

    def counted(self, place, parameters):
        counts.append(0)
        with Counted():
            plain(self, place, parameters)

    monkeypatch.setattr(module, "BYTES", 1)
    monkeypatch.setattr(module.GradientRelease, "_release", counted)
    monkeypatch.setattr(backends, "watching", (lambda kernel, *_, **__: launches.append(kernel.fn.__name__), 0))
    for _ in range(2):
        launches.clear()
        release.backward(lambda: sum(weight.float().sum() for weight in weights))
        optimizer.step()
    each = ["_squared_sum_kernel", "_tally_kernel", "_prepare_kernel", "_adamw_kernel"]
    assert launches == each * len(weights)
    assert max(counts[-3:]) <= 4, "of PyTorch's operations, each with a launch or an allocation"


LAYOUTS = [{}, {"ep_size": 2}, {"tp_size": 2}, {"dp_replicate_size": 2}]
OF_ALL = [(layout, clipping) for layout in LAYOUTS for clipping in ("running", "exact")]


@pytest.mark.parametrize("cases", [OF_ALL[:4:3], pytest.param(OF_ALL, marks=pytest.mark.slow)], ids=["two", "all"])
def test_ranks_agree_with_ordinary_steps(cases):
    for rank in on_ranks(2, work.released_steps, saved("qwen3_moe"), cases):
        for name, norm_error, weight_error, parameter in rank:
            assert norm_error <= 1e-6 and weight_error <= 2e-6, f"{name}: {norm_error}, {parameter} {weight_error}"


def test_weights_are_freed_with_all_that_trained_them():
    def train():
        model = fuse(tiny_model("qwen3_moe")).train()
        released(model, 1)
        return [weakref.ref(weight) for weight in model.parameters()]

    weights = train()
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize("states", ["8bit", "float32"])
def test_states_of_low_memory_are_those_of_ordinary_steps(states):
    model = fuse(tiny_model("qwen3_moe")).train().bfloat16()
    twin = copy.deepcopy(model)
    released(model, 3, max_grad_norm=None, states=states)
    ordinary(twin, 3, states=states)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
