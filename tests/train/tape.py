"""A stand-in for CUDA graphs on a CPU: operations are taken down while recording, and carried out again on the same
tensors in a replay. Python runs while recording only, what recording changed is put back, and asking for a value fails:
as with the real ones.
"""

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertmesh import backends
from expertmesh.kernels import mamba2
from expertmesh.layers import mamba2 as mixer
from expertmesh.train import graphed


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class Tape:
    """In the place of `torch.cuda.CUDAGraph`."""

    made: "list[Tape]" = []

    def __init__(self) -> None:
        self.operations: list[tuple] = []
        self.replays = 0
        Tape.made.append(self)

    def reset(self) -> None:
        self.operations.clear()

    @torch.no_grad()
    def replay(self) -> None:
        assert self.operations, "replayed after reset, or never recorded"
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            new = func(*args, **kwargs)
            for old, x in zip(tensors(out), tensors(new), strict=True):
                if old.data_ptr() != x.data_ptr():
                    old.detach().copy_(x)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """In the place of `torch.cuda.graph`."""

    def __init__(self, tape: Tape, *_: Any, **__: Any) -> None:
        super().__init__()
        self.tape = tape
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, torch.Tensor):
                self.before.append((x.detach(), x.detach().clone()))
        out = func(*args, **kwargs)
        self.tape.operations.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for x, value in reversed(self.before):
            x.copy_(value)


class Watcher(TorchDispatchMode):
    """In the place of PyTorch's debug mode for synchronization: warns of what asks for a value."""

    on: "Watcher | None" = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=3)
        return func(*args, **(kwargs or {}))


def set_sync_debug_mode(mode: str) -> None:
    if mode == "warn":
        Watcher.on = Watcher()
        Watcher.on.__enter__()
    elif Watcher.on is not None:
        Watcher.on.__exit__(None, None, None)
        Watcher.on = None


def masked_mamba2(
    projected: torch.Tensor, weights: Any, options: Any, start_BS: torch.Tensor | None = None, mask_BS: Any = None
) -> torch.Tensor:
    """`mamba2_reference` with documents kept apart by a mask of all pairs of tokens."""
    assert mask_BS is None
    sizes = mamba2._sizes(projected, weights, options)
    gate, xbc, dt = mamba2._parts(projected, sizes)
    token = torch.arange(sizes.S)
    position = token - (torch.zeros(sizes.B, 1) if start_BS is None else start_BS)
    lagged = [F.pad(xbc, (0, 0, lag, 0))[:, : sizes.S] * (position >= lag)[..., None] for lag in range(4)]
    conv = sum(x * weights.conv_K4[:, 3 - lag] for lag, x in enumerate(lagged))
    x, B, C = mamba2.split(F.silu(conv if weights.conv_bias_K is None else conv + weights.conv_bias_K), sizes)
    B, C = (part.repeat_interleave(sizes.H // sizes.G, dim=2) for part in (B, C))
    dt = F.softplus(dt + weights.dt_bias_H).clamp(*options.dt_limit)
    decay_BHS = (dt * weights.A_H).cumsum(1).transpose(1, 2)
    unseen = (token > token[:, None]) | (token < (token - position)[..., None])
    decay = (decay_BHS[..., None] - decay_BHS[:, :, None]).masked_fill(unseen[:, None], -torch.inf).exp()
    y = torch.einsum("bqhn,bkhn,bhqk,bkh,bkhp->bqhp", C, B, decay, dt, x) + weights.D_H[:, None] * x
    norm = SimpleNamespace(weight=weights.norm_W, variance_epsilon=options.eps, group_size=y[0, 0].numel() // sizes.G)
    return mamba2.norm_reference(norm, y.flatten(2), gate)


def instead_of_cuda(monkeypatch: Any) -> None:
    """From now on a recording is a tape."""
    # on a CPU these read documents' lengths
    monkeypatch.setattr(backends, "has_varlen", lambda x: False)
    monkeypatch.setattr(mixer, "mamba2", masked_mamba2)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(graphed, "_not_owned", lambda gradient: gradient)  # a tape has no memory of its own
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    recording = torch.utils._python_dispatch._get_current_dispatch_mode
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: isinstance(recording(), Recorder))
