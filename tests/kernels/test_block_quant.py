"""8-bit states: codes lose little and nothing small, rounding is right in the mean, and the kernel is its reference."""

from typing import Any

import pytest
import torch

from expertmesh.kernels import adamw, tensor_lists
from expertmesh.kernels.adamw import Update, adamw_, adamw_reference_
from expertmesh.kernels.block_quant import dequantize, join, quantize, random_words, round_stochastic, split
from tests.kernels.compare import assert_same, on_triton

GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e-39, 1e-30, -7.7, 3.4e38, 0.1, -0.1, 255.99, 1 + 2**-16])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_lose_little_of_what_is_large_and_never_all_of_what_is_small(signed):
    x = torch.randn(3, 512).square() * 10.0 ** torch.linspace(-8, 0, 512)
    x = x * torch.randn(3, 512).sign() if signed else x
    codes, scales = quantize(x, 64, signed)
    back = dequantize(codes, scales, signed)
    share = (x.unflatten(-1, (8, 64)).abs() / scales[..., None]).flatten(-2)
    error = (back - x).abs() / x.abs()
    assert error[share > 1e-4].max() < (0.0626 if signed else 0.0313)
    assert (back.sign() == x.sign())[share > 5e-6].all() and (signed or (back > 0).all())
    assert torch.equal(scales, back.unflatten(-1, (8, 64)).abs().amax(-1))
    for one, other in zip(quantize(back, 64, signed), (codes, scales), strict=True):
        assert torch.equal(one, other), "codes of what codes stand for"


def test_zeros_and_the_smallest_and_largest_floats_have_codes():
    for value in (0.0, 1e-45, 1e-38, 3e38):
        x = torch.full((64,), value)
        assert torch.equal(dequantize(*quantize(x, 64, True), True) > 0, x > 1e-37)
        back = dequantize(*quantize(x, 64, False), False)
        assert back.isfinite().all() and (value < 1e-37 or torch.equal(back, x))
    assert dequantize(*quantize(torch.zeros(0, 64), 64, True), True).shape == (0, 64)


def draws(count: int, like: torch.Tensor):
    return (random_words(5, torch.tensor(float(step)), 0, like) for step in range(count))


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_codes_have_the_right_mean(signed):
    x = torch.rand(64) ** 4 * (torch.randn(64).sign() if signed else 1)
    mean = torch.zeros(64, dtype=torch.float64)
    for one, other in draws(1000, x):
        words = one >> 16 if signed else other >> 13
        mean += dequantize(*quantize(x, 64, signed, words), signed).double() / 1000
    spacing = x.abs() / (8 if signed else 16)
    seen = x.abs() > 1e-4
    assert ((mean - x).abs() / spacing)[seen].max() < 5 * 0.5 / 1000**0.5


def test_stochastic_bfloat16_has_the_right_mean_and_keeps_what_needs_no_rounding():
    x = torch.randn(1000)
    mean = torch.stack([round_stochastic(x, word & 0xFFFF).double() for word, _ in draws(500, x)]).mean(0)
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    assert ((mean - x) / spacing).abs().max() < 5 * 0.5 / 500**0.5
    assert ((mean - x) / spacing).mean().abs() < 5 * 0.5 / (500 * 1000) ** 0.5
    exact = FLOATS.bfloat16()
    assert torch.equal(round_stochastic(exact.float(), torch.full(exact.shape, 0xFFFF)), exact)


def test_16_bits_and_8_more_are_24_of_32():
    x = torch.cat([torch.randn(10_000), FLOATS])
    weight, rest = split(x, torch.zeros(len(x), dtype=torch.int64))
    assert torch.equal(join(weight, rest), (x.view(torch.int32) & -256).view(torch.float32))
    assert ((weight.float() - x).abs() <= (x.bfloat16().float() - x).abs() * (1 + 2**-7) + 2**-140).all(), "the nearest"
    weight, rest = split(x, torch.full((len(x),), 255))
    again = split(join(weight, rest), torch.full((len(x),), 255))
    assert torch.equal(again[0], weight) and torch.equal(again[1], rest)


def test_random_numbers_are_of_stream_step_and_place_alone():
    like, step = torch.empty(10_000), torch.tensor(3.0)
    one, two = random_words(1, step, 0, like)
    assert torch.equal(one[100:], random_words(1, step, 100, like)[0][:-100])
    for other in (random_words(2, step, 0, like)[0], random_words(1, step + 1, 0, like)[0], two):
        assert (one == other).sum() < 3 and abs(
            torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]
        ) < 0.05
    for word, first in ((one, 0), (two, 13)):  # of the second the high bits are used
        assert len(word.unique()) > 9990 and word.max() < 2**32
        bits = (word[:, None] >> torch.arange(first, 32)) & 1
        assert (bits.double().mean(0) - 0.5).abs().max() < 0.025


