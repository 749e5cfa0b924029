"""Every expert of a layer at once: the experts backend "expertmesh" of Transformers' `ExpertsInterface`.

    dispatch → group → up + activation → down → combine             forward
    combine' → down-dgrad + activation' → weight gradients → up-dgrad → dispatch'      backward

`_Up` is the forward as far as the activation, `_Down` the rest: two autograd functions, as a checkpointed layer is
recomputed no further than its last saved tensor, which is `_Up`'s. T tokens are this rank's own, M come to its experts,
as S = M·K rows. Saved are x [M, H], the up-projection's output h [S, J] and the routing: the activation is recomputed
from h, and the routing weights' gradient comes out of the down-dgrad. `_Down`'s backward reads what `_Up` saved and
leaves in `from_down` what `_Up`'s goes on from; what autograd brings from one to the other has no values.

Experts that are spread over ranks differ in the `Exchange` alone, which one of `TRANSPORTS` makes for each
call of their forward, a `Dispatch`.

All layouts of Transformers' experts modules work: gated (concatenated or interleaved) or not, with biases or not,
weights [E, out, in] or transposed.
"""

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.distributed.parallel_utils import _use_local_dtensor_params
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward, use_experts_implementation

from expertmesh.backends import graph_break
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_gemm import Weights, grouped_gemm, thin_rows, up_act, up_again
from expertmesh.kernels.grouped_grads import down_dact, grouped_wgrad, thin_wgrad
from expertmesh.kernels.grouping import Grouping, combine, drop_foreign_ids, group_by_expert, unsort
from expertmesh.kernels.recompute import mark_recomputable
from expertmesh.moe.all_to_all import AllToAll
from expertmesh.moe.exchange import LOCAL, Exchange
from expertmesh.moe.gather import Gather
from expertmesh.timeouts import step_timeout
from expertmesh.twins import is_unmodified

NAME = "expertmesh"
#: what a later Transformers may say of a class by `use_experts_implementation`, and this backend does not know
_NEW_FLAGS = sorted(
    inspect.signature(use_experts_implementation).parameters.keys()
    - {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
    - {"experts_class", "experts_interface"}
)
#: how tokens reach experts on other ranks, by the names that `DistributedSetup.dispatch` knows
TRANSPORTS: dict[str, Any] = {"all_to_all": AllToAll, "gather": Gather}


def why_not(experts: Any) -> str | None:
    """Why this experts module cannot run on the "expertmesh" backend, or None if it can."""
    if getattr(experts, "has_post_expert_norm", False):
        return "each expert's output is normalised before it is weighted"
    act_fn = getattr(experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()):
        return f"their activation, {type(act_fn).__name__}, learns"
    unknown = next((name for name in _NEW_FLAGS if getattr(experts, name, False)), None)
    return f"this Transformers says {unknown} of them, which is not known here" if unknown else None


def is_experts(module: Any) -> bool:
    """Whether this is an experts module of Transformers', which any experts backend may run."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


def runs_here(experts: Any) -> bool:
    """Whether this module runs here, where its weights' gradients are divided by its `grad_divisor`, if it has one."""
    return experts.config._experts_implementation == NAME and why_not(experts) is None


def activation_of(experts: Any) -> Activation | None:
    """The `Activation` of an experts module: a known one, or of its own functions; None if it cannot run here."""
    act_fn: Any = getattr(experts, "act_fn", None)  # GPT-OSS has the gate alone
    constants = float(getattr(experts, "alpha", 1.0)), float(getattr(experts, "limit", math.inf))
    own_gate = getattr(experts._apply_gate, "__func__", experts._apply_gate)
    asked = own_gate, act_fn, isinstance(act_fn, nn.Module) and not is_unmodified(act_fn), constants
    known = vars(experts).get("_known_activation")  # the answer, and the question it belongs to
    if known is None or known[0] != asked:
        known = asked, None if why_not(experts) else _activation(experts, asked[2], constants)
        experts.__dict__["_known_activation"] = known
    return known[1]


@torch.no_grad()
def _activation(experts: Any, watched: bool, constants: tuple[float, float]) -> Activation:
    """The known activation that gives what the module's own functions give for numbers of all sizes, or those."""
    gated, interleaved = experts.has_gate, experts.has_gate and not experts.is_concatenated
    own = Activation("custom", gated, interleaved, fn=experts._apply_gate if gated else experts.act_fn)
    if watched:
        return own
    h_SJ = torch.linspace(-30, 30, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(0))].view(16, 32)
    theirs, known = own.forward(h_SJ), [Activation("relu2", gated=False)]
    if gated:
        known = [Activation("silu", True, interleaved), Activation("clamped", True, interleaved, *constants)]
    return next((a for a in known if torch.allclose(a.forward(h_SJ), theirs, rtol=1e-5, atol=1e-6)), own)


