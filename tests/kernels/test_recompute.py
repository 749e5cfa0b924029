"""What a layer recomputes comes again bit for bit, once for all its readers; what it keeps is watched as ever."""

import pytest
import torch

from expertmesh.kernels.activation import Activation, relu2, swiglu
from expertmesh.kernels.grouped_gemm import Weights, up_act
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.kernels.mla_rope import mla_rope
from expertmesh.kernels.recompute import _Layer, _layer, _Recipe, is_policy, levels_of, mark_recomputable, save_less
from expertmesh.kernels.rms_norm import add_rms_norm, rms_norm
from expertmesh.kernels.rope import qk_norm_rope
from tests.kernels.compare import on_triton


def pieces(device: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """What each function that tells `mark_recomputable` has made, by its name."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    x, residual, weight = leaf(1, 3, 32), leaf(1, 3, 32), leaf(32)
    q, k, heads, (cos, sin) = leaf(1, 3, 32), leaf(1, 3, 16), leaf(8), torch.randn(2, 1, 3, 8, device=device).to(dtype)
    kv, k_rope, wide = leaf(1, 3, 2, 8 + 16), leaf(1, 3, 8), leaf(1, 3, 2, 8 + 8)
    group = group_by_expert(torch.tensor([[0], [1], [0]], device=device), 2, torch.rand(3, 1, device=device))
    act, inputs = Activation("silu"), (x.view(3, 32), leaf(2, 16, 32).transpose(1, 2))
    with torch.no_grad():
        h = up_act(inputs[0], Weights(inputs[1]), group, act)[0]
        mark_recomputable((h,), lambda x, w: up_act(x, Weights(w), group, act), *inputs, level="experts")
    return {
        "rms_norm": (rms_norm(x, weight, 1e-6),),
        "add_rms_norm": add_rms_norm(x, residual, weight, 1e-6)[:1],
        "one_plus": (rms_norm(x, weight, 1e-6, scale="one_plus"),),
        "qk_norm_rope": qk_norm_rope(q.view(1, 3, 4, 8), k.view(1, 3, 2, 8), heads, leaf(8), cos, sin, 1e-6),
        "mla_rope": mla_rope(wide, kv, k_rope, cos, sin)[1:2],
        "swiglu": (swiglu(x, residual)[..., 1:],),  # a view
        "relu2": (relu2(x),),
        "up": (h,),
    }


def assert_pieces_come_again(device: str, dtype: torch.dtype) -> None:
    """Every piece is one, and comes again bit for bit."""
    layer = _Layer("experts")
    token = _layer.set(layer)
    try:
        made = pieces(device, dtype)
        packed = {name: [layer.pack(x) for x in outputs] for name, outputs in made.items()}
    finally:
        _layer.reset(token)
    for name, outputs in made.items():
        for x, piece in zip(outputs, packed[name], strict=True):
            assert isinstance(piece.func, _Recipe), name
            back = piece()
            assert torch.equal(back, x) and back.stride() == x.stride() and back.data_ptr() != x.data_ptr(), name


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "triton"])
def test_every_piece_comes_again_bit_for_bit(kernels):
    if kernels:
        with on_triton():
            assert_pieces_come_again("cpu", torch.float32)
    else:
        assert_pieces_come_again("cpu", torch.float32)


def doubled(x: torch.Tensor, calls: list[int]) -> torch.Tensor:
    """2x, which comes again from x."""

    def make(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        return (2 * x,)

    y = 2 * x
    mark_recomputable((y,), make, x)
    return y


def test_readers_share_what_is_made_and_a_second_backward_makes_it_anew():
    x, calls = torch.randn(5, requires_grad=True), list[int]()

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = doubled(x, calls)
        return (y * y.sin()).sum() + (doubled(y, calls) ** 3).sum()  # a recipe whose input is one

    want = torch.autograd.grad(layer(x), x)[0]
    assert not calls, "outside of a layer nothing is recomputed"
    loss = save_less("light", layer, x)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert len(calls) == 2
    assert torch.equal(first, want) and torch.equal(torch.autograd.grad(loss, x)[0], want) and len(calls) > 2
    calls.clear()
    with torch.no_grad():
        save_less("light", layer, x)
    assert not calls


@pytest.mark.parametrize("which", ["kept", "input"])
def test_a_tensor_that_changed_since_the_forward_is_found(which):
    x, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    inputs = {}

    def layer(x: torch.Tensor) -> torch.Tensor:
        inputs["input"] = s = x + 1
        inputs["kept"] = e = s.exp()
        return (doubled(s, []) * weight * e).sum()

    loss = save_less("light", layer, x)
    with torch.no_grad():
        inputs[which] += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_an_output_that_was_changed_before_it_was_saved_is_kept():
    x = torch.randn(5, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (doubled(x, []).add_(1) ** 2).sum()

    (grad,) = torch.autograd.grad(save_less("light", layer, x), x)
    torch.testing.assert_close(grad, 4 * (2 * x + 1))


def test_what_is_kept_passes_the_hooks_around_the_layer():
    x, seen = torch.randn(5, requires_grad=True), list[int]()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (doubled(x, []) ** 2).sum() + (x.exp() ** 3).sum()

    want = torch.autograd.grad(layer(x), x)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x.clone(), lambda x: x.clone()):
        loss = save_less("light", layer, x)
    assert torch.equal(torch.autograd.grad(loss, x)[0], want) and len(seen) == 3  # x, exp(x) of exp and of the power
    again = torch.utils.checkpoint.checkpoint(lambda x: save_less("light", layer, x), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], want)


def test_policies():
    assert levels_of({"experts": 2}, 3) == ["experts", "experts", "light"]
    assert levels_of({"light": 1}, 3) == ["light", "none", "none"]
    assert levels_of(True, 2) == levels_of("full", 2) == ["full"] * 2 and levels_of(False, 1) == ["none"]
    for wrong in (
        1,
        "none",
        "Light",
        {},
        {"light": 0},
        {"light": True},
        {"none": 1},
        {"light": 1, "full": 1},
        None,
        [],
    ):
        assert not is_policy(wrong)
        with pytest.raises(ValueError, match="'experts': n"):
            levels_of(wrong, 2)
