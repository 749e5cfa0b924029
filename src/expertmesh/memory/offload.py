"""Inputs of recomputed layers in host memory, from forward to backward: level "offload" of recomputing.

While a layer computes, its input is copied to pinned memory on a stream of its own, and freed where the next layer
begins. In the backward an input comes one layer ahead, beside the layer behind it. So two inputs stand on the device at
most. Loss and gradients are those of level "full". Transformers' `offload=True` copies on the stream that computes.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.backends import graph_break


class _Away:
    """An input in host memory. before: gives the one that left before it, None if there is none."""

    def __init__(self, x: torch.Tensor, before: Callable[[], "_Away | None"]) -> None:
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        self.device, self.before = x.device, before


class _Here(NamedTuple):
    """An input on the device, its version, and the event after its copy from or to the host; None on a CPU."""

    x: torch.Tensor
    version: int
    copied: Any


class Offload:
    """`offload(function, *args)` is `checkpointed(function, *args)` with floats among args in host memory until then.

    checkpointed: as torch.utils.checkpoint.checkpoint. One object serves all layers of a model, whose order it learns.
    Raises RuntimeError in a step that is recorded as a CUDA graph, and for an input that is changed in place.
    """

    def __init__(self, checkpointed: Callable[..., Any]) -> None:
        self._checkpointed = checkpointed
        self._copies: Any = None  # the stream
        self._here: dict[_Away, _Here] = {}  # what left last, or comes next
        self._last: Callable[[], _Away | None] = lambda: None

    @graph_break(lambda self, function, *args, **kwargs: self._checkpointed(function, *args, **kwargs))
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `function`, which is called again in the backward."""
        with torch.autograd.graph.saved_tensors_hooks(self._leave, self._come):
            return self._checkpointed(function, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return Offload, (self._checkpointed,)

    def _leave(self, x: torch.Tensor) -> Any:
        if type(x) is not torch.Tensor or not x.is_floating_point() or not x.numel():
            return x
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Inputs of layers go to host memory, for which a recorded step has no place: record no steps "
                "(cuda_graph=False), or recompute layers without offloading (activation_checkpointing=true)."
            )
        self._settle()
        away = _Away(x, self._last)
        self._here[away] = _Here(x, x._version, self._copy(away.host, x))
        self._last = weakref.ref(away)
        return away

    def _come(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        here = self._here.pop(kept, None) or self._fetch(kept)
        self._settle()  # of another graph, which was dropped
        self._wait(here)
        if (before := kept.before()) is not None:
            self._here[before] = self._fetch(before)
        return here.x

    def _fetch(self, away: _Away) -> _Here:
        x = torch.empty_like(away.host, device=away.device)  # of the computing stream's memory, which frees it
        copied = self._copy(x, away.host)
        return _Here(x, x._version, copied)

    def _settle(self) -> None:
        """What is here may go: nothing computes from now on before its copy is done."""
        standing, self._here = self._here, {}
        for here in standing.values():
            self._wait(here)

    def _wait(self, here: _Here) -> None:
        if here.copied is not None:
            torch.get_device_module(here.x.device).current_stream(here.x.device).wait_event(here.copied)
        if here.x._version != here.version:
            raise RuntimeError(
                f"The input {tuple(here.x.shape)} of a layer, which goes to host memory, was changed in place: change "
                f"a copy, or recompute layers without offloading (activation_checkpointing=true)."
            )

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy beside what computes from now on, behind what does already; the event of its end."""
        x = source if target.device.type == "cpu" else target
        if backends.watching is not None:
            backends.watching[0](self._copy, x, back=x is target)
            return None
        device: Any = torch.get_device_module(x.device)
        self._copies = self._copies or (torch.cuda.Stream(x.device) if x.is_cuda else device.Stream())
        self._copies.wait_stream(device.current_stream(x.device))
        with device.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return self._copies.record_event()
