"""Attention with sinks: the reference is Transformers' eager attention, and the kernels equal the reference."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from expertmesh.kernels import sink_attention as kernels
from expertmesh.kernels.documents import document_bounds, document_of
from expertmesh.kernels.sink_attention import padding_of, sink_attention, visible
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


def leaves(length: int, heads: int = 4, key_heads: int = 2, rows: int = 2, width: int = 16) -> tuple[torch.Tensor, ...]:
    shapes = (rows, heads, length, width), (rows, key_heads, length, width), (rows, key_heads, length, width), (heads,)
    return tuple(leaf(*shape) for shape in shapes)


def bounds(lengths: list[int], rows: int, length: int):
    return document_bounds(document_of(torch.tensor([0, *lengths]).cumsum(0).int(), rows, length))


def both(inputs, **options) -> None:
    def run(*x):
        return sink_attention(*x, 0.3, **options)

    expected = outputs_and_grads(run, *inputs)
    with on_triton():
        got = outputs_and_grads(run, *inputs)
    assert_same(got, expected, 5e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_the_reference_is_the_eager_attention_of_transformers(window):
    inputs = leaves(9)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :2] = seen[1, 7:] = False
    mask = visible(9, torch.device("cpu"), window, None, seen)
    mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]

    def eager(query, key, value, sinks):
        module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=True)
        return eager_attention_forward(module, query, key, value, mask, scaling=0.3)[0]

    ours = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window=window, padding=padding_of(seen)), *inputs)
    assert_same(ours, outputs_and_grads(eager, *inputs))


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize(
    ("length", "window"),
    [(1, None), (33, None), (96, None), (97, 1), (70, 32), (70, 33), (70, 69), (170, 140), (40, 40), (40, 128)],
)
def test_the_kernels_give_the_references_output_and_gradients(length, window, heads):
    both(leaves(length, *heads, rows=1 if length > 40 else 2), window=window)


@pytest.mark.parametrize("window", [None, 20, 140])
@pytest.mark.parametrize("lengths", [[[1, 40, 31, 1, 7], [80]], [[1] * 80, [64, 16]]])
def test_documents_packed_into_rows_do_not_see_each_other(lengths, window):
    documents = bounds([n for row in lengths for n in row], 2, 80)
    inputs = leaves(80, 2, 1)
    both(inputs, window=window, documents=documents)

    def apart(*x):
        rows = []
        for row in range(2):
            parts = zip(*(y[row : row + 1].split(lengths[row], dim=2) for y in x[:3]), strict=True)
            rows.append(torch.cat([sink_attention(*part, x[3], 0.3, window=window) for part in parts], dim=1))
        return torch.cat(rows)

    packed = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window=window, documents=documents), *inputs)
    assert_same(packed, outputs_and_grads(apart, *inputs))


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16)])
def test_tiles_of_any_shape_meet_at_the_bounds(queries, keys, window, monkeypatch):
    monkeypatch.setattr(kernels, "_EXACT", (queries, keys, 4, 1))
    both(leaves(150, 2, 1, rows=1), window=window, documents=bounds([70, 5, 75], 1, 150))


@pytest.mark.parametrize("window", [None, 20, 64])
def test_padding_on_either_side_and_holes_are_seen_by_nobody(window, monkeypatch):
    monkeypatch.setattr(kernels, "_EXACT", (32, 16, 4, 1))
    seen = torch.ones(4, 90)
    seen[0, :21] = seen[1, 61:] = seen[2, 40:50] = 0
    assert padding_of(seen).whole.tolist() == [0, 61, 40, 90]
    both(leaves(90, 2, 1, rows=4), window=window, padding=padding_of(seen))


def test_a_query_whose_sink_takes_it_all_gives_nothing():
    query, key, value, _ = leaves(8)
    with on_triton():
        assert not sink_attention(query, key, value, torch.full((4,), 1e4), 1.0).any()


def test_without_a_sink_it_is_causal_attention():
    query, key, value, _ = leaves(40)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    with on_triton():
        got = sink_attention(query, key, value, torch.full((4,), -1e4), 0.25)
    torch.testing.assert_close(got, expected)
