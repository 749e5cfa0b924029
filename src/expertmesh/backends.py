"""The only place that asks what is installed and which device this is.

A kernel function picks its Triton or its PyTorch path by `use_triton(x)`, or is made of both by `triton_or_reference`.
`doctor` prints `table()`. Only this file imports Triton, so that a kernel's reference runs where Triton is missing.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from packaging.version import Version
from torch.nn.attention import varlen

P = ParamSpec("P")
R = TypeVar("R")
HAS_TRITON = importlib.util.find_spec("triton") is not None

triton: Any
tl: Any
TensorDescriptor: Any
if HAS_TRITON:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    TensorDescriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
else:  # as on CPU-only platforms: kernel files still import, so that their references run and steps are planned
    round_up = {"cdiv": lambda a, b: -(-a // b), "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length()}
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel, **round_up), SimpleNamespace(constexpr=int)
    TensorDescriptor = type("TensorDescriptor", (), {"from_tensor": lambda x, _: x})

_interpreting = False
#: while a step is planned: what is told of kernels in place of their launches; memory of the GPU that is planned for
watching: tuple[Callable[..., None], int] | None = None


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within this context CPU tensors take the Triton path too: for tests, with TRITON_INTERPRET=1 set at import."""
    global _interpreting
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed, so its kernels cannot be interpreted: pip install triton.")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def on_gpu(x: torch.Tensor) -> bool:
    """True for a CUDA tensor, and for a meta tensor that stands for one while a step is planned (plan/trace.py)."""
    return x.is_cuda or (watching is not None and x.is_meta)


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the one that is planned for; 0 for a CPU."""
    if watching is not None:
        return watching[1]
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """In which products of x are computed: its own dtype, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def gpu() -> tuple[str, int] | None:
    """Name and bytes of memory of this machine's first GPU, None without one. It is asked, and not used."""
    found = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return (found.name, found.total_memory) if found else None


def use_triton(x: torch.Tensor) -> bool:
    """Whether a kernel function should run its Triton path for `x`: on a GPU with Triton, and while it is watched."""
    if watching is not None:
        return True
    return HAS_TRITON and (x.is_cuda or _interpreting) and not in_fullgraph()


def triton_or_reference(kernel: Callable[P, R], reference: Callable[P, R]) -> Callable[P, R]:
    """A function that runs one of these two, as `use_triton` says of its first argument, a tensor."""

    @wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]  # as `use_triton`, which would be a call more: a layer makes many
        by_kernel = watching is not None or (HAS_TRITON and (x.is_cuda or _interpreting) and not in_fullgraph())
        return (kernel if by_kernel else reference)(*args, **kwargs)

    return run


def in_fullgraph() -> bool:
    """True while `torch.compile(fullgraph=True)` or a strict `torch.export` traces: kernels must not run then."""
    return torch.compiler.is_dynamo_compiling() and _breaks_are_errors()


@torch.compiler.assume_constant_result  # so that it is called while the graph is made
def _breaks_are_errors() -> bool:
    from torch._dynamo import symbolic_convert  # slow to import, and here it is; no public function tells

    translator = symbolic_convert.InstructionTranslator.current_tx()
    one = getattr(translator, "one_graph", False) or getattr(translator, "error_on_graph_break", False)
    if one:
        _warn_once(
            "a single graph (fullgraph=True, or a strict torch.export) holds PyTorch operations only, which are slower "
            "than our kernels. Compile without fullgraph=True, or layer by layer: for layer in model.model.layers: "
            "layer.compile()."
        )
    return one


