"""Time our small kernels and Mamba2's, compared with their floor, PyTorch, torch.compile and other libraries.

    python benchmarks/small_kernels.py --out benchmarks/results/h200_small_kernels.json
    python benchmarks/small_kernels.py --only mamba2 --out benchmarks/results/h200_mamba.json

There is a row per kernel, implementation and pass. The floor is the time to move the necessary bytes, and for the loss
that of its matrix products. `cpu_ms` is the CPU time to launch a call. Mamba2 has 4 x 4,096 tokens at Nemotron-3-Nano
widths; its `mixer` is everything between a layer's projections. With TRITON_INTERPRET=1 `--tiny` runs on the CPU.
"""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from shared import BYTES_PER_MS, DEVICE, DTYPE, FLOP_PER_MS, Case, Result, leaf, parser, time_cases
from torch.nn.functional import silu
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

from expertmesh.kernels import causal_conv, clip, grouping, mamba2, rms_norm
from expertmesh.kernels import packed as four_bit
from expertmesh.kernels.activation import relu2, swiglu
from expertmesh.kernels.documents import document_starts
from expertmesh.kernels.mla_rope import mla_rope, mla_rope_reference
from expertmesh.kernels.rope import qk_norm_rope, qk_norm_rope_reference, rotary
from expertmesh.kernels.router import Routing, route, route_reference, router_logits
from expertmesh.kernels.ssd import Sizes, split, ssd_forward
from expertmesh.kernels.ssd_backward import ssd_backward
from expertmesh.layers.head import causal_lm_loss, deferred_logits
from expertmesh.memory.adamw import AdamW

EPS = 1e-6
EXPERTS, TOP_K = 128, 8
DT_LIMIT = 0.001, float("inf")
#: bytes per element that clipping and an AdamW step must move: gradient (twice), weight and states
UPDATES = {None: 16, "8bit": 12 + 16 / 256, "24bit": 14 + 16 / 256, "float32": 30}


def arms(ours: Callable, reference: Callable, **others: Callable) -> dict[str, Callable]:
    """Return our function and PyTorch's, and on a GPU also PyTorch's compiled and those of other libraries."""
    found = {"expertmesh": ours, "torch": reference}
    return found | {"torch.compile": torch.compile(reference), **others} if DEVICE == "cuda" else found


def liger(name: str, **options: Any) -> dict[str, Callable]:
    """Return {"liger": Liger's function of this name}, or {} if Liger is not installed."""
    if find_spec("liger_kernel") is None:
        return {}
    fn = getattr(import_module("liger_kernel.transformers.functional"), f"liger_{name}")
    return {"liger": lambda *inputs: fn(*inputs, **options)}


def norm_cases(tokens: int, hidden: int) -> Iterator[Case]:
    row = tokens * hidden * 2 / BYTES_PER_MS  # one pass over [T, H] in bfloat16
    x, residual, weight = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    theirs, stock = {"eps": EPS, "in_place": False}, rms_norm.rms_norm_reference
    norm = lambda x, w: rms_norm.rms_norm(x, w, EPS), lambda x, w: stock(x, w, EPS)
    yield Case("rms_norm", arms(*norm, **liger("rms_norm", **theirs)), (x, weight), (2 * row, 3 * row))
    added = lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS), lambda x, r, w: (stock(x + r, w, EPS), x + r)
    found = arms(*added, **liger("fused_add_rms_norm", **theirs))
    yield Case("add_rms_norm", found, (x, residual, weight), (4 * row, 4 * row))
    up = leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)
    yield Case("swiglu", arms(swiglu, lambda gate, up: silu(gate) * up, **liger("swiglu")), up, (9 * row, 15 * row))
    squared = arms(relu2, lambda x: torch.relu(x).square())
    yield Case("relu2", squared, (leaf(tokens, 2 * hidden),), (4 * row, 6 * row))


