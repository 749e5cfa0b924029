"""All experts of a layer at once: the backend "expertmesh" of Transformers' `ExpertsInterface`.

    dispatch → group → up + activation → down → combine             forward
    combine' → down-dgrad + activation' → weight gradients → up-dgrad → dispatch'      backward

`_Up` computes the forward up to the activation, `_Down` the rest. They are two autograd functions because recomputing a
checkpointed layer stops at its last saved tensor: `_Down` saves none, so it is not rerun. This rank has T tokens; its
experts receive M tokens, which are S = M·K rows. `_Up` saves x [M, H], the up-projection's output h [S, J] and the
routing. The backward recomputes the activation from h; the down-dgrad also yields the routing weights' gradient.
`_Down.backward` reads the saved tensors of `_Up` and hands its results to `_Up.backward` in `from_down`; the gradient
that autograd passes between them is a dummy.

With expert parallelism only the `Exchange` differs: a `Dispatch`, the forward of the experts, makes one for each call
with one of `TRANSPORTS`. All layouts of Transformers' experts modules work: gated (concatenated or interleaved) or not,
with or without biases, weights [E, out, in] or transposed.
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
#: parameters of `use_experts_implementation` that a newer Transformers added and this backend does not support
_NEW_FLAGS = sorted(
    inspect.signature(use_experts_implementation).parameters.keys()
    - {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
    - {"experts_class", "experts_interface"}
)
#: value of `DistributedSetup.dispatch` -> transport that sends tokens to experts on other ranks
TRANSPORTS: dict[str, Any] = {"all_to_all": AllToAll, "gather": Gather}


def why_not(experts: Any) -> str | None:
    """Return why this experts module cannot run on the "expertmesh" backend, or None if it can."""
    if getattr(experts, "has_post_expert_norm", False):
        return "each expert's output is normalised before it is weighted"
    act_fn = getattr(experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()):
        return f"their activation, {type(act_fn).__name__}, has parameters"
    unknown = next((name for name in _NEW_FLAGS if getattr(experts, name, False)), None)
    return f"their class sets {unknown}, which is not supported" if unknown else None


def is_experts(module: Any) -> bool:
    """Return whether this is one of Transformers' experts modules, which any experts backend can run."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


def uses_fast_experts(experts: Any) -> bool:
    """Return whether this backend runs the module, dividing weight gradients by its `grad_divisor`, if it has one."""
    return experts.config._experts_implementation == NAME and why_not(experts) is None


def activation_of(experts: Any) -> Activation | None:
    """Return a built-in `Activation` or one that calls the module's functions; None if this backend cannot run it."""
    act_fn: Any = getattr(experts, "act_fn", None)  # GPT-OSS has only `_apply_gate`
    constants = float(getattr(experts, "alpha", 1.0)), float(getattr(experts, "limit", math.inf))
    gate_fn = getattr(experts._apply_gate, "__func__", experts._apply_gate)
    key = gate_fn, act_fn, isinstance(act_fn, nn.Module) and not is_unmodified(act_fn), constants
    cached = vars(experts).get("_cached_activation")  # (key, activation)
    if cached is None or cached[0] != key:
        cached = key, None if why_not(experts) else _activation(experts, key[2], constants)
        experts.__dict__["_cached_activation"] = cached
    return cached[1]


@torch.no_grad()
def _activation(experts: Any, modified: bool, constants: tuple[float, float]) -> Activation:
    """Return the built-in activation that matches the module's functions numerically, else one that calls them."""
    gated, interleaved = experts.has_gate, experts.has_gate and not experts.is_concatenated
    custom = Activation("custom", gated, interleaved, fn=experts._apply_gate if gated else experts.act_fn)
    if modified:
        return custom
    h_SJ = torch.linspace(-30, 30, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(0))].view(16, 32)
    expected, builtin = custom.forward(h_SJ), [Activation("relu2", gated=False)]
    if gated:
        builtin = [Activation("silu", True, interleaved), Activation("clamped", True, interleaved, *constants)]
    return next((a for a in builtin if torch.allclose(a.forward(h_SJ), expected, rtol=1e-5, atol=1e-6)), custom)


