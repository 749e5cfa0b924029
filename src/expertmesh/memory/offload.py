"""Activation checkpointing that keeps the inputs of layers in host memory: the recompute policy "offload".

While a layer computes, its input is copied to pinned memory on a side stream, and freed when the next layer begins. In
the backward, an input is prefetched while the layer after it computes, so at most two inputs are on the device. Loss
and gradients are those of the policy "full". Transformers' `offload=True` copies on the computing stream instead.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.backends import graph_break


class _OnHost:
    """An input in host memory. previous: a function that returns the input offloaded before it, or None."""

    def __init__(self, x: torch.Tensor, previous: Callable[[], "_OnHost | None"]) -> None:
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        self.device, self.previous = x.device, previous


class _OnDevice(NamedTuple):
    """An input on the device, its version counter, and the event after its copy to or from the host (None on a CPU)."""

    x: torch.Tensor
    version: int
    copied: Any


class Offload:
    """`offload(function, *args)` is `checkpointed(function, *args)` with floating-point args kept in host memory.
    checkpointed: like torch.utils.checkpoint.checkpoint. All layers of a model must share one object, which prefetches
    in the reverse order of their calls. Raises RuntimeError in CUDA graph capture, and for inputs changed in place."""

    def __init__(self, checkpointed: Callable[..., Any]) -> None:
        self._checkpointed = checkpointed
        self._copy_stream: Any = None
        self._on_device: dict[_OnHost, _OnDevice] = {}  # copies in flight
        self._previous: Callable[[], _OnHost | None] = lambda: None

    @graph_break(lambda self, function, *args, **kwargs: self._checkpointed(function, *args, **kwargs))
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of `function`, which the backward calls again."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._checkpointed(function, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return Offload, (self._checkpointed,)

    def _pack(self, x: torch.Tensor) -> Any:
        if type(x) is not torch.Tensor or not x.is_floating_point() or not x.numel():
            return x
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Inputs of layers are copied to host memory, which a CUDA graph cannot record: record no steps "
                "(cuda_graph=False), or recompute layers without offloading (activation_checkpointing=true)."
            )
        self._wait_for_copies()
        on_host = _OnHost(x, self._previous)
        self._on_device[on_host] = _OnDevice(x, x._version, self._copy(on_host.host, x))
        self._previous = weakref.ref(on_host)
        return on_host

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        on_device = self._on_device.pop(packed, None) or self._fetch(packed)
        self._wait_for_copies()  # of another autograd graph, which was freed
        self._wait(on_device)
        if (previous := packed.previous()) is not None:
            self._on_device[previous] = self._fetch(previous)
        return on_device.x

    def _fetch(self, on_host: _OnHost) -> _OnDevice:
        x = torch.empty_like(on_host.host, device=on_host.device)  # from the computing stream's pool
        copied = self._copy(x, on_host.host)
        return _OnDevice(x, x._version, copied)

    def _wait_for_copies(self) -> None:
        """Make the current stream wait for all copies in flight, and drop their device tensors."""
        in_flight, self._on_device = self._on_device, {}
        for on_device in in_flight.values():
            self._wait(on_device)

    def _wait(self, on_device: _OnDevice) -> None:
        if on_device.copied is not None:
            torch.get_device_module(on_device.x.device).current_stream(on_device.x.device).wait_event(on_device.copied)
        if on_device.x._version != on_device.version:
            raise RuntimeError(
                f"The input {tuple(on_device.x.shape)} of a layer was changed in place while it is in host memory: "
                f"change a copy, or recompute layers without offloading (activation_checkpointing=true)."
            )

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy on the side stream, after the work queued so far on the current stream. Return the event of its end."""
        x = source if target.device.type == "cpu" else target
        if backends.watching is not None:
            backends.watching[0](self._copy, x, back=x is target)
            return None
        device: Any = torch.get_device_module(x.device)
        self._copy_stream = self._copy_stream or (torch.cuda.Stream(x.device) if x.is_cuda else device.Stream())
        self._copy_stream.wait_stream(device.current_stream(x.device))
        with device.stream(self._copy_stream):
            target.copy_(source, non_blocking=True)
        return self._copy_stream.record_event()
