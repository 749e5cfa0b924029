"""All tokens to all ranks, and sums of what their experts made of them back: for few ranks that lie near each other.

    all-gather tokens, ids and weights → this rank's experts → reduce-scatter of the partial sums

Tokens are on their way before the router has chosen, if the block around the experts starts the exchange. Nothing about
the routing has to be known on the host: shapes follow from how many tokens each rank has, which the hosts tell each
other once per forward, so the CPU never waits for a device. The experts skip pairs whose ids are not theirs. The
backward mirrors the forward: a reduce-scatter where that gathers, and the reverse.

Rows travel by a link, chosen once for each group and printed. `Collectives` is torch.distributed's, on any backend.
`Mailboxes` are buffers that every GPU of a node maps of every other: rows travel by copy engines, which take no
multiprocessor from what computes. A rank writes into the others' mailboxes, all meet at a barrier on the device, and
each reads its own. There are two, used in turn: who passes a barrier knows that all others have read what came before
the barrier before it, so one barrier per exchange is enough.
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
MOST_PLACES = 1024  # that mailboxes remember; sizes that are never the same again must not fill the memory


class Gather(Exchange):
    """One call's `Exchange`. M = R · `rows`: every rank pads its tokens to those of the rank that has most."""

    ep_implementation = "expertmesh-gather"
    _ahead: "tuple[torch.Tensor, Sent] | None" = None  # x [T, H] and where it is under way, until `dispatch`

    def __init__(self, layer: Any, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.timeout, self.sharing_ranks = layer, layer.timeout, layer.num_ranks
        self._link, self._num_tokens = link_of(layer.group, layer.timeout.place), len(x_TH)
        self._rows = replayed(lambda: max_tokens(len(x_TH), layer.group, layer.timeout.place))
        if ahead and isinstance(self._link, Mailboxes):  # a collective would take multiprocessors from the router
            x_TH = x_TH.detach()
            self._ahead = x_TH, self._link.send_ahead(_padded(x_TH, self._rows))

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        layer, parts = self.layer, [x_TH, ids_TK, weight_TK]
        (began, sent), self._ahead = self._ahead or (None, None), None  # this lives until the backward
        if self._num_tokens < self._rows:
            nobody, under_way = layer.num_ranks * layer.num_local_experts, began is not None and began.is_set_to(x_TH)
            parts = [sent.part if sent and under_way else _padded(x_TH, self._rows)]
            parts += [_padded(ids_TK, self._rows, nobody), _padded(weight_TK, self._rows)]
        x_MH, ids_MK, weight_MK = self._link.all_gather(parts, sent)
        # this rank's experts become 0, 1, …; all others', and the padding, something else
        return x_MH, ids_MK.sub_(layer.rank * layer.num_local_experts), weight_MK

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        residual_TH = None if residual is None else residual.reshape(-1, y_SH.shape[1])
        out_TH = self._link.combine(y_SH, position_MK, weight_MK, residual_TH)
        if self._num_tokens < self._rows:
            out_TH = out_TH[: self._num_tokens].clone()  # no view, of which FSDP warns
        return out_TH if residual is None else torch.ops.aten._unsafe_view(out_TH, residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        if self._num_tokens < self._rows:
            dout_TH = _padded(dout_TH, self._rows)
        return self._link.all_gather([dout_TH], copy=False)[0]

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Callable[[], Gradients]:
        parts = [part for part in (dx_MH, dweight_MK) if part is not None]
        sums: list[torch.Tensor] = []
        if parts:
            with on_side_stream(parts[0].device):  # beside the gradient of weights that is launched next
                sums = self._link.reduce_scatter(parts)

        def wait() -> Gradients:
            if parts:
                join_side_stream(parts[0].device, sums)
            left = iter(sums if self._num_tokens == self._rows else [x[: self._num_tokens].clone() for x in sums])
            return None if dx_MH is None else next(left), None if dweight_MK is None else next(left)

        return wait


def max_tokens(num_tokens: int, group: dist.ProcessGroup, place: str) -> int:
    """The largest number of tokens that any rank of the group has, at least 1; the hosts ask each other.

    In one call of a model only the first layer asks: every layer gets the same number of tokens.
    """
    call = current.get()
    if call is not None and group in call.agreed:
        before, most = call.agreed[group]
        if before != num_tokens:
            raise RuntimeError(
                f"This dispatch needs as many tokens in every layer of a forward, but here {before} became "
                f"{num_tokens}. Use dispatch='all_to_all' with this model."
            )
        return most
    answer = torch.tensor([max(num_tokens, 1)])
    with step_timeout(place, cpu_group(group)):
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=cpu_group(group))
    most = int(answer)
    if call is not None:
        call.agreed[group] = num_tokens, most
    return most


def _padded(x: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    """x [T, …], with rows of `value` behind, up to `rows`."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)), value=value)


class Collectives:
    """By torch.distributed; `Mailboxes` do the same. All ranks pass the same shapes, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_gather(self, parts: list[torch.Tensor], sent: Any = None, copy: bool = True) -> list[torch.Tensor]:
        """For each part [n, …] the parts of all ranks, in their order [R·n, …]; if not `copy`, until the next exchange,
        before which all that reads them must have been launched. sent: of the first part, by mailboxes.
        """
        outs = [part.new_empty(self.group.size() * len(part), *part.shape[1:]) for part in parts]
        for out, part in zip(outs, parts, strict=True):
            dist.all_gather_into_tensor(out, part.contiguous(), self.group)
        return outs

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """For each part [R·n, …] this rank's n rows of it, summed over all ranks."""
        outs = [part.new_empty(len(part) // self.group.size(), *part.shape[1:]) for part in parts]
        for out, part in zip(outs, parts, strict=True):
            dist.reduce_scatter_tensor(out, part.contiguous(), group=self.group)
        return outs

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """This rank's rows of the sums of what all ranks' experts made, plus a residual [T, H] of the first T."""
        (out,) = self.reduce_scatter([combine(y_SH, position_MK, weight_MK)])
        if residual is not None:
            out[: len(residual)] += residual
        return out


class Sent(NamedTuple):
    """A part that is under way through `box`, and room for those of all ranks, in which it is already."""

    box: Any
    part: torch.Tensor
    out: torch.Tensor


class _Place(NamedTuple):
    """Where a tensor of this rank goes in every rank's box; and all ranks' in this rank's own box [R, n, …]."""

    to: list[torch.Tensor]
    came: torch.Tensor


class Mailboxes:
    """The same by buffers that all ranks write to. `make(bytes)` makes one, a `DeviceMemory`, on all ranks at once."""

    def __init__(self, group: dist.ProcessGroup, make: Callable[[int], Any]) -> None:
        self.rank, self.size, self.make = group.rank(), group.size(), make
        # every rank sends to its neighbour first
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.boxes: list[Any] = []
        self.bytes = self.turn = 0
        self._places: dict[Any, list[_Place]] = {}

    def send_ahead(self, part: torch.Tensor) -> Sent:
        """Begin the next exchange of all ranks, an `all_gather` of this part and others, beside what is launched."""
        part = part.contiguous()
        box, (place,) = self._box(1 - self.turn, [part], 1)
        out = self._room_for_all(part)
        with on_side_stream(part.device):
            self._send(place, part)
            out.view(self.size, *part.shape)[self.rank].copy_(part)
        return Sent(box, part, out)

    def all_gather(self, parts: list[torch.Tensor], sent: Sent | None = None, copy: bool = True) -> list[torch.Tensor]:
        parts = [part.contiguous() for part in parts]
        box, places = self.begin(parts, 1)
        outs = [self._room_for_all(part) for part in parts] if copy else [place.came.flatten(0, 1) for place in places]
        first = 0
        if sent is not None and sent.box is box and sent.part.is_set_to(parts[0]):
            outs[0], first = sent.out, 1
        elif sent is not None:
            join_side_stream(parts[0].device)  # what was sent must not arrive later than what is
        with on_side_stream(parts[0].device):  # the shorter way, so that nothing waits for another stream in the end
            for out, part in zip(outs[first:], parts[first:], strict=True):
                out.view(self.size, *part.shape)[self.rank].copy_(part)
        for place, part in zip(places[first:], parts[first:], strict=True):
            self._send(place, part)
        join_side_stream(parts[0].device)
        box.barrier()
        for place, out in zip(places, outs, strict=True) if copy else ():
            for sender in self.others:
                out.view(place.came.shape)[sender].copy_(place.came[sender])
        return outs

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        box, places = self.begin(parts, self.size)
        chunks = [part.chunk(self.size) for part in parts]
        for place, chunk in zip(places, chunks, strict=True):
            for receiver in self.others:
                place.to[receiver].copy_(chunk[receiver])
        box.barrier()
        return [self._sum(place.came, chunk[self.rank]) for place, chunk in zip(places, chunks, strict=True)]

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """The kernel that combines writes each rank's rows into that rank's mailbox."""
        like = y_SH.new_empty_strided((len(position_MK), y_SH.shape[1]), (0, 0))
        box, (place,) = self.begin([like], self.size)
        combine_into(place.to, self.rank, y_SH, position_MK, weight_MK, residual)
        box.barrier()
        return self._sum(place.came, place.to[self.rank])

    def _sum(self, came_RTH: torch.Tensor, own_TH: torch.Tensor) -> torch.Tensor:
        """What came from the others and this rank's own; made in float32."""
        if self.size == 2:
            return own_TH + came_RTH[1 - self.rank]
        if own_TH.data_ptr() != came_RTH[self.rank].data_ptr():
            came_RTH[self.rank].copy_(own_TH)
        return came_RTH.sum(0)

    def _send(self, place: _Place, part: torch.Tensor) -> None:
        for receiver in self.others:
            place.to[receiver].copy_(part)

    def _room_for_all(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(self.size * len(part), *part.shape[1:])

    def begin(self, parts: list[torch.Tensor], pieces: int) -> tuple[Any, list[_Place]]:
        """Take the other mailbox for exchanges of one of the `pieces` of each part: it and the parts' places."""
        self.turn = 1 - self.turn
        return self._box(self.turn, parts, pieces)

    def _box(self, turn: int, parts: list[torch.Tensor], pieces: int) -> tuple[Any, list[_Place]]:
        """A mailbox and each part's place there. Larger boxes are made if the parts need them."""
        key = (turn, pieces, *((part.shape, part.dtype) for part in parts))
        if key not in self._places:
            sizes = [-(-part.nbytes * self.size // pieces // ALIGNMENT) * ALIGNMENT for part in parts]
            if sum(sizes) > self.bytes:
                self.bytes = sum(sizes)
                backends.logger().info(
                    f"expertmesh: two mailboxes of {self.bytes / 2**20:.1f} MiB for exchanges between {self.size} GPUs"
                )
                self.boxes = [self.make(self.bytes), self.make(self.bytes)]
                self._places.clear()
            if len(self._places) >= MOST_PLACES:
                self._places.clear()
            self._places[key], end = [], 0
            for part, size in zip(parts, sizes, strict=True):
                begin, end = end, end + size
                shape = self.size, len(part) // pieces, *part.shape[1:]
                used = slice(begin, begin + math.prod(shape) * part.itemsize)
                whole = [self.boxes[turn].of(rank)[used].view(part.dtype).view(shape) for rank in range(self.size)]
                self._places[key].append(_Place([tensors[self.rank] for tensors in whole], whole[self.rank]))
        return self.boxes[turn], self._places[key]


def on_side_stream(device: torch.device) -> AbstractContextManager:
    """Within, launches on a GPU run beside those that follow, until `join_side_stream`."""
    if device.type != "cuda":
        return nullcontext()
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def join_side_stream(device: torch.device, made: Sequence[torch.Tensor] = ()) -> None:
    """What is launched from now on comes after all that was launched there, and may use the tensors `made` there."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream()
        stream.wait_stream(_side_stream(device))
        for tensor in made:
            tensor.record_stream(stream)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: its barriers, one block each, must not wait behind whole waves of a matrix product."""
    return torch.cuda.Stream(device, priority=-1)


class DeviceMemory:
    """PyTorch's symmetric memory on NVIDIA GPUs. Multicast is not used."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        # mailboxes that this one replaces may still be written to or read
        torch.cuda.synchronize()
        dist.barrier(cpu_group(group))
        self._own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle: Any = symmetric.rendezvous(self._own, group)
        boxes = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.size())]
        self.of, self.barrier = boxes.__getitem__, handle.barrier


_links: dict[dist.ProcessGroup, Collectives | Mailboxes] = {}  # freed when their group is destroyed


def link_of(group: dist.ProcessGroup, place: str) -> Collectives | Mailboxes:
    """The fastest link between the ranks of this group, which meet at `place` when it is first asked for."""
    if group not in _links:
        _opened()
        with step_timeout(place, cpu_group(group), group):
            reason = _why_no_mailboxes(group)
        how = "mailboxes in each other's memory" if reason is None else f"collectives ({reason})"
        backends.logger().info(f"expertmesh: rows travel between {group.size()} ranks by {how}")
        _links[group] = Collectives(group) if reason else Mailboxes(group, functools.partial(DeviceMemory, group))
    return _links[group]


def _opened() -> list[Mailboxes]:
    """All whose group still exists; others are freed here."""
    for group in _links.keys() - dist.distributed_c10d._world.pg_map.keys():
        del _links[group]
    return [link for link in _links.values() if isinstance(link, Mailboxes)]


def mailboxes() -> list[Any]:
    """All that are in use: others, once larger ones are needed."""
    return [box for link in _opened() for box in link.boxes]


def mailbox_barrier() -> None:
    """Let all ranks of each group read what came, so that any mailbox may be the next."""
    for link in _opened():
        if link.boxes:
            link.boxes[0].barrier()


def _why_no_mailboxes(group: dist.ProcessGroup) -> str | None:
    """Why not all ranks of the group have mailboxes for each other, the same answer on each; or None."""
    here = (socket.gethostname(), torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, here, cpu_group(group))
    if None in ranks:
        return "not on NVIDIA GPUs"
    if len({host for host, _ in ranks}) > 1:
        return "more than one node"
    devices = [device for _, device in ranks]
    if len(set(devices)) < len(devices):
        return "the ranks do not see each other's GPUs: leave CUDA_VISIBLE_DEVICES the same on all"
    apart = [b for a in devices for b in devices if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        return "GPUs that cannot access each other's memory"
    error = None
    try:  # to open memory to other processes, which containers may forbid though GPUs can
        DeviceMemory(group, ALIGNMENT)
    except RuntimeError as failed:
        error = str(failed).strip().split("\n")[0]
    errors: list[Any] = [None] * group.size()
    dist.all_gather_object(errors, error, cpu_group(group))
    return next((f"memory cannot be opened to other processes: {e}" for e in errors if e is not None), None)
