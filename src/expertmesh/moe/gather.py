"""Expert parallelism by all-gather and reduce-scatter, for a few ranks with a fast interconnect.

    all-gather tokens, ids and weights → this rank's experts → reduce-scatter of the partial sums

If the MoE block starts the exchange early, the tokens are sent while the router runs. The host needs nothing about the
routing: shapes depend only on each rank's number of tokens, which the hosts exchange once per forward, so the CPU never
waits for a device. The experts skip pairs whose ids belong to other ranks. The backward swaps the two collectives.

The rows are sent by a link, chosen and logged once per group. `Collectives` uses torch.distributed on any backend.
`Mailboxes` are receive buffers, each mapped by all GPUs of a node. Copy engines move the rows, so no SM is taken from
computation. A rank writes to the others' mailboxes, all ranks pass a barrier on the device, and each
rank reads its own mailbox. Exchanges alternate between two mailboxes: a rank that passes a barrier knows that the
others have read everything sent before the previous barrier, so one barrier per exchange is enough.
"""

import functools
import math
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F

from expertmesh import backends
from expertmesh.kernels.grouping import combine, combine_into
from expertmesh.kernels.recompute import replayed
from expertmesh.moe.exchange import Exchange, Gradients, Maybe, Rows
from expertmesh.records import current
from expertmesh.timeouts import cpu_group, step_timeout

ALIGNMENT = 128  # bytes at which each part of an exchange begins
MAX_CACHED_SLOTS = 1024  # bounds the cache of slots by shape, as shapes may never repeat


