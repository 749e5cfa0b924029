"""Detection of installed libraries and of the device. No other file checks these.

A kernel function selects its Triton or PyTorch path by `use_triton(x)`, or `triton_or_reference` builds it from both.
`doctor` prints `table()`. Only this file imports Triton, so that references run where Triton is missing.
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
else:  # CPU-only platforms: stubs let kernel files be imported, so that references run and steps can be planned
    round_up = {"cdiv": lambda a, b: -(-a // b), "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length()}
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel, **round_up), SimpleNamespace(constexpr=int)
    TensorDescriptor = type("TensorDescriptor", (), {"from_tensor": lambda x, _: x})

_interpreting = False
#: set while a step is planned: (callback that replaces kernel launches, memory of the planned GPU in bytes)
watching: tuple[Callable[..., None], int] | None = None


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Context manager for tests: CPU tensors take the Triton path too. Needs TRITON_INTERPRET=1 at import."""
    global _interpreting
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed, so its kernels cannot be interpreted: pip install triton.")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def on_gpu(x: torch.Tensor) -> bool:
    """Return whether x is a CUDA tensor, or a meta tensor that represents one in a planned step (plan/trace.py)."""
    return x.is_cuda or (watching is not None and x.is_meta)


def device_memory(device: torch.device) -> int:
    """Return the memory of this GPU, or of the planned one, in bytes; 0 for a CPU."""
    if watching is not None:
        return watching[1]
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of x are computed: autocast's if it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def gpu() -> tuple[str, int] | None:
    """Return (name, bytes of memory) of the first GPU, or None, without allocating anything on it."""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return (properties.name, properties.total_memory) if properties else None


def use_triton(x: torch.Tensor) -> bool:
    """Return whether a kernel function takes its Triton path for `x`: on GPUs with Triton, or in a planned step."""
    if watching is not None:
        return True
    return HAS_TRITON and (x.is_cuda or _interpreting) and not in_fullgraph()


def triton_or_reference(kernel: Callable[P, R], reference: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs `kernel` if `use_triton` holds for its first argument, else `reference`."""

    @wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]  # inlined `use_triton`: layers call this often
        by_kernel = watching is not None or (HAS_TRITON and (x.is_cuda or _interpreting) and not in_fullgraph())
        return (kernel if by_kernel else reference)(*args, **kwargs)

    return run


def in_fullgraph() -> bool:
    """Return whether `torch.compile(fullgraph=True)` or a strict `torch.export` is tracing: kernels cannot run then."""
    return torch.compiler.is_dynamo_compiling() and _breaks_are_errors()


@torch.compiler.assume_constant_result  # Dynamo calls it at trace time
def _breaks_are_errors() -> bool:
    from torch._dynamo import symbolic_convert  # imported here because it is slow; there is no public API

    translator = symbolic_convert.InstructionTranslator.current_tx()
    fullgraph = getattr(translator, "one_graph", False) or getattr(translator, "error_on_graph_break", False)
    if fullgraph:
        _warn_once(
            "a single graph (fullgraph=True, or a strict torch.export) holds PyTorch operations only, which are slower "
            "than our kernels. Compile without fullgraph=True, or layer by layer: for layer in model.model.layers: "
            "layer.compile()."
        )
    return fullgraph


def graph_break(instead: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorator: torch.compile breaks the graph at the function, or traces `instead` if graph breaks are errors."""

    def decorate(function: Any) -> Any:
        disabled = torch.compiler.disable(function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():  # calling `disabled` costs time
                return function(*args, **kwargs)
            return (instead if _breaks_are_errors() else disabled)(*args, **kwargs)

        return call

    return decorate


@cache
def has_quack(device: torch.device) -> bool:
    """Return whether quack-kernels 0.6, as kernels/quack.py needs, is installed and this is a Hopper GPU."""
    if device.type != "cuda" or not (version_of("quack-kernels") or "").startswith("0.6."):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def has_varlen(x: torch.Tensor) -> bool:
    """Return whether packed documents need no attention mask: on CPUs, and on GPUs where FlashAttention supports x."""
    if not x.is_cuda or matmul_dtype(x) not in (torch.bfloat16, torch.float16):
        return x.is_cpu
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(x.device) >= (8, 0)


#: arguments of PyTorch's `varlen_attn` for grouped-query attention: none in 2.11, a flag in later versions
VARLEN_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)


# Transformers: the oldest release and the newest minor release that pass all tests
OLDEST = "5.23.0"
NEWEST_MINOR = (5, 24)
NEWEST = ".".join(map(str, NEWEST_MINOR))
TESTED = f"{OLDEST} to {NEWEST}"


def is_tested(version: str) -> bool:
    """Return whether all tests passed on this version of Transformers or on another patch of its minor release."""
    parsed = Version(version)
    return parsed >= Version(OLDEST) and parsed.release[:2] <= NEWEST_MINOR


def warn_if_untested() -> None:
    """Warn if this version of Transformers is untested."""
    version = importlib.import_module("transformers").__version__
    if not is_tested(version):
        warn_once(
            f"not tested on Transformers {version}, only on {TESTED}: run `expertmesh check` on your "
            f"model, or install one of these."
        )


class Backend(NamedTuple):
    """One row of `table()`: a package or device, its version or None, what uses it, and the fallback without it."""

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


FLASH_ATTENTION = version_of("flash-attn-4") is not None  # not the module: flash-attn has the same parent module


@torch.compiler.assume_constant_result
def has_flash_attention(device: str) -> bool:
    """Return whether flash-attn-4 is installed and the GPU is a Hopper, on which it was measured."""
    return FLASH_ATTENTION and device == "cuda" and torch.cuda.get_device_capability()[0] == 9


def library_of(fusion: str) -> str | None:
    """Return the library that a fusion prefers to our own kernels on this GPU where it applies, or None."""
    if fusion == "experts" and has_quack(torch.device("cuda", torch.cuda.current_device())):
        return "quack"
    attention = "flash-attn-4, FlashAttention-2" if has_flash_attention("cuda") else "FlashAttention-2"
    return attention if fusion == "sink_attention" else None


def table() -> list[Backend]:
    """Return one row for the device, then one for each package."""
    gpus = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (sm_{major}{minor})"
    device = Backend("GPU", gpus, "Triton kernels", "PyTorch reference on the CPU: correct, for small models")
    return [device, *(Backend(name, version_of(name), *use) for name, use in _PACKAGES.items())]


def logger() -> logging.Logger:
    """Return the package's logger. Unless configured otherwise, rank 0 logs to stderr and other ranks only warnings."""
    log = logging.getLogger("expertmesh")
    if not log.handlers:
        # this handler looks up sys.stderr at each message: notebooks and test runners replace it
        log.addHandler(logging._StderrHandler())  # type: ignore[attr-defined]
        log.propagate = False
        log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return log


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning once per process."""
    if not torch.compiler.is_compiling():
        _warn_once(message)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger().warning(f"expertmesh: {message}")