# --- the kernel


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tensor_lists, "CHUNK", 1024)
    monkeypatch.setattr(adamw, "BLOCK_OPTIONS", adamw.BLOCK_OPTIONS | {"BLOCK": 256})
    monkeypatch.setattr(adamw, "OPTIONS", adamw.OPTIONS | {"BLOCK": 128})


def update(number: int, shape: tuple[int, ...], size: int, dtype: torch.dtype, master: torch.dtype | None) -> Update:
    weight = torch.randn(shape).to(dtype)
    kept = None if master is None else torch.zeros_like(weight, dtype=master)
    if master == torch.float32:
        kept.copy_(weight)
    scales, moments = None, (torch.zeros(shape), torch.zeros(shape))
    if size:
        scales = tuple(torch.zeros(*shape[:-1], shape[-1] // size) for _ in range(2))
        moments = torch.zeros(2, *shape, dtype=torch.uint8).unbind()
    place = 2**32 * number + 64 * number
    return Update(weight, torch.zeros_like(weight), *moments, torch.zeros(()), GROUP, kept, scales, number, place)


def copies(updates: list[Update]) -> list[Update]:
    def copy(x: Any) -> Any:
        return x.clone() if torch.is_tensor(x) else tuple(map(copy, x)) if isinstance(x, tuple) else x

    return [Update(*map(copy, u)) for u in updates]


SHAPES = [(5, 256), (1, 5, 64), (96,)]  # two chunks; a rest after whole blocks; less than BLOCK
KINDS = [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, torch.int8), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "master"), KINDS, ids=["rounded", "float32", "24 bits", "master"])
def test_steps_equal_the_reference(dtype, master, small_chunks):
    sizes = [0 if master == torch.float32 else min(256, shape[-1] & -shape[-1]) for shape in SHAPES]
    ours = [update(i, shape, size, dtype, master) for i, (shape, size) in enumerate(zip(SHAPES, sizes, strict=True))]
    theirs = copies(ours)
    skip = torch.tensor(1.0)
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad.copy_(mine.grad.copy_(torch.randn(mine.grad.shape) * 10.0 ** -(step % 3)))
        options = {"scale": torch.tensor(0.37), "found_inf": skip if step == 1 else torch.tensor(0.0)}
        before = copies(ours)
        with on_triton():
            adamw_(ours, **options)
        adamw_reference_(theirs, **options)
        if step == 1:
            for mine, was in zip(ours, before, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine[:5], was[:5], strict=True)), "nothing changes"
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.step == other.step == 2
        if not mine.scales:
            assert_same([mine.master, *mine[2:4]], [other.master, *other[2:4]])
            continue
        # sums in another order move a code to its neighbour where a random number is very near the bound
        for i in range(2):
            codes, wanted = (torch.as_tensor(u[2 + i], dtype=torch.int32) for u in (mine, other))
            assert (codes - wanted).abs().max() <= 1 and (codes != wanted).float().mean() < 2e-3
            torch.testing.assert_close(mine.scales[i], other.scales[i], rtol=1e-5, atol=0)
        assert (mine.weight != other.weight).float().mean() < (1 if dtype == torch.float32 else 2e-3)
        torch.testing.assert_close(mine.weight, other.weight, rtol=2**-7 if dtype != torch.float32 else 1e-5, atol=1e-5)
        if mine.master is not None:
            one, two = (join(u.weight, u.master) for u in (mine, other))
            torch.testing.assert_close(one, two, rtol=2**-14, atol=0)


def test_a_step_of_8_bit_moments_is_near_one_of_floats():
    """After a step from zeros the moments are those of the gradient, and the weight is moved as without codes."""
    (mine,) = ours = [update(0, (64, 256), 256, torch.float32, None)]
    theirs = [
        Update(mine.weight.clone(), mine.grad, torch.zeros(64, 256), torch.zeros(64, 256), torch.zeros(()), GROUP)
    ]
    weight = mine.weight.clone()
    for _ in range(20):
        mine.grad.copy_(torch.randn(64, 256) + 0.5)
        adamw_reference_(ours)
        adamw_reference_(theirs)
    moved, wanted = mine.weight - weight, theirs[0].weight - weight
    assert (moved - wanted).norm() < 0.05 * wanted.norm()
    ratio = dequantize(mine.exp_avg_sq, mine.scales[1], False).mean() / theirs[0].exp_avg_sq.mean()
    assert abs(ratio - 1) < 2e-3
