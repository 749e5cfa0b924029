"""flash-attn-4 is called so that it computes SDPA, and our attention with sinks; and only where it may be.

The package itself runs on GPUs only (tests/gpu); here a stand-in has its interface.
"""

import os
import tempfile

import pytest
import torch
from torch.nn import functional as F

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, varlen_attention
from expertmesh.kernels.sink_attention import sink_attention
from tests.kernels import fake_flash_attn
from tests.kernels.compare import assert_same, outputs_and_grads


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    return fake_flash_attn.install(monkeypatch)


def leaves(heads=4, key_heads=2, width=64, value_width=64, length=7, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """[2, N, S, D] over [2, S, N, D] memory, as projections make it."""
    torch.manual_seed(0)
    shapes = (heads, width), (key_heads, width), (key_heads, value_width)
    return [torch.randn(2, length, n, d).to(dtype).transpose(1, 2).requires_grad_() for n, d in shapes]


def sdpa(query, key, value, scale=None):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(
        1, 2
    )


CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE"
SHAPES = [(4, 2, 64, 64), (4, 1, 128, 128), (2, 2, 192, 128)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_sdpa_with_its_layout_scale_and_gradients(shape, scale, calls):
    inputs = leaves(*shape)
    assert flash_attention.supports(*inputs)
    got = outputs_and_grads(lambda *x: flash_attention.flash_attention(*x, scale), *inputs)
    want = outputs_and_grads(lambda *x: sdpa(*x, scale), *(x.detach().float().requires_grad_() for x in inputs))
    assert got[0].is_contiguous() and len(calls) == 1
    assert_same([x.float() for x in got], want, 8e-3)  # bfloat16's last bit


@pytest.fixture
def documents() -> Documents:
    """Of two rows of 7 tokens."""
    return Documents(torch.tensor([0, 3, 7, 14], dtype=torch.int32), 7)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape, documents, calls):
    inputs = leaves(*shape)
    got = outputs_and_grads(lambda *x: flash_attention.flash_attention(*x, 0.3, documents=documents), *inputs)
    assert [call["documents"] for call in calls] == [3] and got[0].shape == (2, 7, shape[0], shape[3])
    exact = (x.detach().float().requires_grad_() for x in inputs)
    want = outputs_and_grads(lambda *x: varlen_attention(*x, *documents, 0.3), *exact)
    assert_same([x.float() for x in got], want, 8e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # of the sinks
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_with_sinks_it_is_our_attention_with_sinks(window, packed, dtype, documents, calls):
    inputs = [*leaves(), torch.randn(4).to(dtype).requires_grad_()]
    told = documents if packed else None
    got = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window, told), *inputs)
    assert [call["sinks"] for call in calls] == [True] and got[-1].dtype == dtype
    assert [call.get("documents") for call in calls] == [3 if packed else None]
    exact = (x.detach().float().requires_grad_() for x in inputs)
    want = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window, told), *exact)
    assert len(calls) == 1
    assert_same([x.float() for x in got], want, 1.5e-2)


def test_its_compiled_kernels_stay_on_disk_unless_the_user_decides(tmp_path, monkeypatch, caplog):
    def chosen(**environment):
        monkeypatch.setattr(os, "environ", {f"{CACHE}_{name}": value for name, value in environment.items()})
        flash_attention._set_cache_folder.__wrapped__()
        return os.environ.get(f"{CACHE}_ENABLED"), os.environ.get(f"{CACHE}_DIR")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"flash-attn-4-{os.getuid()}"
    assert chosen() == ("1", str(folder)) and folder.stat().st_mode & 0o777 == 0o700
    assert chosen(DIR="mine") == ("1", "mine") and chosen(ENABLED="0") == ("0", str(folder)) and not caplog.messages
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert chosen() == (None, None) and "is not yours" in caplog.text, "another user's folder"


def test_what_it_must_not_take(calls, monkeypatch):
    inputs = leaves()
    assert flash_attention.supports(*inputs)
    assert not flash_attention.supports(*(x.detach() for x in inputs))
    with torch.no_grad():
        assert not flash_attention.supports(*inputs)
    with torch.inference_mode():
        assert not flash_attention.supports(*inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert not flash_attention.supports(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not flash_attention.supports(*leaves(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention.supports(*leaves(dtype=torch.float32))
    assert not flash_attention.supports(*leaves(width=32, value_width=32))
    assert not flash_attention.supports(*leaves(4, 2, 192, 128)), "its backward has no shared keys of other widths"
    assert not flash_attention.supports(inputs[0][:, :, -2:], *inputs[1:]), "keys of a cache"
    monkeypatch.setattr(flash_attention, "LENGTH", 8)
    assert not flash_attention.supports(*inputs)


def test_autocast_decides_the_dtype(calls):
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention.flash_attention(*leaves(dtype=torch.float32))
    assert out.dtype == calls[0]["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("installed", "device", "major", "there"),
    [(True, "cuda", 9, True), (False, "cuda", 9, False), (True, "cpu", 9, False), (True, "cuda", 10, False)],
)
def test_it_is_there_on_hopper_where_it_is_installed(installed, device, major, there, monkeypatch):
    monkeypatch.setattr(backends, "FLASH_ATTENTION", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    assert backends.has_flash_attention(device) == there


def test_the_question_is_a_constant_to_torch_compile(monkeypatch):
    monkeypatch.setattr(backends, "FLASH_ATTENTION", True)

    def asks(x):
        return x + 1 if backends.has_flash_attention(x.device.type) else x - 1

    assert torch.compile(asks, backend="eager", fullgraph=True)(torch.zeros(1)).item() == -1