class Gather(Exchange):
    """The `Exchange` by a link. M = R · `_rows`: every rank pads its tokens to the largest number on any rank."""

    ep_implementation = "expertmesh-gather"
    _ahead: "tuple[torch.Tensor, Sent] | None" = None  # (x [T, H], its early send), until `dispatch`

    def __init__(self, layer: Any, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.timeout, self.sharing_ranks = layer, layer.timeout, layer.num_ranks
        self._link, self._num_tokens = link_of(layer.group, layer.timeout.place), len(x_TH)
        self._rows = replayed(lambda: max_tokens(len(x_TH), layer.group, layer.timeout.place))
        if ahead and isinstance(self._link, Mailboxes):  # a collective would take SMs from the router
            x_TH = x_TH.detach()
            self._ahead = x_TH, self._link.send_ahead(_padded(x_TH, self._rows))

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        layer, parts = self.layer, [x_TH, ids_TK, weight_TK]
        (early, sent), self._ahead = self._ahead or (None, None), None  # `self` outlives them, until the backward
        if self._num_tokens < self._rows:
            no_expert, reuse = layer.num_ranks * layer.num_local_experts, early is not None and early.is_set_to(x_TH)
            parts = [sent.part if sent and reuse else _padded(x_TH, self._rows)]
            parts += [_padded(ids_TK, self._rows, no_expert), _padded(weight_TK, self._rows)]
        x_MH, ids_MK, weight_MK = self._link.all_gather(parts, sent)
        # ids become local: those of other ranks' experts and of padding fall outside [0, num_local_experts)
        return x_MH, ids_MK.sub_(layer.rank * layer.num_local_experts), weight_MK

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        residual_TH = None if residual is None else residual.reshape(-1, y_SH.shape[1])
        out_TH = self._link.combine(y_SH, position_MK, weight_MK, residual_TH)
        if self._num_tokens < self._rows:
            out_TH = out_TH[: self._num_tokens].clone()  # not a view, as FSDP warns about views
        return out_TH if residual is None else torch.ops.aten._unsafe_view(out_TH, residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        if self._num_tokens < self._rows:
            dout_TH = _padded(dout_TH, self._rows)
        return self._link.all_gather([dout_TH], copy=False)[0]

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Callable[[], Gradients]:
        parts = [part for part in (dx_MH, dweight_MK) if part is not None]
        sums: list[torch.Tensor] = []
        if parts:
            with on_side_stream(parts[0].device):  # overlaps the weight gradient, launched next
                sums = self._link.reduce_scatter(parts)

        def wait() -> Gradients:
            if parts:
                join_side_stream(parts[0].device, sums)
            left = iter(sums if self._num_tokens == self._rows else [x[: self._num_tokens].clone() for x in sums])
            return None if dx_MH is None else next(left), None if dweight_MK is None else next(left)

        return wait


def max_tokens(num_tokens: int, group: dist.ProcessGroup, place: str) -> int:
    """Return the largest number of tokens on any rank of the group, at least 1, by an all-reduce between the hosts.
    Only the first layer in a call of the model communicates, because all layers get the same number of tokens.
    """
    call = current.get()
    if call is not None and group in call.token_counts:
        before, largest = call.token_counts[group]
        if before != num_tokens:
            raise RuntimeError(
                f"dispatch='gather' needs the same number of tokens in every layer of a forward, but {before} became "
                f"{num_tokens}. Use dispatch='all_to_all' with this model."
            )
        return largest
    count = torch.tensor([max(num_tokens, 1)])
    with step_timeout(place, cpu_group(group)):
        dist.all_reduce(count, dist.ReduceOp.MAX, group=cpu_group(group))
    largest = int(count)
    if call is not None:
        call.token_counts[group] = num_tokens, largest
    return largest


def _padded(x: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    """Pad x [T, …] at its end with `value` to `rows` rows."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)), value=value)


class Collectives:
    """The link by torch.distributed. All ranks must pass the same shapes in the same order, as with `Mailboxes`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_gather(self, parts: list[torch.Tensor], sent: Any = None, copy: bool = True) -> list[torch.Tensor]:
        """All-gather each part [n, …] to [R·n, …]. Without `copy` the results are valid until the next exchange only:
        launch all their readers before it. sent: the early send of the first part, for `Mailboxes`.
        """
        outs = [part.new_empty(self.group.size() * len(part), *part.shape[1:]) for part in parts]
        for out, part in zip(outs, parts, strict=True):
            dist.all_gather_into_tensor(out, part.contiguous(), self.group)
        return outs

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Reduce-scatter each part [R·n, …]: return this rank's n rows, summed over all ranks."""
        outs = [part.new_empty(len(part) // self.group.size(), *part.shape[1:]) for part in parts]
        for out, part in zip(outs, parts, strict=True):
            dist.reduce_scatter_tensor(out, part.contiguous(), group=self.group)
        return outs

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """Reduce-scatter the sums over the experts. A residual [T, H] is added to the first T of this rank's rows."""
        (out,) = self.reduce_scatter([combine(y_SH, position_MK, weight_MK)])
        if residual is not None:
            out[: len(residual)] += residual
        return out


class Sent(NamedTuple):
    """An early send of `part` through `box`. `out` is for the parts of all ranks and already holds this rank's."""

    box: Any
    part: torch.Tensor
    out: torch.Tensor


class _Slot(NamedTuple):
    """Views for one tensor: `to`, this rank's slot in each rank's box, and `recv` [R, n, …] in this rank's box."""

    to: list[torch.Tensor]
    recv: torch.Tensor


class Mailboxes:
    """The link by buffers that all ranks write to. `make(bytes)` allocates a `DeviceMemory`; all ranks call it."""

    def __init__(self, group: dist.ProcessGroup, make: Callable[[int], Any]) -> None:
        self.rank, self.size, self.make = group.rank(), group.size(), make
        # staggered so that the ranks do not all write to the same GPU at once
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.boxes: list[Any] = []
        self.bytes = self.turn = 0
        self._slots: dict[Any, list[_Slot]] = {}

    def send_ahead(self, part: torch.Tensor) -> Sent:
        """Start to send `part` on the side stream. The next exchange must be an `all_gather`, on all ranks."""
        part = part.contiguous()
        box, (slot,) = self._box(1 - self.turn, [part], 1)
        out = self._new_out(part)
        with on_side_stream(part.device):
            self._send(slot, part)
            out.view(self.size, *part.shape)[self.rank].copy_(part)
        return Sent(box, part, out)

    def all_gather(self, parts: list[torch.Tensor], sent: Sent | None = None, copy: bool = True) -> list[torch.Tensor]:
        parts = [part.contiguous() for part in parts]
        box, slots = self.begin(parts, 1)
        outs = [self._new_out(part) for part in parts] if copy else [slot.recv.flatten(0, 1) for slot in slots]
        first = 0
        if sent is not None and sent.box is box and sent.part.is_set_to(parts[0]):
            outs[0], first = sent.out, 1
        elif sent is not None:
            join_side_stream(parts[0].device)  # the unused early send must not overwrite this exchange
        with on_side_stream(parts[0].device):  # the local copy takes less time than the sends, so joining is free
            for out, part in zip(outs[first:], parts[first:], strict=True):
                out.view(self.size, *part.shape)[self.rank].copy_(part)
        for slot, part in zip(slots[first:], parts[first:], strict=True):
            self._send(slot, part)
        join_side_stream(parts[0].device)
        box.barrier()
        for slot, out in zip(slots, outs, strict=True) if copy else ():
            for sender in self.others:
                out.view(slot.recv.shape)[sender].copy_(slot.recv[sender])
        return outs

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        box, slots = self.begin(parts, self.size)
        chunks = [part.chunk(self.size) for part in parts]
        for slot, chunk in zip(slots, chunks, strict=True):
            for receiver in self.others:
                slot.to[receiver].copy_(chunk[receiver])
        box.barrier()
        return [self._sum(slot.recv, chunk[self.rank]) for slot, chunk in zip(slots, chunks, strict=True)]

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """As `Collectives.combine`. The combine kernel writes each rank's rows directly into that rank's mailbox."""
        shape_only = y_SH.new_empty_strided((len(position_MK), y_SH.shape[1]), (0, 0))
        box, (slot,) = self.begin([shape_only], self.size)
        combine_into(slot.to, self.rank, y_SH, position_MK, weight_MK, residual)
        box.barrier()
        return self._sum(slot.recv, slot.to[self.rank])

    def _sum(self, recv_RTH: torch.Tensor, own_TH: torch.Tensor) -> torch.Tensor:
        """Return the sum of the other ranks' rows and this rank's own. PyTorch accumulates it in float32."""
        if self.size == 2:
            return own_TH + recv_RTH[1 - self.rank]
        if own_TH.data_ptr() != recv_RTH[self.rank].data_ptr():
            recv_RTH[self.rank].copy_(own_TH)
        return recv_RTH.sum(0)

    def _send(self, slot: _Slot, part: torch.Tensor) -> None:
        for receiver in self.others:
            slot.to[receiver].copy_(part)

    def _new_out(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(self.size * len(part), *part.shape[1:])

    def begin(self, parts: list[torch.Tensor], pieces: int) -> tuple[Any, list[_Slot]]:
        """Switch to the other mailbox. Return it and a slot for each part; a rank is sent 1/`pieces` of a part."""
        self.turn = 1 - self.turn
        return self._box(self.turn, parts, pieces)

    def _box(self, turn: int, parts: list[torch.Tensor], pieces: int) -> tuple[Any, list[_Slot]]:
        """Return a mailbox and each part's slot in it. If the parts do not fit, allocate larger mailboxes."""
        key = (turn, pieces, *((part.shape, part.dtype) for part in parts))
        if key not in self._slots:
            sizes = [-(-part.nbytes * self.size // pieces // ALIGNMENT) * ALIGNMENT for part in parts]
            if sum(sizes) > self.bytes:
                self.bytes = sum(sizes)
                backends.logger().info(
                    f"expertmesh: two mailboxes of {self.bytes / 2**20:.1f} MiB for exchanges between {self.size} GPUs"
                )
                self.boxes = [self.make(self.bytes), self.make(self.bytes)]
                self._slots.clear()
            if len(self._slots) >= MAX_CACHED_SLOTS:
                self._slots.clear()
            self._slots[key], end = [], 0
            for part, size in zip(parts, sizes, strict=True):
                begin, end = end, end + size
                shape = self.size, len(part) // pieces, *part.shape[1:]
                used = slice(begin, begin + math.prod(shape) * part.itemsize)
                views = [self.boxes[turn].of(rank)[used].view(part.dtype).view(shape) for rank in range(self.size)]
                self._slots[key].append(_Slot([view[self.rank] for view in views], views[self.rank]))
        return self.boxes[turn], self._slots[key]


def on_side_stream(device: torch.device) -> AbstractContextManager:
    """Context manager: launches on a GPU go to a side stream and overlap later ones until `join_side_stream`."""
    if device.type != "cuda":
        return nullcontext()
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def join_side_stream(device: torch.device, made: Sequence[torch.Tensor] = ()) -> None:
    """Make the current stream wait for the side stream, and let it use the tensors `made` there."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream()
        stream.wait_stream(_side_stream(device))
        for tensor in made:
            tensor.record_stream(stream)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the high-priority side stream: its one-block barriers must not wait for whole waves of a GEMM."""
    return torch.cuda.Stream(device, priority=-1)


class DeviceMemory:
    """A buffer in PyTorch's symmetric memory on NVIDIA GPUs, without multicast. All ranks construct it together."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        # other ranks may still read or write the mailbox that this one replaces
        torch.cuda.synchronize()
        dist.barrier(cpu_group(group))
        self._own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle: Any = symmetric.rendezvous(self._own, group)
        boxes = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.size())]
        self.of, self.barrier = boxes.__getitem__, handle.barrier


_links: dict[
    dist.ProcessGroup, Collectives | Mailboxes
] = {}  # entries of destroyed groups are removed by `_open_mailboxes`


def link_of(group: dist.ProcessGroup, place: str) -> Collectives | Mailboxes:
    """Return the fastest link of this group. The first call is collective; `place` names it in a timeout's error."""
    if group not in _links:
        _open_mailboxes()
        with step_timeout(place, cpu_group(group), group):
            reason = _why_no_mailboxes(group)
        how = "mailboxes in each other's memory" if reason is None else f"collectives ({reason})"
        backends.logger().info(f"expertmesh: rows travel between {group.size()} ranks by {how}")
        _links[group] = Collectives(group) if reason else Mailboxes(group, functools.partial(DeviceMemory, group))
    return _links[group]


def _open_mailboxes() -> list[Mailboxes]:
    """Drop links of destroyed groups. Return the `Mailboxes` of the others."""
    for group in _links.keys() - dist.distributed_c10d._world.pg_map.keys():
        del _links[group]
    return [link for link in _links.values() if isinstance(link, Mailboxes)]


def mailboxes() -> list[Any]:
    """Return all mailbox buffers in use. They change when larger ones are needed."""
    return [box for link in _open_mailboxes() for box in link.boxes]


def mailbox_barrier() -> None:
    """Barrier in every group with mailboxes: afterwards all rows have been read, so either mailbox may be used next."""
    for link in _open_mailboxes():
        if link.boxes:
            link.boxes[0].barrier()


def _why_no_mailboxes(group: dist.ProcessGroup) -> str | None:
    """Return why this group cannot use mailboxes, or None. All ranks call this and get the same answer."""
    location = (socket.gethostname(), torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, location, cpu_group(group))
    if None in ranks:
        return "not on NVIDIA GPUs"
    if len({host for host, _ in ranks}) > 1:
        return "more than one node"
    devices = [device for _, device in ranks]
    if len(set(devices)) < len(devices):
        return "the ranks do not see each other's GPUs: leave CUDA_VISIBLE_DEVICES the same on all"
    unreachable = [b for a in devices for b in devices if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if unreachable:
        return "GPUs that cannot access each other's memory"
    error = None
    try:  # containers may forbid sharing memory between processes even if the GPUs support it
        DeviceMemory(group, ALIGNMENT)
    except RuntimeError as failed:
        error = str(failed).strip().split("\n")[0]
    errors: list[Any] = [None] * group.size()
    dist.all_gather_object(errors, error, cpu_group(group))
    return next((f"memory cannot be opened to other processes: {e}" for e in errors if e is not None), None)