def rope_cases(tokens: int) -> Iterator[Case]:
    """Qwen3's heads, and DeepSeek V3's with widths 128 without and 64 with RoPE, for the tokens that fit on a GPU."""
    width, q_heads, k_heads = 128, 32, 4
    q, k = leaf(1, tokens, q_heads, width), leaf(1, tokens, k_heads, width)
    angle = torch.randn(1, tokens, width, device=DEVICE)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    head_pass, rotation = (tokens * n * width * 2 / BYTES_PER_MS for n in (q_heads + k_heads, 2))
    both = lambda *inputs: qk_norm_rope(*inputs, EPS), lambda *inputs: qk_norm_rope_reference(*inputs, EPS)
    floors = 2 * head_pass + rotation, 3 * head_pass + rotation
    norms, turns = liger("rms_norm", eps=EPS, in_place=False), liger("rope")

    def heads(q, k, q_weight, k_weight, cos, sin):
        q, k = (norms["liger"](x, w).transpose(1, 2) for x, w in ((q, q_weight), (k, k_weight)))
        return turns["liger"](q, k, cos, sin)

    found = arms(*both, **{"liger": heads} if norms else {})
    yield Case("qk_norm_rope", found, (q, k, leaf(width), leaf(width), cos, sin), floors)
    turned = q.detach().transpose(1, 2).requires_grad_(), k.detach().transpose(1, 2).requires_grad_(), cos, sin
    theirs = {name: lambda q, k, *by, fn=fn: fn(q.clone(), k.clone(), *by) for name, fn in turns.items()}
    floors = 2 * head_pass + rotation, 2 * head_pass + rotation  # Liger's kernel works in place, hence the clones
    yield Case("rope", arms(rotary, apply_rotary_pos_emb, **theirs), turned, floors)
    tokens, heads, nope, rope = min(tokens, 4096), 128, 128, 64
    inputs = leaf(1, tokens, heads, nope + rope), leaf(1, tokens, heads, 2 * nope), leaf(1, tokens, rope)
    by = cos[:, :tokens, :rope].contiguous(), sin[:, :tokens, :rope].contiguous()
    row, small = (tokens * n * 2 / BYTES_PER_MS for n in (heads, 3 * rope))  # an element of each head; cos, sin, k_rope
    floors = (3 * (nope + rope) + nope) * row + small, (3 * (nope + rope) + 3 * nope) * row + small
    latent = (lambda *x: mla_rope(*x, *by)), (lambda *x: mla_rope_reference(*x, *by))
    yield Case("mla_rope", arms(*latent), inputs, floors)


def routing_cases(tokens: int, hidden: int) -> Iterator[Case]:
    rows, logits, routing = tokens * TOP_K, leaf(tokens, EXPERTS), Routing("softmax", TOP_K, normalize=True)
    weights, ids = (x.detach() for x in route_reference(logits, routing))
    logit_pass, row = (tokens * n * 2 / BYTES_PER_MS for n in (EXPERTS, hidden))
    products = arms(router_logits, lambda x, w: torch.nn.functional.linear(x.float(), w.float()))
    inputs = leaf(tokens, hidden), leaf(EXPERTS, hidden, scale=0.02)
    yield Case("router_logits", products, inputs, (row + 2 * logit_pass, 2 * row + 2 * logit_pass))
    router = arms(*(lambda x, fn=fn: fn(x, routing, weight_dtype=x.dtype)[0] for fn in (route, route_reference)))
    chosen = rows * 10 / BYTES_PER_MS
    yield Case("route", router, (logits,), (logit_pass + chosen, 2 * logit_pass + chosen))
    group = grouping.group_by_expert, grouping.group_by_expert_reference
    sort = (lambda i, w, fn=fn: fn(i, EXPERTS, w).position_TK for fn in group)
    yield Case("group_by_expert", arms(*sort), (ids, weights), (rows * (8 + 4 + 4 * 4) / BYTES_PER_MS, 0))
    by_kernel, by_reference = (fn(ids, EXPERTS, weights) for fn in group)
    position, y = by_reference.position_TK, leaf(rows, hidden).detach()
    summed = (rows + tokens) * hidden * 2 / BYTES_PER_MS
    yield Case("combine", arms(grouping.combine, grouping.combine_reference), (y, position, weights), (summed, 0))
    back = (lambda p, found=found: grouping.unsort(p, found, y.dtype) for found in (by_kernel, by_reference))
    parts = torch.randn(6, rows, device=DEVICE)
    yield Case("unsort", arms(*back), (parts,), (rows * (6 * 4 + 4 + 2) / BYTES_PER_MS, 0))


def loss_cases(tokens: int, hidden: int, vocab: int) -> Iterator[Case]:
    gemm = 2 * tokens * hidden * vocab / FLOP_PER_MS
    labels = torch.randint(0, vocab, (tokens,), device=DEVICE)
    ours = lambda h, w, at: causal_lm_loss(deferred_logits(h, w, None), at, vocab, shift_labels=at)  # noqa: E731
    stock = lambda h, w, at: ForCausalLMLoss(h @ w.T, at, vocab, shift_labels=at)  # noqa: E731
    both = arms(ours, stock, **liger("fused_linear_cross_entropy"))
    x, weight = leaf(tokens, hidden), leaf(vocab, hidden, scale=0.02)
    yield Case("linear_cross_entropy", both, (x, weight, labels), (gemm, 2 * gemm), True)
    yield Case("linear_cross_entropy, frozen weight", both, (x, weight.detach(), labels), (gemm, gemm), True)


