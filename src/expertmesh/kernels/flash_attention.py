"""Training's causal attention on Hopper by flash-attn-4, where it is installed: no other file knows its interface.

flash-attn-4 (BSD-3, CuTe-DSL, compiled at the first call) is faster there than the cuDNN kernel that SDPA picks, on
packed documents than `varlen_attn`, and takes sinks and windows. Its backward adds up dq, and dk and dv of heads that
share keys, by atomics: equal inputs give gradients that are equal but for rounding. Who asks PyTorch for deterministic
algorithms therefore stays with the other kernels. Nothing in a call waits for the device.

Letters: B batch, S row, N heads (NQ of queries, NK of keys), D width of queries and keys, V of values.
"""

import logging
import os
import tempfile
from functools import cache

import torch

from expertmesh import backends
from expertmesh.kernels.documents import Documents

log = logging.getLogger(__name__)
_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE"
#: (D, V) at which it won on an H200; empty, nothing runs here
WIDTHS = frozenset({(64, 64), (128, 128), (192, 128)})
DTYPES = (torch.bfloat16, torch.float16)
#: on shorter rows the host works longer on its call than the GPU saves
LENGTH = 1024


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether it computes this causal attention: 16-bit floats, also by autocast, on Hopper, widths from `WIDTHS`, as
    many queries as keys and at least `LENGTH`, gradients wanted, in no particular order of additions.

    query: [B, NQ, S, D], key: [B, NK, S, D], value: [B, NK, S, V].
    """
    width = query.shape[-1]
    return (
        (width, value.shape[-1]) in WIDTHS
        and backends.has_flash_attention(query.device.type)
        and not backends.in_fullgraph()
        and backends.matmul_dtype(query) in DTYPES
        and query.shape[2] == key.shape[2]
        and query.shape[2] >= LENGTH
        and (width == value.shape[-1] or query.shape[1] == key.shape[1])  # its backward has not both
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and not torch.are_deterministic_algorithms_enabled()
    )


@torch.compiler.disable
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    documents: Documents | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """[B, S, NQ, V] in the inputs' dtype, or autocast's; scale None is 1 / sqrt(D). Differentiable in all tensors.

    Shapes as in `supports`, no copy if the last dimension is contiguous; sinks: [NQ], one logit more in each softmax.
    documents: none sees another. window: a query sees itself and the window - 1 tokens before it.
    """
    _keep_compiled()
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    dtype = backends.matmul_dtype(query)
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    limits = (None, None) if window is None else (window - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "learnable_sink": sinks, "window_size": limits}
    if documents is None:
        return flash_attn_func(query, key, value, **options)[0]
    rows = query.shape[:2]
    options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.cu_seqlens)
    options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.max_length)
    out, _ = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (query, key, value)), **options)
    return out.unflatten(0, rows)


@cache
def _keep_compiled() -> None:
    """Unless the user decides otherwise, compiled kernels stay in a folder of this machine for the next process."""
    if f"{_CACHE}_DIR" not in os.environ:
        folder = os.path.join(tempfile.gettempdir(), f"flash-attn-4-{os.getuid()}")
        os.makedirs(folder, 0o700, exist_ok=True)
        if os.lstat(folder).st_uid != os.getuid():  # what others put there must not be loaded
            log.warning("%s is not yours: flash-attn-4 compiles anew at every start. Set %s_DIR.", folder, _CACHE)
            return
        os.environ[f"{_CACHE}_DIR"] = folder
    os.environ.setdefault(f"{_CACHE}_ENABLED", "1")