def graph_break(instead: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorator: compiled code calls the function and does not look into it; a single graph has `instead` in it."""

    def decorate(function: Any) -> Any:
        called = torch.compiler.disable(function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():  # `called` takes time, too
                return function(*args, **kwargs)
            return (instead if _breaks_are_errors() else called)(*args, **kwargs)

        return call

    return decorate


@cache
def has_quack(device: torch.device) -> bool:
    """Whether quack-kernels 0.6 is installed, whose interface kernels/quack.py knows, and this is a Hopper GPU."""
    if device.type != "cuda" or not (version_of("quack-kernels") or "").startswith("0.6."):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def has_varlen(x: torch.Tensor) -> bool:
    """Whether attention over documents needs no mask: on CPUs, and by FlashAttention, in 16 bits on Ampere or newer."""
    if not x.is_cuda or matmul_dtype(x) not in (torch.bfloat16, torch.float16):
        return x.is_cpu
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(x.device) >= (8, 0)


#: what PyTorch's `varlen_attn` must be told where keys have fewer heads than queries: nothing in 2.11, later a flag
VARLEN_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)


# Transformers: the oldest release and the newest minor release that the whole suite has passed on
OLDEST = "5.23.0"
NEWEST_MINOR = (5, 24)
NEWEST = ".".join(map(str, NEWEST_MINOR))
TESTED = f"{OLDEST} to {NEWEST}"


def is_tested(version: str) -> bool:
    """True when this version of Transformers is one the suite has passed on, or a patch of such a minor release."""
    found = Version(version)
    return found >= Version(OLDEST) and found.release[:2] <= NEWEST_MINOR


def warn_if_untested() -> None:
    """Say so if the Transformers in use is a version that nothing here was tested on."""
    version = importlib.import_module("transformers").__version__
    if not is_tested(version):
        warn_once(
            f"not tested on Transformers {version}, only on {TESTED}: run `expertmesh check` on your "
            f"model, or install one of these."
        )


class Backend(NamedTuple):
    """One row of `table()`: a package or device, the version found or None, its users, what its absence costs."""

    name: str
    version: str | None
    used_for: str
    without_it: str


# name: (used for, without it)
_PACKAGES = {
    "torch": ("everything", "nothing runs"),
    "transformers": ("models, loading, generation, Trainer", "nothing runs"),
    "triton": (
        "experts, routers, norms, RoPE, Mamba2 and the loss on GPUs",
        "PyTorch's operations, which on GPUs are much slower",
    ),
    "flash-attn-4": ("causal attention in training on Hopper GPUs", "cuDNN's; with sinks PyTorch's FlashAttention-2"),
    "quack-kernels": ("five of the experts' products on Hopper GPUs", "Triton's"),
    "accelerate": ("transformers' Trainer", "no `expertmesh train`"),
    "trl": ("`expertmesh train` (SFTTrainer)", "no `expertmesh train`"),
    "peft": ("LoRA", "full fine-tuning only"),
    "datasets": ("`expertmesh train`", "no `expertmesh train`"),
    "matplotlib": ("loss curve and router heatmap", "no pictures; the numbers stay in metrics.jsonl"),
}


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


FLASH_ATTENTION = version_of("flash-attn-4") is not None  # the module's parent may be another package's: flash-attn


@torch.compiler.assume_constant_result
def has_flash_attention(device: str) -> bool:
    """True when flash-attn-4 is installed and devices of this type are Hopper GPUs, on which it was measured."""
    return FLASH_ATTENTION and device == "cuda" and torch.cuda.get_device_capability()[0] == 9


def library_of(fusion: str) -> str | None:
    """The library that computes what it takes of a fusion on this process' GPU, before our own kernels; or None."""
    if fusion == "experts" and has_quack(torch.device("cuda", torch.cuda.current_device())):
        return "quack"
    attention = "flash-attn-4, FlashAttention-2" if has_flash_attention("cuda") else "FlashAttention-2"
    return attention if fusion == "sink_attention" else None


def table() -> list[Backend]:
    """What was found on this machine, one row each; the device is the first row."""
    found = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (sm_{major}{minor})"
    device = Backend("GPU", found, "Triton kernels", "PyTorch reference on the CPU: correct, for small models")
    return [device, *(Backend(name, version_of(name), *use) for name, use in _PACKAGES.items())]


def logger() -> logging.Logger:
    """The package's logger: to stderr, from rank 0 only unless somebody configured it otherwise."""
    log = logging.getLogger("expertmesh")
    if not log.handlers:
        # to what sys.stderr is at that moment: notebooks and test runners replace it
        log.addHandler(logging._StderrHandler())  # type: ignore[attr-defined]
        log.propagate = False
        log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return log


_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn in the log, once in a process, mostly of what runs slower than it could."""
    if not torch.compiler.is_compiling():
        _warn_once(message)


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger().warning(f"expertmesh: {message}")
