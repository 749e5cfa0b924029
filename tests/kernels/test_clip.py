"""Norm and scaling of gradients equal PyTorch's, whatever their size and the order of their memory."""

import math

import pytest
import torch

from expertmesh.kernels import clip, tensor_lists
from expertmesh.kernels.clip import RunningNorm, add_to_norm_, scale_, scale_reference_, squared_sum
from expertmesh.parallel.clip import clip_grad_norm
from tests.kernels.compare import assert_same, on_triton


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tensor_lists, "CHUNK", 512)
    monkeypatch.setattr(clip, "OPTIONS", clip.OPTIONS | {"BLOCK": 256})


def gradients() -> list[torch.Tensor]:
    """Large, small and empty ones, of odd sizes; dense in another order of dimensions; with gaps."""
    memory = torch.randn(2, 7, 300)
    return [
        torch.randn(1537),
        torch.randn(512),
        torch.randn(3, 5, 7),
        torch.randn(11),
        torch.randn(0, 4),
        torch.randn(()),
        torch.randn(9, 20, 3).transpose(0, 2),
        torch.randn(1, 40, 1, 30).permute(2, 3, 0, 1),
        memory[1, 1:].T,
        memory[0, :, ::2],
    ]


def test_which_tensors_share_a_launch():
    found = [*gradients(), torch.randn(300, dtype=torch.float64), torch.randn(30).bfloat16(), torch.randn(31)[1:]]
    alone = [[tensor] for tensor in found]
    with on_triton():
        together, others = tensor_lists.group_by_launch(alone)
        pairs, apart = tensor_lists.group_by_launch([(found[2], found[2].clone()), (found[2], found[6])])
    float32, bfloat16 = (torch.device("cpu"), torch.float32), (torch.device("cpu"), torch.bfloat16)
    assert together == {(*float32, True): [0, 1, 2, 3, 4, 5], (*bfloat16, True): [11], (*float32, False): [12]}
    assert others == [6, 7, 8, 9, 10], "in another order, with gaps, of more bits"
    assert list(pairs.values()) == [[0]] and apart == [1], "a tensor and one in another order of dimensions"
    assert tensor_lists.group_by_launch(alone) == ({}, list(range(len(found))))  # on a CPU


def test_the_kernel_sums_the_squares_of_all_elements():
    found = gradients()
    exact = torch.stack([x.double().square().sum() for x in found]).sum().float()
    with on_triton():
        assert_same([squared_sum(found), squared_sum(found[:1])], [exact, found[0].double().square().sum().float()])
        assert torch.equal(squared_sum(found), squared_sum(found))
    assert_same([squared_sum(found)], [exact])


def test_the_kernel_scales_every_element_in_place_and_nothing_beside_it():
    memory = torch.randn(2000)
    ours = gradients()
    theirs = [tensor.clone() for tensor in ours]
    inside, scale = memory[100:1637], torch.tensor(0.37)
    expected = torch.cat([memory[:100], inside * scale, memory[1637:]])
    scale_reference_(theirs, scale)
    with on_triton():
        scale_([*ours, inside], scale)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(memory, expected)


def test_a_scale_of_one_leaves_every_bit():
    bits = torch.randint(-(2**31), 2**31, (1537,), dtype=torch.int32)  # nan with any payload among them
    ours = bits.clone().view(torch.float32)
    with on_triton():
        scale_([ours], torch.ones(()))
    assert torch.equal(ours.view(torch.int32), bits)


@pytest.mark.parametrize("options", [{}, {"bound": 2.0}, {"bound": 2.0, "own": True}], ids=["sums", "all's", "own"])
@pytest.mark.parametrize("size", [2.0, 1e-3], ids=["large", "small"])
def test_a_tally_judges_by_what_came_before(options, size):
    running = torch.tensor(3.0) if options else None

    def tally() -> list[torch.Tensor]:
        so_far, found = RunningNorm(*torch.tensor([4.0, 0.0, 0.0]).unbind()), []
        for factor in (1.0, 1.0, math.inf):
            for copies, tensors in ((1, grads[:1]), (2, grads)):
                add_to_norm_(so_far, [x * factor for x in tensors], copies, running=running, **options)
                found += [x.clone() for x in so_far]
        return found

    grads = [x * size for x in gradients()]
    expected = tally()
    with on_triton():
        found = tally()
    torch.testing.assert_close(found[:12], expected[:12])
    assert found[2] == 0 and found[-1] == expected[-1] == 1 and math.isinf(found[-3])
    assert size != 2.0 or not options or (found[10] < 0.5) == ("own" in options), "a spike is held down"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    x, y = torch.randn(1537), torch.randn(700)
    x[1500] = bad
    with on_triton():
        total = squared_sum([x, y])
        scale_([y], torch.tensor(math.nan))
    torch.testing.assert_close(total, torch.tensor(bad), equal_nan=True)
    assert y.isnan().all()


def test_what_stays_is_sent_once():
    cpu, first = torch.device("cpu"), (1, 2, 3)
    kept = tensor_lists.cached_on_device(first, torch.int64, cpu)
    assert tensor_lists.cached_on_device((1, 2, 3), torch.int64, cpu) is kept and kept.tolist() == [1, 2, 3]
    assert tensor_lists.cached_on_device((1, 2, 3), torch.float64, cpu).dtype == torch.float64
    limit = tensor_lists._cached.cache_info().maxsize
    assert limit is not None, "addresses that never come back do not fill the memory"


def test_half_precision_is_squared_and_summed_in_float32():
    found = [torch.full((1537,), 300.0, dtype=torch.float16)]  # whose squares float16 does not hold
    with on_triton():
        by_kernel = squared_sum(found)
    assert_same([by_kernel, squared_sum(found)], [torch.tensor(1537 * 9e4)] * 2)


def test_no_tensors_have_norm_zero():
    assert squared_sum([]) == 0
    scale_([], torch.tensor(0.5))


@pytest.mark.parametrize("max_norm", [0.1, 1e9, math.inf], ids=["clips", "leaves", "measures"])
def test_clipping_by_kernels_equals_torch(max_norm):
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((40, 30), (5,), (6, 10, 7))]
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    with on_triton():
        norm = clip_grad_norm(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("max_norm", [1e-6, 1.0])
def test_tiny_gradients_are_scaled_as_by_pytorch(max_norm):
    ours, theirs = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
    ours.grad, theirs.grad = torch.full((8,), 1e-6), torch.full((8,), 1e-6)
    clip_grad_norm([ours], max_norm)
    torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)
