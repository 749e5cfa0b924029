"""Trace what one training step of a model allocates and computes, by running it on the meta device.

The model runs the code path of a GPU, with the same autograd functions and allocations. Only kernel launches are
replaced by a callback that records them (`backends.watching`). So the trace shows what layers save for the backward,
even with recomputation or adapters. Neither a GPU nor Triton is needed.

`_Attention` replaces the attention library of a GPU. It saves queries, keys, values, output and each row's log-sum-exp,
as flash-attn-4, cuDNN and FlashAttention-2 do.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.plan.links import Group, Sent
from expertmesh.plan.pieces import piece_of_caller

#: GEMM kernel -> positions of its token rows, weights [E, …] and experts' bounds [E+1] among its arguments; work kind
PRODUCTS = {
    "grouped_gemm._rows_kernel": (5, 6, 3, "experts"),
    "grouped_grads._down_dact_kernel": (6, 7, 3, "experts, backward"),
    "grouped_grads._grouped_wgrad_kernel": (2, 3, 4, "experts, backward"),
}
#: collective of tensor parallelism -> how many times a ring sends the full tensor
COLLECTIVES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
aten = torch.ops.aten


class Work(NamedTuple):
    """Operations of one kind: FLOPs, bytes read and written, and the number of operations."""

    flops: float = 0.0
    bytes: float = 0.0
    times: int = 0

    def plus(self, flops: float, size: float) -> "Work":
        """Return this plus one operation."""
        return Work(self.flops + flops, self.bytes + size, self.times + 1)


@dataclass
class Trace:
    """A traced step. parameters: {name: (elements on this rank, bytes per element, requires_grad)}. kept: bytes saved
    from the forward to the backward, by piece (part of the model). peak: bytes by piece when most are allocated, with
    parameters and gradients but without optimizer states. work: by kind, such as "dense", "experts", "attention" or
    "memory". forward: the part of `work` in the forward.
    """

    parameters: dict[str, tuple[int, float, bool]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    forward: dict[str, Work] = field(default_factory=dict)


class StepRecorder(TorchDispatchMode):
    """Dispatch mode that tracks live storages and counts operations. keys: average number of keys that a token attends
    to. tp: the group of tensor parallelism. share: fraction of the experts' rows that is not padding.
    """

    def __init__(self, trace: Trace, keys: float, tp: Group) -> None:
        super().__init__()
        self.trace, self.keys, self.tp, self.share = trace, keys, tp, 1.0
        self._by_piece: dict[str, int] = defaultdict(int)
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self.live = self.most = 0

    def attribute(self, tensor: torch.Tensor, piece: str) -> None:
        """Attribute the storage of this tensor to a piece, in place of any earlier one."""
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is None:
            size, key = storage.nbytes(), id(storage)
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), piece, size
            self.live += size
        else:
            reference, before, size = known
            self._storages[id(storage)] = reference, piece, size
            self._by_piece[before] -= size
        self._by_piece[piece] += size
        if self.live > self.most:
            self.most, self.trace.peak = self.live, dict(self._by_piece)

    def count(self, piece: str, size: int) -> None:
        """Count `size` bytes that belong to no tensor of the step. A negative size frees them."""
        self.live += size
        self._by_piece[piece] += size
        if self.live > self.most:
            self.most, self.trace.peak = self.live, dict(self._by_piece)

    def exclude(self, tensor: torch.Tensor) -> None:
        """Do not count the storage of this tensor."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), "in passing", 0

    def _gone(self, key: int) -> None:
        _, piece, size = self._storages.pop(key)
        self._by_piece[piece] -= size
        self.live -= size

    def live_bytes(self) -> dict[str, int]:
        """Return the live bytes by piece."""
        return {piece: size for piece, size in self._by_piece.items() if size}

    def add(self, kind: str, flops: float, size: float) -> None:
        """Record one operation."""
        self.trace.work[kind] = self.trace.work[kind].plus(flops, size)

    def record_sent(self, what: str, *sent: Sent) -> None:
        """Record sent bytes."""
        for part in sent:
            for kind, size in part._asdict().items():
                if size:
                    self.add(kind + what, 0.0, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if DTensor in types:  # DTensor dispatches again with local tensors
            return NotImplemented
        kwargs = kwargs or {}
        if FakeTensor in types:  # shape propagation only
            return func(*args, **kwargs)
        wide = kwargs.get("out_dtype") is not None or any(isinstance(x, torch.dtype) for x in args)
        if wide and func.overloadpacket in (aten.mm, aten.addmm):  # not implemented on the meta device
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            dtype = next(x for x in (kwargs.get("out_dtype"), *args) if isinstance(x, torch.dtype))
            out = kwargs.get("out")
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device) if out is None else out
        else:
            out = func(*args, **kwargs)
        made = _on_meta(tree_leaves(out))
        fresh = [tensor for tensor in made if id(tensor.untyped_storage()) not in self._storages]
        for tensor in fresh:
            self.attribute(tensor, piece_of_caller())
        given = _on_meta(tree_leaves((args, kwargs)))
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
            a = given[-2] if "out" not in kwargs else given[-3]
            self.add(
                "head" if piece_of_caller() == "head" else "dense",
                2.0 * made[0].numel() * a.shape[-1],
                sum(x.nbytes for x in (*given, *made)),
            )
        elif name in COLLECTIVES:
            whole = max(x.nbytes for x in (*given, *made))
            self.record_sent(", TP", *[self.tp.ring(whole)] * COLLECTIVES[name])
        elif name not in ("empty", "empty_like", "new_empty", "empty_strided") and (fresh or name.endswith("_")):
            self.add("memory", 0.0, sum(_touched(x) for x in (*given, *made)))
        return out

    def record_launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Record a kernel launch; nothing runs."""
        function = getattr(kernel, "fn", kernel)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        tensors = [getattr(x, "base", x) for x in arguments]
        size = sum(_touched(x) for x in _on_meta({id(x): x for x in tensors}.values()))
        if name in PRODUCTS:
            token, weights, bounds, kind = PRODUCTS[name]
            rows = len(tensors[4] if tensors[token] is None else tensors[token]) * self.share
            if constants.get("RANK"):  # quack never runs with adapters
                kind = "experts, adapters"
            if not constants.get("RECOMPUTE"):  # usually it has no rows to recompute
                self.add(kind, 2.0 * rows * tensors[weights].numel() / (tensors[bounds].numel() - 1), size)
        elif name == "offload._copy":
            self.add("host, backward" if constants["back"] else "host", 0.0, size)
        else:
            self.add("scan" if name.startswith("ssd") else "memory", 0.0, size)


class _Attention(torch.autograd.Function):
    """Causal attention that returns [B, S, NQ, V] for queries [B, NQ, S, D], keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, watch: StepRecorder, window: int | None) -> torch.Tensor:
        batch, heads, seq, width = query.shape
        out = query.new_empty(batch, seq, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, seq, dtype=torch.float32))
        keys = min(watch.keys, window or watch.keys)
        ctx.watch, ctx.flops = watch, 2.0 * batch * seq * heads * keys * (width + value.shape[-1])
        watch.add("attention", ctx.flops, 0.0)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.watch.add("attention, backward", 2.5 * ctx.flops, 0.0)
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None, None