@graph_break(grouped_mm_experts_forward)
def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output [T, H] of a Transformers experts module for hidden_states [T, H].

    top_k_index: [T, K], an id outside [0, `experts.num_experts`) marks a pair that is not computed here. top_k_weights:
    [T, K], any float type. Equals `grouped_mm_experts_forward` of Transformers; float32 sums, result in
    hidden_states' dtype. residual: T rows in any shape [..., H], added to the result, which then has its shape.
    """
    act = activation_of(experts)
    if act is None:
        ids_TK = drop_foreign_ids(top_k_index, experts.num_experts)
        out = grouped_mm_experts_forward(experts, hidden_states, ids_TK, top_k_weights)
    else:
        # under autocast Transformers computes experts in their weights' dtype too
        x_TH = hidden_states.to(experts.down_proj.dtype)
        if residual is not None and residual.dtype == x_TH.dtype == hidden_states.dtype:
            return compute(experts, act, x_TH, top_k_index, top_k_weights, residual)
        out = compute(experts, act, x_TH, top_k_index, top_k_weights).to(hidden_states.dtype)
    return out if residual is None else residual + out.view(residual.shape)


def compute(
    experts: Any,
    act: Activation,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    residual: torch.Tensor | None = None,
    exchange: Exchange = LOCAL,
) -> torch.Tensor:
    """`experts_forward` by `act`, of rows that come by `exchange`. x, experts' weights and residual have one dtype."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w_up, w_down = getattr(experts, up), experts.down_proj
    b_up, b_down = (getattr(experts, f"{up}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    scale, transposed = 1 / getattr(experts, "grad_divisor", 1), experts.is_transposed
    factors = vars(experts).get("low_rank", {})  # of adapters, set for this call (lora.py)
    low_up, low_down = (factors.get(name, (None, None)) for name in (up, "down_proj"))
    parts = [w._local_tensor if isinstance(w, DTensor) else w for w in (w_up, b_up, w_down, b_down)]
    # `_Up`'s backward makes a gradient as large. w_down's own has gone to its weight by then, as autograd sees w_down
    # behind `_Up` alone
    seen = None if w_up.requires_grad else w_down
    h_SJ, a_SI, routed = _Up.apply(
        x_TH.contiguous(), weight_TK, w_up, b_up, *low_up, seen, b_down, *low_down, ids_TK, act, scale, parts,
        transposed, exchange,
    )  # fmt: skip
    return _Down.apply(h_SJ, a_SI, w_down, b_down, *low_down, residual, routed, exchange)


class _Up(torch.autograd.Function):
    """(h [S, J], activation(h) [S, I], (group, weights [M, K], v [S, R], w_down, b_down)) of the dispatched rows;
    gradients come for h only. h may lack rows.

    parts: of both weights and biases what this rank holds. Gradients come back as the weights are, times `scale`. Of
    adapters the factors are A [E, R, in] and B [E, R, out], or None: u = x · Aᵀ and v = activation(h) · Aᵀ.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH, weight_TK, w_up, b_up, up_A, up_B, w_down, b_down, down_A, down_B, ids_TK, act, scale,
        parts: list, transposed: bool, exchange: Exchange,
    ):  # fmt: skip
        ctx.specs = [getattr(w, "_spec", None) for w in (w_up, b_up)]
        w_up, b_up, w_down, b_down = parts
        if not transposed:
            w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
        x_MH, ids_MK, weight_MK = exchange.dispatch(x_TH, ids_TK, weight_TK)
        group = group_by_expert(ids_MK, w_up.shape[0], weight_MK, exchange.rows_here)
        keep = None
        if exchange.sharers > 1 and group.block:
            keep = max(1, -(-len(group.token_S) * 5 // (4 * exchange.sharers * group.block))) * group.block
        u_SR = None if up_A is None else thin_rows(x_MH, up_A, group, gathered=True)
        h_SJ, a_SI, ctx.alternating = up_act(x_MH, Weights(w_up, b_up, u_SR, up_B), group, act, keep)
        mark_recomputable(
            (h_SJ,), lambda x, *by: up_act(x, Weights(*by), group, act, keep),
            x_MH, w_up, b_up, u_SR, up_B, level="experts",
        )  # fmt: skip
        v_SR = None if down_A is None else thin_rows(a_SI, down_A, group, gathered=False)
        ctx.act, ctx.scale, ctx.transposed, ctx.exchange = act, scale, transposed, exchange
        ctx.tiles, ctx.block = group.tiles, group.block
        weights = w_up, b_up, up_A, up_B, w_down, b_down, down_A, down_B
        rows = group.token_S, group.position_TK, group.bounds, group.weight_S
        ctx.save_for_backward(x_MH, h_SJ, weight_MK, ids_MK, *weights, u_SR, v_SR, *rows)
        ctx.mark_non_differentiable(a_SI)
        ctx.set_materialize_grads(False)
        return h_SJ, a_SI, (group, weight_MK, v_SR, w_down, b_down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_):
        (dh_SJ, x_MH, w_up, group, dweight_MK, db_up, u_SR, up_A, up_B), ctx.from_down = ctx.from_down, None
        dx_MH = dw_up = dA = dB = None
        du_SR = None if up_B is None else thin_rows(dh_SJ, up_B, group, gathered=False)
        if ctx.needs_input_grad[0]:
            # the product's S rows have no name, so that they are freed at once
            by = Weights(w_up.transpose(1, 2), None, du_SR, up_A)
            dx_MH = combine(grouped_gemm(dh_SJ, by, group), group.position_TK)
        with ctx.exchange.waits:
            wait = ctx.exchange.dispatch_backward(dx_MH, dweight_MK)  # behind the weights' gradient, if it can
            if ctx.needs_input_grad[2]:
                dw_up = grouped_wgrad(x_MH, dh_SJ, group, w_up, ctx.scale)
                dw_up = _spread(dw_up if ctx.transposed else dw_up.transpose(1, 2), ctx.specs[0])
            if db_up is not None:
                db_up = _spread(db_up * ctx.scale, ctx.specs[1])
            if du_SR is not None and ctx.needs_input_grad[4]:
                dA = thin_wgrad(x_MH, du_SR, up_A, group, gathered=True)
            if ctx.needs_input_grad[5]:
                dB = thin_wgrad(dh_SJ, u_SR, up_B, group, gathered=False)
            return *wait(), dw_up, db_up, dA, dB, *[None] * 10


class _Down(torch.autograd.Function):
    """The weighted sums of the down-projected activation, of which `h`, from `_Up`, stands for the gradient."""

    @staticmethod
    def forward(ctx: Any, h_SJ, a_SI, w_down, b_down, down_A, down_B, residual, routed: tuple, exchange: Exchange):
        ctx.up, ctx.specs = h_SJ.grad_fn, [getattr(w, "_spec", None) for w in (w_down, b_down)]
        group, weight_MK, v_SR, w_down, b_down = routed
        y_SH = grouped_gemm(a_SI, Weights(w_down, b_down, v_SR, down_B), group)
        return exchange.combine(y_SH, group.position_TK, weight_MK, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        up = ctx.up
        if up is None:  # nothing but the residual has a gradient
            return *[None] * 6, dout, None, None
        # a checkpointed layer is recomputed here, exchanges too: they must not come between `dout_MH` and its readers
        x_MH, h_SJ, weight_MK, ids_MK, *weights, u_SR, v_SR, token_S, position, bounds, weight_S = up.saved_tensors
        w_up, b_up, up_A, up_B, w_down, b_down, down_A, down_B = weights
        group = Grouping(token_S, position, bounds, weight_S, up.tiles, up.block)
        _, _, need_w_down, need_b_down, need_A, need_B, need_residual = ctx.needs_input_grad[:7]
        _, need_weight, _, need_b_up = up.needs_input_grad[:4]
        with up.exchange.waits:
            dout_MH = up.exchange.combine_backward(dout.reshape(-1, dout.shape[-1]))

        more_SJ = None
        if len(h_SJ) < len(token_S):
            more_SJ = up_again(x_MH, Weights(w_up, b_up, u_SR, up_B), group, up.act, h_SJ)
        dv_SR = None if down_B is None else thin_rows(dout_MH, down_B, group, gathered=True)  # times weight: later
        by = Weights(w_down.transpose(1, 2), None, dv_SR, down_A)
        dh_SJ, wa_SI, dweight_PS, db_up = down_dact(
            dout_MH, by, h_SJ, group, up.act, need_b_up, more_SJ, up.alternating
        )
        dweight_MK = dw_down = db_down = dA = dB = None
        if need_weight:
            dweight_MK = unsort(dweight_PS, group, weight_MK.dtype if b_down is None else torch.float32)
            if b_down is not None:  # of the bias comes ⟨dout_t, b_e⟩, one dense product
                dot_MK = (dout_MH @ b_down.t()).float().gather(1, ids_MK.clamp(0, len(b_down) - 1))
                dweight_MK = (dweight_MK + torch.where(position >= 0, dot_MK, 0)).to(weight_MK.dtype)
        if need_w_down:
            dw_down = grouped_wgrad(dout_MH, wa_SI, group, w_down.transpose(1, 2), up.scale)
            dw_down = _spread(dw_down.transpose(1, 2) if up.transposed else dw_down, ctx.specs[0])
        if need_b_down:  # Σ weight_tk · dout_t over the pairs of each expert, one dense product
            share_ME = weight_MK.new_zeros(len(ids_MK), len(b_down) + 1, dtype=torch.float32)
            share_ME.scatter_add_(1, drop_foreign_ids(ids_MK, len(b_down)), weight_MK.float())
            db_down = share_ME[:, :-1].to(dout_MH.dtype).t() @ dout_MH
            db_down = _spread(db_down * up.scale, ctx.specs[1])
        if dv_SR is not None and need_A:
            dA = thin_wgrad(wa_SI, dv_SR, down_A, group, gathered=False)
        if need_B:
            wv_SR = v_SR * weight_S[:, None].to(v_SR.dtype)
            dB = thin_wgrad(dout_MH, wv_SR, down_B, group, gathered=True)
        up.from_down = dh_SJ, x_MH, w_up, group, dweight_MK, db_up, u_SR, up_A, up_B
        no_values = h_SJ.new_zeros(()).expand(h_SJ.shape)  # zeros: anomaly detection looks for nan
        return no_values, None, dw_down, db_down, dA, dB, dout if need_residual else None, None, None


def _spread(grad: torch.Tensor, spec: Any) -> torch.Tensor:
    """The gradient of a weight of which this rank holds a part; `from_local` would derive its layout anew."""
    return grad if spec is None else DTensor(grad, spec, requires_grad=False)  # type: ignore[call-arg]


class Dispatch(EPImplementation):
    """The experts of one layer, spread over the ranks of `ep_mesh`; each call makes an exchange by `transport`.

    group, rank, num_ranks: the ranks, and this one among them; it holds `num_local_experts`, those of rank 0 are the
    first. waits: within it the exchanges are made. slices: the ranks of a tensor-parallel group hold the same tokens,
    each sends a slice, and the results are gathered back over `tp_mesh`. All state lives in the call.
    """

    num_local_experts: Any

    def __init__(self, transport: Any, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.transport, self.experts, self.slices = transport, experts, tp_mesh.size() > 1
        self.group, self.rank, self.num_ranks = ep_mesh.get_group(), ep_mesh.get_local_rank(), ep_mesh.size()
        self.waits = step_timeout("some experts", self.group)  # the layout sets its place, their name
        experts.dispatch = self

    @torch.compiler.disable
    def __call__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: torch.Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        """Output [T, H] for hidden_states [T, H], global expert ids [T, K] and routing weights [T, K]; T may be 0.

        residual: [..., H] in the hidden states' dtype, added to the result, which then has its shape. exchange: one of
        these tokens that began before the router had chosen, unless this `slices`.
        """
        experts, x_TH, ids_TK, weight_TK = self.experts, hidden_states, top_k_index, top_k_weights
        if self.slices:
            x_TH, ids_TK, weight_TK = (_my_rows(x, self.tp_mesh) for x in (x_TH, ids_TK, weight_TK))
        inside = None if self.slices else residual
        exchange = exchange or self.transport(self, x_TH)
        ours = experts.config._experts_implementation == NAME and x_TH.dtype == experts.down_proj.dtype
        act = activation_of(experts) if ours else None
        with self.waits:
            if act is not None:
                out = compute(experts, act, x_TH, ids_TK, weight_TK, inside, exchange)
            else:  # another backend, which finds this rank's part of the weights in the place of the whole
                x_MH, weight_MK, ids_MK = _Dispatch.apply(x_TH, weight_TK, ids_TK, exchange)
                with _use_local_dtensor_params(experts):
                    y_MH = self.experts_forward(x_MH, drop_foreign_ids(ids_MK, self.num_local_experts), weight_MK)
                out = _Combine.apply(y_MH.to(x_TH.dtype), inside, exchange)
        if not self.slices:
            return out
        out = _all_rows(out, self.tp_mesh, hidden_states.shape)
        return out if residual is None else residual + out.view(residual.shape)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH, weight_TK, ids_TK, exchange: Exchange):
        ctx.exchange = exchange
        x_MH, ids_MK, weight_MK = exchange.dispatch(x_TH, ids_TK, weight_TK)
        ctx.mark_non_differentiable(ids_MK)
        return x_MH, weight_MK, ids_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH, dweight_MK, _):
        need_x, need_weight, *_ = ctx.needs_input_grad
        with ctx.exchange.waits:
            wait = ctx.exchange.dispatch_backward(dx_MH if need_x else None, dweight_MK if need_weight else None)
            return *wait(), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MH, residual, exchange: Exchange):
        ctx.exchange, token_M = exchange, torch.arange(len(y_MH), dtype=torch.int32, device=y_MH.device)
        return exchange.combine(y_MH.contiguous(), token_M[:, None], None, residual)  # sums are their tokens' only rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        with ctx.exchange.waits:
            dy_MH = ctx.exchange.combine_backward(dout.flatten(0, -2)).clone() if ctx.needs_input_grad[0] else None
        return dy_MH, dout if ctx.needs_input_grad[1] else None, None


def _my_rows(x: torch.Tensor, tp_mesh: Any) -> torch.Tensor:
    """This rank's slice of tokens that the whole group holds; backward gathers the slices' gradients."""
    x = x.to_local() if isinstance(x, DTensor) else x
    whole = DTensor.from_local(x, tp_mesh, [Replicate()], run_check=False)
    return whole.redistribute(tp_mesh, [Shard(0)]).to_local()


def _all_rows(x: torch.Tensor, tp_mesh: Any, shape: torch.Size) -> torch.Tensor:
    """The slices of all ranks of the group, in order; uneven and empty ones too."""
    x = x.contiguous()
    return DTensor.from_local(x, tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()


def _by_name(experts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A stock model that has a fused one's configuration runs Transformers' code."""
    ours = getattr(experts, "in_fused_model", False)
    return (experts_forward if ours else grouped_mm_experts_forward)(experts, *args, **kwargs)


ExpertsInterface.register(NAME, _by_name)
for _transport in TRANSPORTS.values():
    EPImplementationInterface.register(_transport.ep_implementation, partial(Dispatch, _transport))
