"""On a GPU: AdamW equals PyTorch's fused one, never waits, and is captured in a CUDA graph."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch

import expertmesh
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Many small ones, one of several chunks and an odd size, empty, dense in another order, with gaps, not aligned."""
    torch.manual_seed(0)
    tensors = [torch.randn(1 + 37 * i, device="cuda") for i in range(300)]
    tensors += [torch.randn(shape, device="cuda") for shape in ((3_000_017,), (64, 129, 257), (), (0, 4))]
    tensors = [tensor.to(dtype) for tensor in tensors]
    memory = torch.randn(2**20, device="cuda").to(dtype)
    tensors += [memory[1:70_001], memory[100_000:300_000].view(400, 500).T, memory[400_000:500_000:2]]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def twins(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    ours = parameters(dtype)
    return ours, [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in ours]


def set_grads(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        b.grad = torch.randn_like(b)
        a.grad = torch.empty_like(a).copy_(b.grad)


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], steps: int) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
        elif a.numel():  # a tie that is rounded the other way in one step stays through the next ones
            assert (a != b).float().mean() < 1e-3 * steps or (a != b).sum() <= 2
            torch.testing.assert_close(a, b, rtol=2**-7 * steps, atol=2e-3)  # a fifth of the learning rate


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lr", [1e-2, "tensor"])
def test_steps_equal_pytorchs_fused(lr):
    ours, theirs = twins(torch.float32)
    mine = expertmesh.AdamW(ours, lr=torch.tensor(1e-2, device="cuda") if lr == "tensor" else lr, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(4):
        set_grads(ours, theirs)
        with no_waiting() if step else contextlib.nullcontext():  # the first compiles
            mine.step()
        other.step()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert_close([mine.state[p][key] for p in ours], [other.state[p][key] for p in theirs], 4)
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], 4)


def test_steps_in_bfloat16_are_computed_exactly_and_rounded_once():
    """PyTorch's kernel rounds the moments before it uses them, and moves every fortieth weight to a neighbour."""
    ours = parameters(torch.bfloat16)
    exact = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    mine = expertmesh.AdamW(ours, **OPTIONS)
    for step in range(1, 5):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            weight, avg, square, grad = (x.double() for x in (*exact[i], p.grad))
            avg, square = 0.9 * avg + 0.1 * grad, 0.999 * square + 0.001 * grad**2
            denominator = (square / (1 - 0.999**step)).sqrt() + 1e-8
            weight = weight * (1 - 1e-3) - 1e-2 * avg / (1 - 0.9**step) / denominator
            exact[i] = tuple(x.bfloat16() for x in (weight, avg, square))
        mine.step()
    for place, key in enumerate((None, "exp_avg", "exp_avg_sq")):
        got = torch.cat([(p.detach() if key is None else mine.state[p][key]).flatten() for p in ours]).float()
        want = torch.cat([each[place].flatten() for each in exact]).float()
        assert (got != want).float().mean() < 0.01, key  # ties between two bfloat16 numbers
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2e-3)


def test_clipping_within_the_step_equals_pytorchs_and_never_waits():
    ours, theirs = twins(torch.float32)
    mine = expertmesh.AdamW(ours, **OPTIONS, max_grad_norm=1.0)
    other = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(3):
        set_grads(ours, theirs)
        with no_waiting() if step else contextlib.nullcontext():
            mine.step()
        torch.testing.assert_close(mine.grad_norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0), rtol=1e-5, atol=0)
        other.step()
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], 3)


def test_a_loss_scaler_skips_steps_without_a_wait():
    ours, theirs = twins(torch.float32)
    mine, other = expertmesh.AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for found in (0.0, 1.0, 0.0):
        set_grads(ours, theirs)
        for optimizer in (mine, other):
            optimizer.grad_scale = torch.tensor(4.0, device="cuda")
            optimizer.found_inf = torch.tensor(found, device="cuda")
        mine.step()
        other.step()
    assert all(mine.state[p]["step"] == 2 for p in ours)
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], 3)


