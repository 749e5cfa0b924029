"""oneDNN's product stands in for torch.mm: any rows, any strides, and no shape of its own for every number of rows."""

import pytest
import torch

from expertmesh.kernels.matmul import mm_out

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN"
)


@pytest.fixture(autouse=True)
def capability(monkeypatch) -> list[str]:
    """What the processor is said to have: AVX-512, wherever the tests run."""
    said = ["AVX512"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: said[0])
    return said


def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the left operands that go to oneDNN from now on."""
    seen: list[tuple[int, ...]] = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda a, *rest: seen.append(a.shape) or real(a, *rest))
    return seen


@needs_onednn
@pytest.mark.parametrize("rows", [96, 97, 128])
@pytest.mark.parametrize("strides", ["plain", "transposed weight", "transposed input", "rows of a wider buffer"])
def test_product_equals_float64(rows, strides, monkeypatch, nan_memory):
    seen = products(monkeypatch)
    a = torch.randn(120, rows).t() if strides == "transposed input" else torch.randn(rows, 120)
    b = torch.randn(136, 120).t() if strides == "transposed weight" else torch.randn(120, 136)
    out = torch.full((rows, 144), 7.0)[:, :136] if strides == "rows of a wider buffer" else torch.empty(rows, 136)
    with nan_memory():
        mm_out(a, b, out)
    assert ((out - a.double() @ b.double()).abs().max() / out.abs().max()) < 2e-6
    assert [shape[0] % 32 for shape in seen] == [0]


@needs_onednn
def test_small_products_other_dtypes_and_other_processors_stay_with_torch(monkeypatch, capability):
    seen = products(monkeypatch)
    for size, dtype in ((8, torch.float32), (0, torch.float32), (128, torch.float64), (128, torch.bfloat16)):
        a, b, out = (
            torch.randn(size, 128).to(dtype),
            torch.randn(128, 128).to(dtype),
            torch.empty(size, 128).to(dtype),
        )
        mm_out(a, b, out)
        assert torch.equal(out, a @ b)
    with torch.backends.mkldnn.flags(enabled=False):
        mm_out(torch.randn(128, 128), torch.randn(128, 128), torch.empty(128, 128))
    capability[0] = "AVX2"
    mm_out(torch.randn(128, 128), torch.randn(128, 128), torch.empty(128, 128))
    assert not seen
