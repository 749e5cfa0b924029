"""Experts that are spread over ranks: how a `Dispatch` becomes their forward, and what it refuses."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from expertmesh import timeouts
from expertmesh.moe import experts as moe_experts
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.experts import Dispatch
from expertmesh.moe.gather import Gather, link_of, mailboxes, max_tokens
from expertmesh.parallel.layout import expert_parallel_fsdp
from expertmesh.records import Call, in_call
from tests.distributed import work
from tests.kernels.compare import on_triton
from tests.models import load_ours


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "tp"))
    dist.destroy_process_group()
    timeouts.cpu_group.cache_clear()


def test_the_gradients_of_weights_are_not_differentiated_again(mesh):
    experts = work.experts_of(8, slice(None))
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(DTensor.from_local(weight.detach(), mesh["ep"], [Shard(0)])))
    experts.forward = Dispatch(Gather, experts, mesh["ep"], mesh["tp"])
    x, ids, weights, _ = work.layer_inputs(5, None, seed=0)
    for weight in experts.parameters():
        (grad,) = torch.autograd.grad(experts(x, ids, weights).square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.to_local().square().sum().backward()


class Told(Exchange):
    """Experts that are all here, and what was asked for in the backward."""

    asked: list[str]

    def __init__(self, layer, x_TH, ahead=False):
        self.layer, self.waits, Told.asked = layer, layer.waits, []

    @property
    def patient(self):
        return self.layer.group._get_backend(torch.device("cpu")).options._timeout == timeouts.patience

    def dispatch(self, x_TH, ids_TK, weight_TK):
        assert self.patient
        return super().dispatch(x_TH, ids_TK, weight_TK)

    def combine(self, *made):
        assert self.patient
        return super().combine(*made)

    def combine_backward(self, dout_TH):
        assert self.patient
        Told.asked.append("out")
        return super().combine_backward(dout_TH)

    def dispatch_backward(self, dx_MH, dweight_MK):
        assert self.patient
        Told.asked += [name for name, grad in (("x", dx_MH), ("weights", dweight_MK)) if grad is not None]
        return super().dispatch_backward(dx_MH, dweight_MK)


@pytest.mark.parametrize("backend", ["expertmesh", "grouped_mm"])
@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        (["x"], ["out", "x"]),
        (["weights"], ["out", "weights"]),
        (["x", "weights", "experts"], ["out", "x", "weights"]),
        (["experts"], ["out"]),
        (["residual"], []),
    ],
    ids=str,
)
def test_no_gradient_travels_that_nobody_needs(trained, asked, backend, mesh):
    experts = work.experts_of(8, slice(None)).requires_grad_("experts" in trained)
    experts.config._experts_implementation = backend
    experts.forward = Dispatch(Told, experts, mesh["ep"], mesh["tp"])
    x, ids, weights, residual = work.layer_inputs(5, None, seed=0)
    inputs = {"x": x, "weights": weights, "residual": residual}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    experts(x, ids, weights, residual=residual).sum().backward()
    assert Told.asked == asked
    assert {name for name, tensor in inputs.items() if tensor.grad is not None} == {*trained} - {"experts"}


def test_after_an_error_of_another_backend_weights_are_spread_as_before(mesh):
    experts = work.experts_of(8, slice(None))
    experts.config._experts_implementation = "grouped_mm"
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(DTensor.from_local(weight.detach(), mesh["ep"], [Shard(0)])))
    experts.forward = dispatch = Dispatch(Told, experts, mesh["ep"], mesh["tp"])
    held = []
    dispatch.experts_forward = lambda *_: held.extend(experts.parameters())
    with pytest.raises(AttributeError):  # it returns no rows
        experts(*work.layer_inputs(5, None, seed=0)[:3])
    assert held and not any(isinstance(weight, DTensor) for weight in held)
    assert all(isinstance(weight, DTensor) for weight in experts.parameters())


def test_weights_of_another_dtype_are_for_another_backend(mesh):
    """As under autocast, when Transformers computes experts in the weights' dtype."""
    experts = work.experts_of(8, slice(None)).bfloat16()
    experts.forward = Dispatch(Told, experts, mesh["ep"], mesh["tp"])
    x, ids, weights, _ = work.layer_inputs(5, None, seed=0)
    want = work.experts_of(8, slice(None))(x, ids, weights)
    got = experts(x, ids, weights)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("ranks", "tokens", "kept"), [(2, 20, 48), (8, 1, 16), (1, 20, None)])