@graph_break(grouped_mm_experts_forward)
def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output [T, H] of a Transformers experts module for hidden_states [T, H].

    top_k_index: [T, K]; pairs with an id outside [0, `experts.num_experts`) are skipped. top_k_weights: [T, K], any
    float type. The result equals `grouped_mm_experts_forward` of Transformers: sums are float32, the output has
    hidden_states' dtype. residual: T rows in any shape [..., H], added to the result, which then has this shape.
    """
    act = activation_of(experts)
    if act is None:
        ids_TK = drop_foreign_ids(top_k_index, experts.num_experts)
        out = grouped_mm_experts_forward(experts, hidden_states, ids_TK, top_k_weights)
    else:
        # as Transformers does under autocast: experts compute in their weights' dtype
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
    """`experts_forward` with activation `act` on rows sent by `exchange`. x, weights and residual share one dtype."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w_up, w_down = getattr(experts, up), experts.down_proj
    b_up, b_down = (getattr(experts, f"{up}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    scale, transposed = 1 / getattr(experts, "grad_divisor", 1), experts.is_transposed
    factors = vars(experts).get("low_rank", {})  # adapters' factors, set for this call (lora.py)
    low_up, low_down = (factors.get(name, (None, None)) for name in (up, "down_proj"))
    parts = [w._local_tensor if isinstance(w, DTensor) else w for w in (w_up, b_up, w_down, b_down)]
    # `_Down.backward` needs the autograd node of `_Up`, so w_down is an input of `_Up` if w_up is frozen. Otherwise it
    # is not, so that w_down's gradient is accumulated before `_Up.backward` allocates one of the same size
    node_input = None if w_up.requires_grad else w_down
    h_SJ, a_SI, routed = _Up.apply(
        x_TH.contiguous(), weight_TK, w_up, b_up, *low_up, node_input, b_down, *low_down, ids_TK, act, scale, parts,
        transposed, exchange,
    )  # fmt: skip
    return _Down.apply(h_SJ, a_SI, w_down, b_down, *low_down, residual, routed, exchange)


class _Up(torch.autograd.Function):
    """Dispatch and return (h [S, J], activation(h) [S, I], (group, weights [M, K], v [S, R], w_down, b_down)).
    Only h gets a gradient. h may have fewer than S rows; the backward recomputes the rest. parts: the local shards of
    both weights and biases. Weight gradients have the layout of the weights and are multiplied by `scale`. An adapter's
    factors are A [E, R, in] and B [E, R, out], or None: u = x · Aᵀ and v = activation(h) · Aᵀ.
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
        group = group_by_expert(ids_MK, w_up.shape[0], weight_MK, exchange.num_local_rows)
        h_rows = None
        if exchange.sharing_ranks > 1 and group.block:
            h_rows = max(1, -(-len(group.token_S) * 5 // (4 * exchange.sharing_ranks * group.block))) * group.block
        u_SR = None if up_A is None else thin_rows(x_MH, up_A, group, gathered=True)
        h_SJ, a_SI, ctx.alternating = up_act(x_MH, Weights(w_up, b_up, u_SR, up_B), group, act, h_rows)
        mark_recomputable(
            (h_SJ,), lambda x, *weights: up_act(x, Weights(*weights), group, act, h_rows),
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
            # no variable holds the product's S rows, so they are freed at once
            projection = Weights(w_up.transpose(1, 2), None, du_SR, up_A)
            dx_MH = combine(grouped_gemm(dh_SJ, projection, group), group.position_TK)
        with ctx.exchange.timeout:
            wait = ctx.exchange.dispatch_backward(dx_MH, dweight_MK)  # may overlap the weight gradient
            if ctx.needs_input_grad[2]:
                dw_up = grouped_wgrad(x_MH, dh_SJ, group, w_up, ctx.scale)
                dw_up = _as_dtensor(dw_up if ctx.transposed else dw_up.transpose(1, 2), ctx.specs[0])
            if db_up is not None:
                db_up = _as_dtensor(db_up * ctx.scale, ctx.specs[1])
            if du_SR is not None and ctx.needs_input_grad[4]:
                dA = thin_wgrad(x_MH, du_SR, up_A, group, gathered=True)
            if ctx.needs_input_grad[5]:
                dB = thin_wgrad(dh_SJ, u_SR, up_B, group, gathered=False)
            return *wait(), dw_up, db_up, dA, dB, *[None] * 10


class _Down(torch.autograd.Function):
    """Return the weighted sums of the down-projected activation. `h` is an input so that autograd links it to `_Up`."""

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
        if up is None:  # only the residual requires grad
            return *[None] * 6, dout, None, None
        # read these first: this may recompute a checkpointed layer, whose exchanges would overwrite `dout_MH`
        x_MH, h_SJ, weight_MK, ids_MK, *weights, u_SR, v_SR, token_S, position, bounds, weight_S = up.saved_tensors
        w_up, b_up, up_A, up_B, w_down, b_down, down_A, down_B = weights
        group = Grouping(token_S, position, bounds, weight_S, up.tiles, up.block)
        _, _, need_w_down, need_b_down, need_A, need_B, need_residual = ctx.needs_input_grad[:7]
        _, need_weight, _, need_b_up = up.needs_input_grad[:4]
        with up.exchange.timeout:
            dout_MH = up.exchange.combine_backward(dout.reshape(-1, dout.shape[-1]))

        missing_SJ = None
        if len(h_SJ) < len(token_S):
            missing_SJ = up_again(x_MH, Weights(w_up, b_up, u_SR, up_B), group, up.act, h_SJ)
        dv_SR = None if down_B is None else thin_rows(dout_MH, down_B, group, gathered=True)  # not weighted yet
        projection = Weights(w_down.transpose(1, 2), None, dv_SR, down_A)
        dh_SJ, wa_SI, dweight_PS, db_up = down_dact(
            dout_MH, projection, h_SJ, group, up.act, need_b_up, missing_SJ, up.alternating
        )
        dweight_MK = dw_down = db_down = dA = dB = None
        if need_weight:
            dweight_MK = unsort(dweight_PS, group, weight_MK.dtype if b_down is None else torch.float32)
            if b_down is not None:  # the bias adds ⟨dout_t, b_e⟩: one dense product
                dot_MK = (dout_MH @ b_down.t()).float().gather(1, ids_MK.clamp(0, len(b_down) - 1))
                dweight_MK = (dweight_MK + torch.where(position >= 0, dot_MK, 0)).to(weight_MK.dtype)
        if need_w_down:
            dw_down = grouped_wgrad(dout_MH, wa_SI, group, w_down.transpose(1, 2), up.scale)
            dw_down = _as_dtensor(dw_down.transpose(1, 2) if up.transposed else dw_down, ctx.specs[0])
        if need_b_down:  # Σ weight_tk · dout_t over each expert's pairs: one dense product
            share_ME = weight_MK.new_zeros(len(ids_MK), len(b_down) + 1, dtype=torch.float32)
            share_ME.scatter_add_(1, drop_foreign_ids(ids_MK, len(b_down)), weight_MK.float())
            db_down = share_ME[:, :-1].to(dout_MH.dtype).t() @ dout_MH
            db_down = _as_dtensor(db_down * up.scale, ctx.specs[1])
        if dv_SR is not None and need_A:
            dA = thin_wgrad(wa_SI, dv_SR, down_A, group, gathered=False)
        if need_B:
            wv_SR = v_SR * weight_S[:, None].to(v_SR.dtype)
            dB = thin_wgrad(dout_MH, wv_SR, down_B, group, gathered=True)
        up.from_down = dh_SJ, x_MH, w_up, group, dweight_MK, db_up, u_SR, up_A, up_B
        dummy = h_SJ.new_zeros(()).expand(h_SJ.shape)  # zeros, as anomaly detection rejects nan
        return dummy, None, dw_down, db_down, dA, dB, dout if need_residual else None, None, None


def _as_dtensor(grad: torch.Tensor, spec: Any) -> torch.Tensor:
    """Wrap a local gradient in the DTensor spec of its weight, which `from_local` would derive again."""
    return grad if spec is None else DTensor(grad, spec, requires_grad=False)  # type: ignore[call-arg]


class Dispatch(EPImplementation):
    """The forward of experts that are sharded over the ranks of `ep_mesh`. Each call makes an exchange by `transport`.

    group, rank, num_ranks: the expert-parallel group, this rank in it, its size. Each rank holds `num_local_experts`
    consecutive experts, rank 0 the first. timeout: the limit for exchanges. slices: the ranks of a tensor-parallel
    group have the same tokens, so each sends a slice and results are all-gathered over `tp_mesh`. Calls share no state.
    """

    num_local_experts: Any

    def __init__(self, transport: Any, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.transport, self.experts, self.slices = transport, experts, tp_mesh.size() > 1
        self.group, self.rank, self.num_ranks = ep_mesh.get_group(), ep_mesh.get_local_rank(), ep_mesh.size()
        self.timeout = step_timeout("some experts", self.group)  # the layout sets `place` to the module's name
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
        """Return the output [T, H] for hidden_states [T, H], global ids [T, K] and routing weights [T, K]. T may be 0.
        residual: [..., H] in the hidden states' dtype, added to the result, which then has this shape. exchange: an
        exchange of these tokens that started before the router ran; None if `slices`.
        """
        experts, x_TH, ids_TK, weight_TK = self.experts, hidden_states, top_k_index, top_k_weights
        if self.slices:
            x_TH, ids_TK, weight_TK = (_local_slice(x, self.tp_mesh) for x in (x_TH, ids_TK, weight_TK))
        fused_residual = None if self.slices else residual
        exchange = exchange or self.transport(self, x_TH)
        use_kernels = experts.config._experts_implementation == NAME and x_TH.dtype == experts.down_proj.dtype
        act = activation_of(experts) if use_kernels else None
        with self.timeout:
            if act is not None:
                out = compute(experts, act, x_TH, ids_TK, weight_TK, fused_residual, exchange)
            else:  # another backend: it sees the local shards in place of the DTensor weights
                x_MH, weight_MK, ids_MK = _Dispatch.apply(x_TH, weight_TK, ids_TK, exchange)
                with _use_local_dtensor_params(experts):
                    y_MH = self.experts_forward(x_MH, drop_foreign_ids(ids_MK, self.num_local_experts), weight_MK)
                out = _Combine.apply(y_MH.to(x_TH.dtype), fused_residual, exchange)
        if not self.slices:
            return out
        out = _gather_slices(out, self.tp_mesh, hidden_states.shape)
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
        with ctx.exchange.timeout:
            wait = ctx.exchange.dispatch_backward(dx_MH if need_x else None, dweight_MK if need_weight else None)
            return *wait(), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MH, residual, exchange: Exchange):
        ctx.exchange, token_M = exchange, torch.arange(len(y_MH), dtype=torch.int32, device=y_MH.device)
        return exchange.combine(y_MH.contiguous(), token_M[:, None], None, residual)  # one row per token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        with ctx.exchange.timeout:
            dy_MH = ctx.exchange.combine_backward(dout.flatten(0, -2)).clone() if ctx.needs_input_grad[0] else None
        return dy_MH, dout if ctx.needs_input_grad[1] else None, None


def _local_slice(x: torch.Tensor, tp_mesh: Any) -> torch.Tensor:
    """Return this rank's slice of tokens that are replicated over the group. The backward all-gathers the gradients."""
    x = x.to_local() if isinstance(x, DTensor) else x
    whole = DTensor.from_local(x, tp_mesh, [Replicate()], run_check=False)
    return whole.redistribute(tp_mesh, [Shard(0)]).to_local()


def _gather_slices(x: torch.Tensor, tp_mesh: Any, shape: torch.Size) -> torch.Tensor:
    """All-gather the slices of the group's ranks in order. Slices may be uneven or empty."""
    x = x.contiguous()
    return DTensor.from_local(x, tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()


def _registered_forward(experts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run a fused model's experts; a stock model with the same configuration object runs Transformers' code."""
    ours = getattr(experts, "in_fused_model", False)
    return (experts_forward if ours else grouped_mm_experts_forward)(experts, *args, **kwargs)


ExpertsInterface.register(NAME, _registered_forward)
for _transport in TRANSPORTS.values():
    EPImplementationInterface.register(_transport.ep_implementation, partial(Dispatch, _transport))