def test_a_captured_step_is_replayed_with_other_gradients_and_learning_rates():
    ours, theirs = twins(torch.float32)
    lr = torch.tensor(1e-2, device="cuda")
    mine = expertmesh.AdamW(ours, lr=lr, weight_decay=0.1, max_grad_norm=1.0, capturable=True)
    other = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    grads = [torch.empty_like(p) for p in ours]

    def fill() -> None:
        set_grads(ours, theirs)
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.grad = grad.copy_(parameter.grad)

    def stock(rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        other.param_groups[0]["lr"] = rate
        other.step()

    fill()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mine.step()  # state and kernels are made before the capture
    torch.cuda.current_stream().wait_stream(side)
    stock(1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for rate in (1e-2, 3e-3, 1e-3):
        lr.fill_(rate)
        fill()
        graph.replay()
        stock(rate)
    mine.param_groups[0]["lr"] = 1e-3
    fill()
    mine.step()  # and eagerly again
    stock(1e-3)
    fill()
    mine.param_groups[0]["lr"] = lr
    graph.replay()
    stock(1e-3)
    assert all(mine.state[p]["step"] == 6 for p in ours)
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], 6)


def test_more_than_two_billion_elements_are_all_reached():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    weight = torch.nn.Parameter(torch.zeros(2**31 + 40_000, device="cuda", dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = expertmesh.AdamW([weight], lr=1.0, weight_decay=0.0, max_grad_norm=1e9)
    optimizer.step()
    assert weight.max() == weight.min() == -1.0
    torch.testing.assert_close(
        optimizer.grad_norm.double().cpu(), torch.tensor(2.0**31 + 40_000).double().sqrt(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("states", [None, "8bit", "24bit", "float32"])
def test_states_on_the_host_step_as_those_on_the_gpu(states):
    torch.manual_seed(0)
    weight = torch.randn(9, 2048, 2048, device="cuda").bfloat16()  # 72 MiB
    ours, theirs = torch.nn.Parameter(weight), torch.nn.Parameter(weight.clone())
    away, here = (expertmesh.AdamW([p], **OPTIONS, states=states, offload=p is ours) for p in (ours, theirs))
    for step in range(3):
        theirs.grad = torch.randn_like(theirs)
        ours.grad = theirs.grad.clone()
        before = torch.cuda.memory_allocated()
        with no_waiting() if step else contextlib.nullcontext():
            away.step()
        assert torch.cuda.memory_allocated() - before < 2**24, "the states are not on the GPU"
        here.step()
    assert torch.equal(ours, theirs)
    kept = away.state_dict()["state"][0]
    for key, value in here.state[theirs].items():
        if torch.is_tensor(value) and value.ndim:
            assert kept[key].is_pinned() and torch.equal(kept[key], value.cpu()), key


@pytest.mark.parametrize("states", ["8bit", "24bit", "float32"])
def test_low_memory_states_step_as_on_a_cpu_without_waiting_and_in_a_graph(states):
    """Rows of whole and of half blocks, of several chunks, and what keeps float32 states."""
    torch.manual_seed(0)
    shapes = [(300, 768), (96, 640), (8, 64, 256), (70_000,), (33, 129)]
    ours = [torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16()) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().cpu()) for p in ours]
    mine, other = (expertmesh.AdamW(ps, **OPTIONS, states=states, max_grad_norm=1.0) for ps in (ours, theirs))
    graph, grads = torch.cuda.CUDAGraph(), [torch.empty_like(p) for p in ours]
    for step in range(5):
        for a, b, grad in zip(ours, theirs, grads, strict=True):
            b.grad = torch.randn(b.shape).bfloat16()
            a.grad = grad.copy_(b.grad)
        other.step()
        if step == 3:  # a capture runs nothing
            with torch.cuda.graph(graph):
                mine.step()
        if step < 3:
            with no_waiting() if step else contextlib.nullcontext():
                mine.step()
        else:
            graph.replay()
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a]["step"] == other.state[b]["step"] == 5
        for key, value in other.state[b].items():
            got = mine.state[a][key].cpu() if torch.is_tensor(value) else mine.state[a][key]
            if not torch.is_tensor(value):
                assert got == value
            elif value.dtype == torch.uint8:  # a code, or the draw for one, may fall to the other side
                assert (got != value).float().mean() < 0.01, key
            elif value.dtype == torch.float32:
                torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-6)
        assert (a.cpu() != b).float().mean() < 0.01
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=2**-6, atol=2e-3)


def test_muon_never_waits_and_steps_as_on_a_cpu():
    torch.manual_seed(0)
    theirs = load_ours("qwen3_moe")
    ours = copy.deepcopy(theirs).cuda()
    before = {name: weight.detach().clone() for name, weight in theirs.named_parameters()}
    mine, other = (expertmesh.Muon(model, lr=1e-2, max_grad_norm=1.0) for model in (ours, theirs))
    for step in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.cuda()
        other.step()
        with no_waiting() if step else contextlib.nullcontext():
            mine.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.cpu() - b).norm() < 0.1 * (b - before[name]).norm(), name  # products in bfloat16