def test_of_what_is_gathered_a_rank_keeps_its_share_and_a_quarter(ranks, tokens, kept, mesh, monkeypatch):
    experts, up_act, asked = work.experts_of(8, slice(None)), moe_experts.up_act, []
    experts.forward = Dispatch(Told, experts, mesh["ep"], mesh["tp"])
    monkeypatch.setattr(Told, "sharers", ranks)
    monkeypatch.setattr(moe_experts, "up_act", lambda *inputs: asked.append(inputs[-1]) or up_act(*inputs))
    x, ids, weights, _ = work.layer_inputs(tokens, None, seed=0)
    assert ids.shape == (tokens, 3)
    with on_triton():  # in whole tiles of 16 rows
        assert experts(x, ids, weights).shape == x.shape
    assert asked == [kept]


def test_layers_of_a_call_have_as_many_tokens_and_ask_once(mesh):
    group = mesh["ep"].get_group()
    with in_call(Call(None)):
        assert max_tokens(0, group, "layer 0") == 1
        with pytest.raises(RuntimeError, match="as many tokens in every layer of a forward, but here 0 became 4"):
            max_tokens(4, group, "layer 1")
    assert max_tokens(4, group, "another call") == 4


def test_a_call_takes_the_exchange_that_began_before_the_router(mesh):
    experts, transport = work.experts_of(8, slice(None)), mock.Mock(wraps=Told)
    experts.forward = dispatch = Dispatch(transport, experts, mesh["ep"], mesh["tp"])
    x, ids, weights, residual = work.layer_inputs(5, None, seed=0)
    experts(x, ids, weights, residual=residual, exchange=transport(dispatch, x, ahead=True))
    transport.assert_called_once_with(dispatch, x, ahead=True)


def test_nothing_goes_ahead_where_ranks_share_tokens(mesh):
    """Each sends a slice of them, which the call cuts."""
    block, transport = load_ours("qwen3_moe").model.layers[0].mlp, mock.Mock(wraps=Told)
    block.experts.forward = dispatch = Dispatch(transport, block.experts, mesh["ep"], mesh["tp"])
    x = torch.randn(1, 5, 32)
    for dispatch.slices, said in ((False, {"ahead": True}), (True, {})):
        block(x, x)
        assert transport.call_args.kwargs == said


def test_a_layout_makes_it_the_forward_and_leaves_a_dispatch_of_others_where_it_is(mesh):
    model = load_ours("qwen3_moe")
    experts, attention = model.model.layers[0].mlp.experts, model.model.layers[0].self_attn
    with expert_parallel_fsdp(model, SimpleNamespace(ep_size=2, efsdp_size=1, dp_replicate_size=1)):
        dispatch = Dispatch(Gather, experts, mesh["ep"], mesh["tp"])
        experts.forward, attention.dispatch = dispatch.__call__, "theirs"
    assert experts.forward is dispatch and dispatch.waits.place == "model.layers.0.mlp.experts"
    assert attention.dispatch == "theirs" and not hasattr(experts, "dispatch")


def test_the_link_of_a_mesh_is_asked_once_and_lives_as_long_as_its_group(mesh, monkeypatch):
    group, asked = mesh["ep"].get_group(), []
    monkeypatch.setattr("expertmesh.moe.gather._why_no_mailboxes", lambda group: asked.append(group))
    assert link_of(group, "a test") is link_of(mesh["ep"].get_group(), "a test") and mailboxes() == []
    assert asked == [group]
