"""What one training step of a model allocates and computes, found by running it on tensors without memory.

The model is on PyTorch's meta device and takes the way of a GPU: the same Python, the same autograd functions, the same
allocations; only kernels are watched instead of launched (`backends.watching`). So nothing here says what a layer keeps
for its backward: layers say it themselves, recomputed ones and adapters, too. A GPU is not needed, nor Triton.

Attention, which on a GPU is a library's, is `_Attention` here: it keeps queries, keys, values, output and the logarithm
of each row's sum, as flash-attn-4, cuDNN and FlashAttention-2 do.
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

#: kernels that multiply: where among their arguments rows, weights [E, …] and experts' bounds [E+1] stand; the kind
PRODUCTS = {
    "grouped_gemm._rows_kernel": (5, 6, 3, "experts"),
    "grouped_grads._down_dact_kernel": (6, 7, 3, "experts, backward"),
    "grouped_grads._grouped_wgrad_kernel": (2, 3, 4, "experts, backward"),
}
#: collectives of tensor parallelism, and how often a ring passes the whole tensor
COLLECTIVES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
aten = torch.ops.aten


class Work(NamedTuple):
    """Operations of one kind: FLOPs, bytes read and written, and how many they are."""

    flops: float = 0.0
    bytes: float = 0.0
    times: int = 0

    def and_also(self, flops: float, size: float) -> "Work":
        """This and one operation more."""
        return Work(self.flops + flops, self.bytes + size, self.times + 1)


@dataclass
class Trace:
    """One step. parameters: {name: (elements on this rank, bytes of one, whether it learns)}. kept: bytes by piece that
    stand from the forward to the backward. peak: bytes by piece at the moment when most stand, parameters and gradients
    included, optimizer states not. work: by kind, "dense", "experts", "attention", "memory" and so on; forward: what of
    it was done before the backward.
    """

    parameters: dict[str, tuple[int, float, bool]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    forward: dict[str, Work] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Counts storages as they come and go, and operations. keys: that a token sees. tp: the ranks of the collectives
    that run. share: of the rows of experts those that are not padding.
    """

    def __init__(self, trace: Trace, keys: float, tp: Group) -> None:
        super().__init__()
        self.trace, self.keys, self.tp, self.share = trace, keys, tp, 1.0
        self._by: dict[str, int] = defaultdict(int)
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self.live = self.most = 0

    def own(self, tensor: torch.Tensor, piece: str) -> None:
        """The storage of this tensor belongs to a piece from now on, whoever made it."""
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is None:
            size, key = storage.nbytes(), id(storage)
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), piece, size
            self.live += size
        else:
            reference, before, size = known
            self._storages[id(storage)] = reference, piece, size
            self._by[before] -= size
        self._by[piece] += size
        if self.live > self.most:
            self.most, self.trace.peak = self.live, dict(self._by)

    def take(self, piece: str, size: int) -> None:
        """So many bytes stand from now on, which no tensor of the step has."""
        self.live += size
        self._by[piece] += size
        if self.live > self.most:
            self.most, self.trace.peak = self.live, dict(self._by)

    def disown(self, tensor: torch.Tensor) -> None:
        """The storage of this tensor does not count."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), "in passing", 0

    def _gone(self, key: int) -> None:
        _, piece, size = self._storages.pop(key)
        self._by[piece] -= size
        self.live -= size

    def standing(self) -> dict[str, int]:
        """Bytes by piece that stand now."""
        return {piece: size for piece, size in self._by.items() if size}

    def add(self, kind: str, flops: float, size: float) -> None:
        """Note one operation."""
        self.trace.work[kind] = self.trace.work[kind].and_also(flops, size)

    def sends(self, what: str, *sent: Sent) -> None:
        """Note exchanges."""
        for one in sent:
            for kind, size in one._asdict().items():
                if size:
                    self.add(kind + what, 0.0, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if DTensor in types:  # what it does with the tensors of this rank comes here again
            return NotImplemented
        kwargs = kwargs or {}
        if FakeTensor in types:  # it asks for a shape
            return func(*args, **kwargs)
        wide = kwargs.get("out_dtype") is not None or any(isinstance(x, torch.dtype) for x in args)
        if wide and func.overloadpacket in (aten.mm, aten.addmm):  # meta tensors have no such product
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            dtype = next(x for x in (kwargs.get("out_dtype"), *args) if isinstance(x, torch.dtype))
            out = kwargs.get("out")
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device) if out is None else out
        else:
            out = func(*args, **kwargs)
        made = _on_meta(tree_leaves(out))
        fresh = [tensor for tensor in made if id(tensor.untyped_storage()) not in self._storages]
        for tensor in fresh:
            self.own(tensor, piece_of_caller())
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
            self.sends(", TP", *[self.tp.ring(whole)] * COLLECTIVES[name])
        elif name not in ("empty", "empty_like", "new_empty", "empty_strided") and (fresh or name.endswith("_")):
            self.add("memory", 0.0, sum(_touched(x) for x in (*given, *made)))
        return out

    def launched(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Note a launch of one of our kernels, of which nothing more happens."""
        function = getattr(kernel, "fn", kernel)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        tensors = [getattr(x, "base", x) for x in arguments]
        size = sum(_touched(x) for x in _on_meta({id(x): x for x in tensors}.values()))
        if name in PRODUCTS:
            token, weights, bounds, kind = PRODUCTS[name]
            rows = len(tensors[4] if tensors[token] is None else tensors[token]) * self.share
            if constants.get("RANK"):  # with adapters it is never quack's
                kind = "experts, adapters"
            if not constants.get("AGAIN"):  # as a rule there are no such rows
                self.add(kind, 2.0 * rows * tensors[weights].numel() / (tensors[bounds].numel() - 1), size)
        elif name == "offload._copy":
            self.add("host, backward" if constants["back"] else "host", 0.0, size)
        else:
            self.add("scan" if name.startswith("ssd") else "memory", 0.0, size)


class _Attention(torch.autograd.Function):
    """[B, S, NQ, V] of queries [B, NQ, S, D], keys and values; causal."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, watch: Watch, window: int | None) -> torch.Tensor:
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
def watched(watch: Watch, memory: int) -> Iterator[None]:
    """Within: meta tensors stand for those of a GPU with so many bytes of memory, and `watch` sees what they do."""

    def attend(query: Any, key: Any, value: Any, *_: Any, window: int | None = None, **__: Any) -> Any:
        return _Attention.apply(query, key, value, watch, window)

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        return attend(*args, **kwargs).transpose(1, 2)

    before, backends.watching = backends.watching, (watch.launched, memory)
    try:
        with (
            quiet(),
            mock.patch.object(flash_attention, "supports", lambda *_: True),
            mock.patch.object(flash_attention, "flash_attention", attend),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa),
            mock.patch.object(dist, "all_reduce", lambda *_, **__: None),  # of norms' gradients, by tensor parallelism
            mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),  # they do not know meta tensors
            mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
            watch,
        ):
            yield
    finally:
        backends.watching = before


@contextmanager
def quiet() -> Iterator[None]:
    """Within: nothing is said, by us or Transformers, of a model that is not going to run."""
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
    """Those that would have memory: deferred logits have none."""
    return [x for x in things if type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_meta]


def _touched(x: torch.Tensor) -> int:
    """Bytes of its elements, those of broadcast dimensions once."""
    return min(x.nbytes, x.untyped_storage().nbytes())
