"""What every fast twin of a Transformers class has in common.

A twin is made on the fly: a subclass of the HF class, of the same name and module, whose `forward` comes from a `Fast`
mixin. Instances are converted by `module.__class__ = twin`: parameters, hooks, names and isinstance tests stay.
"""

import functools
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

# to the type checker a mixin's attributes and super() are those of whatever HF class it is mixed into
_Stock: Any = Any if TYPE_CHECKING else object


class Fast(_Stock):
    """Base of the mixins that carry fast forwards. Its twins pickle and deep-copy like their HF class.

    stands_for: the methods of the HF class and functions of its module that the twin must equal; fingerprints are taken
    of these. Without "forward" among them the twin runs HF's forward, which calls the first. probed: whether a probe
    may prove the twin equal to unknown code; not if the twin runs HF's code on CPUs, where probes run.
    """

    __stock__: type
    __fast__: type
    stands_for: tuple[str, ...] = ("forward",)
    probed = True

    @staticmethod
    def why_not(module: Any) -> str | None:
        """Why this module must stay stock, or None."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).__stock__, type(self).__fast__), *state)


def refuse_replicas(module: nn.Module) -> NoReturn:
    """A fused module's `_replicate_for_data_parallel`, by which nn.DataParallel copies it. Raises ValueError."""
    gpus = max(2, torch.cuda.device_count())
    raise ValueError(
        f"{type(module).__name__} would be copied to {gpus} GPUs in every forward, as one process sees them all and "
        f"Trainer then wraps models in nn.DataParallel. expertmesh runs one process per GPU. Start them with torchrun "
        f"--nproc-per-node {gpus} script.py, or let one process see one GPU: CUDA_VISIBLE_DEVICES=0 python script.py."
    )


#: a cache's name as a keyword of forwards, and its names before Transformers 5.24
CACHES = ("cache", "past_key_values", "cache_params")


def cache_of(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of a forward's keywords, whatever its name."""
    found = [kwargs.pop(name, None) for name in CACHES]
    return next((cache for cache in found if cache is not None), None)


def has_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a forward's keywords hold a cache."""
    return any(kwargs.get(name) is not None for name in CACHES)


def untouched(*modules: nn.Module, kind: type = nn.Module) -> bool:
    """Whether calls of these, of this kind, run the forward of PyTorch, Transformers or a twin, and nobody watches
    them, so that a kernel may stand for them. Parallelism replaces instances' forward; users put hooks and classes.
    """
    for m in modules:
        known = isinstance(m, kind) and type(m).__module__.startswith(("torch.", "transformers."))
        if not known or "forward" in vars(m) or watched(m):
            return False
    return True


def watched(module: nn.Module) -> bool:
    """Whether somebody put a hook on it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def traced() -> bool:
    """Whether this runs under torch.compile, torch.export, torch.jit.trace or a transform of torch.func."""
    traces = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traces or torch._C._are_functorch_transforms_active()


@functools.cache
def twin(stock: Any, fast: Any) -> Any:
    """The subclass of the HF class `stock` that runs the mixin `fast`; one per pair."""
    kept = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (fast, stock), kept | {"__stock__": stock, "__fast__": fast})


def _rebuild(stock: Any, fast: Any) -> Any:
    cls = twin(stock, fast)
    return cls.__new__(cls)