@contextmanager
def watched(watch: StepRecorder, memory: int) -> Iterator[None]:
    """Context manager: meta tensors act as those of a GPU with `memory` bytes, and `watch` records the step."""

    def attend(query: Any, key: Any, value: Any, *_: Any, window: int | None = None, **__: Any) -> Any:
        return _Attention.apply(query, key, value, watch, window)

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **kwargs).transpose(1, 2)

    before, backends.watching = backends.watching, (watch.record_launch, memory)
    try:
        with (
            quiet(),
            mock.patch.object(flash_attention, "supports", lambda *_: True),
            mock.patch.object(flash_attention, "flash_attention", attend),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa),
            mock.patch.object(dist, "all_reduce", lambda *_, **__: None),  # TP reduces the gradients of norms
            mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),  # autocast does not support meta tensors
            mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
            watch,
        ):
            yield
    finally:
        backends.watching = before


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences warnings of expertmesh and Transformers, as the model will not run."""
    logs = backends.logger(), logging.getLogger("transformers")
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _on_meta(things: Iterable[Any]) -> list[torch.Tensor]:
    """Return the plain meta tensors. Deferred logits, a subclass, have no memory."""
    return [x for x in things if type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_meta]


def _touched(x: torch.Tensor) -> int:
    """Return the bytes of the elements in memory, so broadcast dimensions count once."""
    return min(x.nbytes, x.untyped_storage().nbytes())