def optimizer_cases(count: int) -> Iterator[Case]:
    """The parts of clipping, and clipping with AdamW compared with PyTorch's, for one tensor of `count` elements.
    PyTorch's moments have the weight's dtype.
    """
    grad, s, row = leaf(count).detach(), torch.tensor(1.001, device=DEVICE), count * 2 / BYTES_PER_MS
    norm = (lambda g, fn=fn: fn([g]) for fn in (clip.squared_sum, clip.squared_sum_reference))
    yield Case("squared_sum", arms(*norm), (grad,), (row, 0))
    scaled = (lambda g, fn=fn: fn([g], s) or g for fn in (clip.scale_, clip.scale_reference_))
    yield Case("scale_", arms(*scaled), (grad,), (2 * row, 0))
    for states, moved in UPDATES.items():
        weight = torch.nn.Parameter(leaf(count).detach().bfloat16())
        weight.grad = torch.randn_like(weight)
        ours = AdamW([weight], lr=1e-5, max_grad_norm=1.0, states=states)
        stock = torch.optim.AdamW([weight], lr=1e-5, fused=True)

        def stock_step(weight: Any = weight, stock: Any = stock) -> torch.Tensor:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            return stock.step() or weight

        name = "clip and adamw" + (f" {states}" if states else "")
        both = arms(lambda ours=ours, weight=weight: ours.step() or weight, stock_step)
        yield Case(name, both, (), (moved / 2 * row, 0))


def decode_cases(experts: int, up: int, hidden: int) -> Iterator[Case]:
    """Decoding of a layer's stack of 4-bit weights, compared with a copy of the same number of output bytes."""
    out = torch.empty(experts, up, hidden, dtype=DTYPE, device=DEVICE)
    for format in ("nf4", "mxfp4"):
        held = four_bit.Packed.like(out, format, False, four_bit.DecodeBuffer())
        held.codes.random_(0, 256)
        held.scales.fill_(1)
        floor = (held.codes.nbytes + held.scales.nbytes + out.nbytes) / BYTES_PER_MS
        yield Case(f"decode {format}", {"expertmesh": held.decode, "copy": out.clone}, (), (floor, 0))


