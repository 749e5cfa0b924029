"""Chunked linear + cross entropy, in PyTorch and in interpreted Triton, against all logits at once."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import expertmesh.kernels.linear_cross_entropy as module
from expertmesh.kernels.linear_cross_entropy import statistics_reference
from tests.kernels.compare import (
    assert_same,
    leaf,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    on_triton,
    outputs_and_grads,
    poisoned,
)

PATHS = pytest.mark.parametrize("path", [poisoned, on_triton])


def labels_with_ignored(rows: int, vocab: int) -> torch.Tensor:
    """Random labels with the first and the last token among them and every third row ignored."""
    labels = torch.randint(0, vocab, (rows,))
    labels[::3] = -100
    labels[-1] = vocab - 1
    labels[rows // 2] = 0
    return labels


def test_the_reference_is_bit_equal_to_stock_transformers():
    hidden, weight, labels = torch.randn(9, 24), torch.randn(50, 24), labels_with_ignored(9, 50)
    for count in (None, 5, torch.tensor(5)):
        stock = ForCausalLMLoss(F.linear(hidden, weight), None, 50, num_items_in_batch=count, shift_labels=labels)
        assert torch.equal(linear_cross_entropy_reference(hidden, weight, labels, num_items_in_batch=count), stock)


@PATHS
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [None, 13, torch.tensor(13)])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "chunk"), [(1, 8, 17, 64), (7, 24, 96, 3), (33, 16, 37, 16), (5, 8, 20000, 5)]
)
def test_loss_and_gradients_equal_the_reference(rows, width, vocab, chunk, count, with_bias, path, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: chunk)
    labels = labels_with_ignored(rows, vocab)
    leaves = leaf(rows, width), leaf(vocab, width, scale=0.3), *((leaf(vocab),) if with_bias else ())

    def run(fn):
        return lambda h, w, b=None: fn(h, w, labels, bias=b, num_items_in_batch=count)

    expected = outputs_and_grads(run(linear_cross_entropy_reference), *leaves)
    with path():
        got = outputs_and_grads(run(linear_cross_entropy), *leaves)
    assert_same(got, expected, tolerance=1e-5)  # float32 sums over 20,000 tokens are no better, here and in PyTorch


@PATHS
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(("rows", "vocab", "chunk"), [(1, 17, 64), (33, 37, 16), (6, 20000, 4), (5, 70000, 5)])
def test_statistics_come_with_the_same_loss_and_gradients(rows, vocab, chunk, scale, path, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: chunk)
    hidden, weight, bias = leaf(rows, 8, scale=scale), leaf(vocab, 8), torch.randn(vocab)
    logits, labels = F.linear(hidden, weight, bias).detach(), labels_with_ignored(rows, vocab)
    right = torch.arange(rows) % 4 == 1  # some are to be the most likely
    labels[right] = logits.argmax(1)[right]
    expected, found = statistics_reference(logits.double(), labels), []
    with path():
        alone = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels, bias=bias), hidden, weight)
        got = outputs_and_grads(
            lambda h, w: linear_cross_entropy(h, w, labels, bias=bias, statistics=found), hidden, weight
        )
    assert_same(got, alone, tolerance=1e-6)
    (statistics,) = found
    assert not any(x.requires_grad for x in statistics)
    assert (int(statistics.labelled), int(statistics.correct)) == (int(expected.labelled), int(expected.correct))
    assert statistics.entropy.dtype == torch.float32
    torch.testing.assert_close(statistics.entropy.double(), expected.entropy.double(), rtol=1e-5, atol=1e-5)


@PATHS
def test_of_equally_likely_tokens_the_first_is_the_prediction_as_in_trl(path):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight = torch.ones(6, 4), torch.zeros(40, 4)
    weight[[7, 9, 30]] = 1.0
    labels = torch.tensor([7, 9, 30, 0, -100, 7])
    found = []
    with path():
        linear_cross_entropy(hidden, weight, labels, statistics=found)
    outputs = ("entropy", "is_top1")
    kept = labels != -100
    _, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden[kept], weight, None, labels[kept], 1.0, 16, None, 1.0, outputs
    )
    assert is_top1.tolist() == [True, False, False, False, True]
    assert int(found[0].correct) == int(is_top1.sum()) == int(statistics_reference(hidden @ weight.t(), labels).correct)
    torch.testing.assert_close(found[0].entropy, entropy.sum())


@PATHS
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_are_right(wanted, path):
    inputs = {"hidden": torch.randn(7, 24), "weight": torch.randn(50, 24), "bias": torch.randn(50)}
    labels = labels_with_ignored(7, 50)

    def run(fn):
        return lambda x: fn(**{**inputs, wanted: x}, labels=labels)

    x = inputs[wanted].clone().requires_grad_()
    expected = outputs_and_grads(run(linear_cross_entropy_reference), x)
    with path():
        assert_same(outputs_and_grads(run(linear_cross_entropy), x), expected)


@PATHS
def test_ignored_rows_have_exactly_zero_gradient(path):
    hidden, weight, labels = leaf(9, 24), torch.randn(50, 24), labels_with_ignored(9, 50)
    with path():
        _, grad = outputs_and_grads(lambda h: linear_cross_entropy(h, weight, labels), hidden)
    assert torch.equal(grad.abs().sum(1) == 0, labels == -100)


@PATHS
def test_all_rows_ignored_is_a_nan_loss_with_zero_gradients_as_in_pytorch(path):
    labels = torch.full((7,), -100)
    leaves = leaf(7, 24), leaf(50, 24)
    expected = outputs_and_grads(lambda h, w: linear_cross_entropy_reference(h, w, labels), *leaves)
    with path():
        got = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels), *leaves)
    assert all(torch.equal(g.nan_to_num(nan=7.0), e.nan_to_num(nan=7.0)) for g, e in zip(got, expected, strict=True))


@PATHS
def test_extreme_logits_stay_finite(path):
    hidden, weight = leaf(7, 8, scale=100.0), leaf(40, 8, scale=10.0)
    labels = labels_with_ignored(7, 40)
    expected = outputs_and_grads(lambda h, w: linear_cross_entropy_reference(h, w, labels), hidden, weight)
    with path():
        got = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels), hidden, weight)
    assert all(x.isfinite().all() for x in got)
    assert_same(got, expected)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_a_float32_loss_and_gradients_of_their_dtype(dtype, path, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 16)
    labels = labels_with_ignored(40, 100)
    exact = leaf(40, 24), leaf(100, 24, scale=0.2)
    leaves = [x.detach().to(dtype).requires_grad_() for x in exact]
    expected = outputs_and_grads(
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        *(x.detach().float().requires_grad_() for x in leaves),
    )
    with path():
        got = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels), *leaves)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    assert_same([x.float() for x in got], expected, tolerance=1e-2)


def test_a_second_backward_and_a_scaled_loss_give_scaled_gradients():
    hidden, weight, labels = leaf(9, 24), leaf(50, 24), labels_with_ignored(9, 50)
    loss = linear_cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss * 3, (hidden, weight))
    assert_same(again, [3 * x for x in once])


def test_autocast_casts_as_linear_does():
    hidden, weight, labels = leaf(9, 24), leaf(50, 24), labels_with_ignored(9, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs_and_grads(lambda h, w: linear_cross_entropy_reference(h, w, labels), hidden, weight)
        got = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels), hidden, weight)
    assert_same(got, expected, tolerance=2e-2)


@pytest.mark.parametrize("bad", [50, -1, 10**6])
def test_a_label_outside_the_vocabulary_is_an_error_on_the_cpu_and_a_nan_loss_in_the_kernel(bad):
    hidden, weight, labels = leaf(9, 24), leaf(50, 24), labels_with_ignored(9, 50)
    labels[4] = bad
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 50\)"):
        linear_cross_entropy(hidden, weight, labels)
    with on_triton():
        loss, grad, _ = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels), hidden, weight)
    assert loss.isnan()
    assert torch.equal(grad.isnan().any(1), torch.arange(9) == 4)


@PATHS
def test_without_grad_only_the_loss_is_computed(path, monkeypatch):
    hidden, weight, labels = leaf(9, 24), leaf(50, 24), labels_with_ignored(9, 50)
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    monkeypatch.setattr(module, "_accumulate", None)  # the weight's gradient would need it
    with torch.no_grad(), path():
        got = linear_cross_entropy(hidden, weight, labels)
    assert not got.requires_grad
    assert_same([got], [expected.detach()])


def test_no_rows_give_a_zero_loss_and_zero_gradients():
    hidden, weight, labels = leaf(0, 24), leaf(50, 24), torch.zeros(0, dtype=torch.long)
    expected = outputs_and_grads(
        lambda h, w: linear_cross_entropy_reference(h, w, labels, num_items_in_batch=3), hidden, weight
    )
    got = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels, num_items_in_batch=3), hidden, weight)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_chunks_are_equal_whole_tiles_within_the_budget():
    rows = module.chunk_rows(2048, 151936, torch.float32, torch.device("cpu"))
    assert rows % 64 == 0 and rows * 151936 * 4 <= 1.25 * 2**28
    assert module.chunk_rows(100, 4096, torch.float32, torch.device("cpu")) == 100


@pytest.mark.parametrize(
    ("memory_gib", "rows", "vocab", "chunk"),
    [(141, 16384, 151936, 4096), (141, 4096, 151936, 4096), (141, 16384, 201088, 2048), (141, 300, 32000, 300)]
    + [(24, 16384, 151936, 1280), (24, 16384, 32000, 6144)],
)
def test_chunks_on_a_gpu_fill_whole_waves_within_the_budget(memory_gib, rows, vocab, chunk, monkeypatch):
    memory = SimpleNamespace(total_memory=memory_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert module.chunk_rows(rows, vocab, torch.bfloat16, torch.device("cuda")) == chunk


def test_unflattened_inputs_are_refused():
    with pytest.raises(AssertionError, match="flatten batch and sequence"):
        labels = torch.zeros(2, 5, dtype=torch.long)
        module.linear_cross_entropy(
            torch.randn(2, 5, 24), torch.randn(50, 24), None, labels, None, -100, [False], False
        )
