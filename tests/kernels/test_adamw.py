"""AdamW by one launch equals its reference and PyTorch's, over several steps and whatever the sizes."""

from typing import Any

import pytest
import torch

from expertmesh.kernels import adamw, tensor_lists
from expertmesh.kernels.adamw import Update, adamw_, adamw_reference_
from tests.kernels.compare import assert_same, on_triton

GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tensor_lists, "CHUNK", 512)
    monkeypatch.setattr(adamw, "OPTIONS", adamw.OPTIONS | {"BLOCK": 128})


def update(weight: torch.Tensor, group: dict = GROUP, **dtypes: torch.dtype) -> Update:
    """A parameter before its first step; the other tensors in its layout, and in its dtype unless `dtypes` says."""
    others = [torch.zeros_like(weight, dtype=dtypes.get(key)) for key in Update._fields[1:4]]
    return Update(weight, *others, torch.zeros(()), group)


def weights() -> list[torch.Tensor]:
    """Around the bounds of blocks and chunks, empty, a scalar, dense in another order, with gaps, not aligned."""
    memory = torch.randn(7, 300)
    sizes = [1, 127, 128, 129, 511, 512, 513, 1024, 1537]
    return [
        *(torch.randn(size) for size in sizes),
        *(torch.randn(3) for _ in range(8)),
        torch.randn(0, 4),
        torch.randn(()),
        torch.randn(9, 20, 3).transpose(0, 2),
        memory[:, ::2],
        torch.randn(701)[1:],
    ]


def copies(updates: list[Update]) -> list[Update]:
    """The same numbers in other memory, laid out alike, gaps included."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)

    return [Update(*map(copy, u[:5]), u.options) for u in updates]


def numbers(updates: list[Update]) -> list[torch.Tensor]:
    return [x for u in updates for x in (u.weight, u.exp_avg, u.exp_avg_sq, u.step) if x.numel()]


def steps(ours: list[Update], theirs: list[Update], count: int = 3, **options: torch.Tensor) -> None:
    """Both take steps with the same gradients: by kernels, and by the reference."""
    for step in range(count):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad.copy_(torch.randn(mine.grad.shape) * 10.0 ** -(step % 3))
            other.grad.copy_(mine.grad)
        with on_triton():
            adamw_(ours, **options)
        adamw_reference_(theirs, **options)


CASES = {
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "no momentum": {"betas": (0.0, 0.9)},
    "no memory": {"betas": (0.5, 0.0), "eps": 1e-3},
    "lr as a tensor": {"lr": torch.tensor(3e-3)},
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_reference(case):
    ours = [update(weight, GROUP | CASES[case]) for weight in weights()]
    theirs = copies(ours)
    steps(ours, theirs)
    assert_same(numbers(ours), numbers(theirs))
    assert all(u.step == 3 for u in ours)


def test_the_reference_equals_pytorchs_optimizer():
    """Not its fused one, which the reference is made of."""
    ours = [update(w) for w in (torch.randn(7, 5), torch.randn(300), torch.randn(5, 7).T, torch.randn(7, 30)[:, ::2])]
    theirs = [torch.nn.Parameter(u.weight.clone()) for u in ours]
    optimizer = torch.optim.AdamW(theirs, **GROUP, foreach=False)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad.copy_(torch.randn(mine.grad.shape))
            other.grad = mine.grad.clone()
        adamw_reference_(ours)
        optimizer.step()
    assert_same([u.weight for u in ours], [p.detach() for p in theirs])


def test_groups_with_options_of_their_own_share_a_launch():
    groups = [GROUP, GROUP | {"lr": 1e-3, "weight_decay": 0.0}, GROUP | {"maximize": True, "eps": 1e-2}]
    ours = [update(torch.randn(600 + i), groups[i % 3]) for i in range(7)]
    theirs = copies(ours)
    steps(ours, theirs)
    assert_same(numbers(ours), numbers(theirs))


def test_gradients_are_used_scaled_and_stay_as_they_are():
    scale = torch.tensor(0.37)
    ours = [update(weight) for weight in weights()]
    theirs, scaled = copies(ours), copies(ours)
    for _ in range(3):
        for mine, other, third in zip(ours, theirs, scaled, strict=True):
            mine.grad.copy_(torch.randn(mine.grad.shape))
            other.grad.copy_(mine.grad)
            third.grad.copy_(mine.grad * scale)
        before = [u.grad.clone() for u in ours]
        with on_triton():
            adamw_(ours, scale)
        adamw_(theirs, scale)
        adamw_(scaled)
        for updates in (ours, theirs):
            assert all(torch.equal(u.grad, grad) for u, grad in zip(updates, before, strict=True))
    assert_same(numbers(ours), numbers(scaled))
    assert_same(numbers(theirs), numbers(scaled))


@pytest.mark.parametrize("found", [1.0, 2.0])
def test_what_a_loss_scaler_found_infinite_changes_nothing(found):
    ours = [update(weight) for weight in weights()]
    theirs = copies(ours)
    steps(ours, theirs, 2, found_inf=torch.tensor(0.0))
    before = copies(ours)
    steps(ours, theirs, 1, found_inf=torch.tensor(found))
    for updates in (ours, theirs):
        assert all(u.step == 2 for u in updates)
    assert all(torch.equal(a, b) for a, b in zip(numbers(ours), numbers(before), strict=True))
    steps(ours, theirs, 1, found_inf=torch.tensor(0.0))
    assert_same(numbers(ours), numbers(theirs))


def test_dtypes_may_differ_and_each_mixture_has_its_launch():
    """Gradients in bfloat16 only: the interpreter does not round to it as a GPU does."""
    ours = [update(torch.randn(700 + i), **({"grad": torch.bfloat16} if i % 2 else {})) for i in range(4)]
    theirs = copies(ours)
    with on_triton():
        assert len(tensor_lists.group_by_launch(u[:4] for u in ours)[0]) == 2
    steps(ours, theirs)
    assert_same(numbers(ours), numbers(theirs))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, None), (torch.bfloat16, torch.tensor(0.37))], ids=str)
def test_the_reference_rounds_once_where_dtypes_differ_or_gradients_are_scaled(dtype, scale):
    narrow = dict.fromkeys(("grad", "exp_avg", "exp_avg_sq"), torch.bfloat16)
    ours = update(torch.randn(500).to(dtype), **narrow)
    ours.grad.copy_(torch.randn(500))
    wide = Update(*(x.float() for x in copies([ours])[0][:5]), GROUP)
    adamw_reference_([ours], scale)
    adamw_reference_([wide], scale)
    assert all(torch.equal(got, want.to(got.dtype)) for got, want in zip(ours[:5], wide[:5], strict=True))


def test_nothing_to_do_is_done():
    with on_triton():
        adamw_([])
        adamw_([update(torch.randn(0, 3))])