class Kernels(torch.autograd.Function):
    """Autograd function of two kernels: y = forward(*inputs), gradients = backward(dy, *inputs)."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.kernels = backward
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return None, None, *ctx.kernels(dy, *ctx.saved_tensors)


def mamba_cases(sizes: Sizes, packed: bool) -> Iterator[Case]:
    """The parts of Mamba2. packed: rows of eight documents, for which only the mixer has a reference. The floor counts
    each input and output once; dt is between 0.001 and 0.1, as in trained models."""
    rows, inner = (sizes.B, sizes.S), sizes.H * sizes.P
    channels = inner + 2 * sizes.G * sizes.N
    weights = leaf(channels, 4, scale=0.5), leaf(channels)
    A = -torch.arange(1, sizes.H + 1, device=DEVICE, dtype=torch.float32)
    small = A.requires_grad_(), leaf(sizes.H), (leaf(sizes.H) - 4).detach().requires_grad_()
    cuts = torch.arange(1, 8, device=DEVICE) * (sizes.S // 8) + 5
    document = (torch.arange(sizes.S, device=DEVICE)[:, None] >= cuts).sum(1)
    start = document_starts(document.expand(sizes.B, -1)) if packed else None
    options, mark = mamba2.Mamba2Options(sizes.P, sizes.G, DT_LIMIT, EPS), ", packed" if packed else ""

    def floors(forward: int, backward: int) -> tuple[float, float]:
        byte = 2 * sizes.B * sizes.S / BYTES_PER_MS
        return forward * byte, backward * byte

    def case(name: str, pair: tuple, reference: Callable, theirs: dict, inputs: tuple, *widths: int) -> Case:
        others = {} if packed else {"torch": reference} | theirs
        found = {"expertmesh": lambda *leaves: Kernels.apply(*pair, *leaves)} | others
        return Case(f"mamba2 {name}{mark}", found, inputs, floors(*widths))

    def conv(dy, x, weight, bias):
        dx = torch.empty_like(x)
        return dx, *causal_conv.conv_backward(x, weight, bias, start, dy, dx)

    def scan(dy, xbc, dt, A, D, bias):
        dxbc, ddt = torch.empty_like(xbc), torch.empty_like(dt)
        dA, dbias, dD = ssd_backward(xbc, dt, A, D, bias, start, sizes, DT_LIMIT, dy, dxbc, ddt)
        return dxbc, ddt, dA, dD, dbias

    conv_by_torch = lambda x, *w: mamba2.conv_reference(x.mT, *w, "silu").mT  # noqa: E731

    def scan_by_torch(xbc, dt, A, D, bias):
        x, B, C = split(xbc, sizes)
        y = mamba2.scan_reference(x, dt, A, B, C, 64, D, bias, dt_softplus=True, dt_limit=DT_LIMIT)
        return y.flatten(2).to(xbc.dtype)

    def norm(dy, x, gate, weight):
        dgate = torch.empty_like(gate)
        dx, dweight = rms_norm.launch_backward(x, gate, weight, dy, dgate, EPS, "float32", sizes.G)
        return dx, dgate, dweight

    if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        theirs = mamba_libraries(sizes) if DEVICE == "cuda" else {"scan": {}, "norm": {}}
        pair = lambda *a: causal_conv.conv_forward(*a, start), conv
        yield case("conv", pair, conv_by_torch, {}, (leaf(*rows, channels), *weights), 2 * channels, 3 * channels)
        inputs = leaf(*rows, channels, scale=0.3), leaf(*rows, sizes.H), *small
        widths = channels + inner + sizes.H, 2 * channels + inner + 2 * sizes.H
        pair = lambda *a: ssd_forward(*a, start, sizes, DT_LIMIT), scan
        yield case("scan", pair, scan_by_torch, theirs["scan"], inputs, *widths)
        pair = lambda *a: rms_norm.launch_forward(*a, EPS, "float32", sizes.G)[0], norm
        kind = {"variance_epsilon": EPS, "group_size": inner // sizes.G}
        reference = lambda x, gate, w: mamba2.norm_reference(SimpleNamespace(weight=w, **kind), x, gate)  # noqa: E731
        inputs = leaf(*rows, inner), leaf(*rows, inner), leaf(inner)
        if not packed:  # packing makes no difference
            yield case("norm", pair, reference, theirs["norm"], inputs, 3 * inner, 5 * inner)
    projected = inner + channels + sizes.H
    mixer = {
        name: lambda x, *w, fn=fn: fn(x, mamba2.Mamba2Weights(*w), options, start)
        for name, fn in (("expertmesh", mamba2.mamba2), ("torch", mamba2.mamba2_reference))
    }
    inputs = leaf(*rows, projected), *weights, *small, leaf(inner)
    yield Case(f"mamba2 mixer{mark}", mixer, inputs, floors(projected + inner, 2 * projected + inner))


def mamba_libraries(sizes: Sizes) -> dict[str, dict[str, Callable]]:
    """Return the functions of mamba_ssm for each kernel, if it is installed."""
    found: dict[str, dict[str, Callable]] = {"scan": {}, "norm": {}}
    if find_spec("mamba_ssm"):
        ops = "mamba_ssm.ops.triton"
        combined = import_module(f"{ops}.ssd_combined").mamba_chunk_scan_combined
        gated = import_module(f"{ops}.layernorm_gated").rmsnorm_fn

        def scan(xbc, dt, A, D, bias):
            x, B, C = split(xbc, sizes)
            options = {"dt_bias": bias, "dt_softplus": True, "dt_limit": DT_LIMIT}
            return combined(x, dt, A, B, C, 128, D=D, **options).flatten(2)

        options = {"eps": EPS, "group_size": sizes.H * sizes.P // sizes.G, "norm_before_gate": False}
        found["scan"]["mamba_ssm"] = scan
        found["norm"]["mamba_ssm"] = lambda x, gate, w: gated(x, w, None, z=gate, **options)
    return found


def cases(tiny: bool) -> Iterator[Case]:
    tokens, hidden, vocab = (8, 64, 512) if tiny else (16384, 2048, 151936)
    yield from norm_cases(tokens, hidden)
    yield from rope_cases(tokens)
    yield from routing_cases(tokens, hidden)
    yield from loss_cases(tokens, hidden, vocab)
    yield from optimizer_cases(16 * tokens * hidden)
    yield from decode_cases(*((4, 64, 64) if tiny else (EXPERTS, 1536, hidden)))
    for packed in (False, True):
        yield from mamba_cases(Sizes(1, 136, 2, 16, 1, 16) if tiny else Sizes(4, 4096, 64, 64, 8, 128), packed)


def main() -> None:
    options = parser(__doc__, cases=True).parse_args()
    result = Result(options, ("triton", "liger-kernel", "mamba-ssm"), dtype=str(DTYPE))
    time_cases(result, cases(options.tiny), options)


if __name__ == "__main__":
    main()
