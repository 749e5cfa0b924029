"""Formats of AdamW's state, and their memory.

states      moments                  bfloat16 weight                           bytes per parameter, with the weight
None        in the weight's dtype    rounded to nearest                        6
"float32"   float32                  with a float32 master copy                14
"24bit"     8 bits, in blocks        with 8 more bits of its mantissa          5.03
"8bit"      8 bits, in blocks        rounded stochastically                    4.03

float32 weights are updated without a copy. A quantization block is a part of a row (the last dimension) on one rank, so
codes and scales are sharded like their parameter and can be resharded bit for bit. Parameters with fewer than `SMALL`
elements, or with rows that no block size divides, have "float32" state. With offload, the state of weights of at least
`LARGE` bytes is in pinned host memory.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as zeros_of_ranks
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from expertmesh.kernels.block_quant import dequantize, join, quantize, rest_of
from expertmesh.parallel.clip import local_shard, num_shards

STATES = ("8bit", "24bit", "float32")
SMALL = 4096  # elements
LARGE = 2**26  # bytes of a weight from which its state is offloaded
SIZES = (256, 128, 64, 32)  # of a block; the first that divides a row is used
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"  # Muon's, in place of the moments
REST, MASTER = "remainder", "master"  # the low 8 bits of a 24-bit weight; the float32 master weight
STREAM = "stream"  # of random numbers for stochastic rounding


class Form(NamedTuple):
    """The format of one parameter's state on this rank.

    tensors: {key: (dtype, elements of the weight per element of the state)}, without the step count. moments: keys of
    the moments. size: of a block, 0 if moments are floats. stream: the parameter's number. first: flat index of this
    rank's first element in the whole tensor. place: options of `torch.empty` for device and pinning.
    """

    tensors: dict[str, tuple[torch.dtype, int]]
    moments: tuple[str, ...]
    size: int
    stream: int
    first: int
    place: dict[str, Any]


def form_of(
    parameter: torch.Tensor, states: str | None, offload: bool = False, stream: int = 0, moments: tuple = MOMENTS
) -> Form:
    """Return the format of a parameter's state for `states`. `parameter` may be on the meta device."""
    place: dict[str, Any] = {"device": parameter.device}
    if offload and parameter.nbytes >= LARGE and parameter.is_contiguous():
        place = {"device": torch.device("cpu"), "pin_memory": parameter.is_cuda}
    narrow, first = parameter.dtype == torch.bfloat16, 0
    size = _block(parameter) if states in ("8bit", "24bit") and parameter.numel() >= SMALL else 0
    if not size:
        tensors = dict.fromkeys(moments, (torch.float32 if states else parameter.dtype, 1))
        return Form(tensors | ({MASTER: (torch.float32, 1)} if states and narrow else {}), moments, 0, stream, 0, place)
    tensors = {f"{key}_8bit": (torch.uint8, 1) for key in moments}
    tensors |= {f"{key}_scale": (torch.float32, size) for key in moments}
    if narrow and states == "24bit":
        tensors[REST] = torch.int8, 1
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        first = sum(at * step for at, step in zip(offset, parameter.stride(), strict=True))
    return Form(tensors, moments, size, stream, first, place)


def refuse(parameters: Iterable[torch.Tensor], states: str | None) -> None:
    """Raise ValueError for unknown states, and for states that do not support the dtypes of these weights."""
    if states not in (None, *STATES):
        raise ValueError(f"states={states!r} does not exist: take {', '.join(map(repr, STATES))}, or None.")
    dtypes = {parameter.dtype for parameter in parameters}
    if states and (odd := dtypes - {torch.bfloat16, torch.float32}):
        raise ValueError(f"states={states!r} supports bfloat16 and float32 weights, not {odd.pop()}: cast the model.")
    if states == "24bit" and dtypes == {torch.float32}:
        raise ValueError('states="24bit" extends bfloat16 weights, and these are float32: take "8bit", or cast them.')


def bytes_kept(parameter: torch.Tensor, form: Form) -> int:
    """Return the bytes of a parameter and its state on this rank; works on the meta device."""
    each = sum(dtype.itemsize / share for dtype, share in form.tensors.values())
    return 4 + round(local_shard(parameter).numel() * (parameter.dtype.itemsize + each))


def create(parameter: nn.Parameter, state: dict[str, Any], form: Form) -> None:
    """Create the state before the first step. The step count is always on the parameter's device."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if form.size:
        state[STREAM] = form.stream
    zeros: Any = partial(torch.zeros, **form.place)
    if isinstance(parameter, DTensor):
        zeros = partial(zeros_of_ranks, device_mesh=parameter.device_mesh, placements=parameter.placements)
    for key, (dtype, share) in form.tensors.items():
        if share == 1:
            state[key] = torch.zeros_like(parameter, dtype=dtype, **form.place)
        else:
            state[key] = zeros((*parameter.shape[:-1], parameter.shape[-1] // share), dtype=dtype)
    if MASTER in state:
        state[MASTER].copy_(parameter.detach())


def convert(parameter: nn.Parameter, state: dict[str, Any], form: Form) -> None:
    """Convert a state of any format, such as a loaded one, to this format in place, through float32."""
    old, weight = dict(state), local_shard(parameter)
    if not all(key in old or f"{key}_8bit" in old for key in form.moments):
        raise ValueError(f"This state ({', '.join(old)}) is another optimizer's and cannot be converted.")
    master = join(weight, local_shard(old[REST])) if REST in old else local_shard(old.get(MASTER, weight)).float()
    state.clear()
    create(parameter, state, form._replace(stream=old.get(STREAM, form.stream)))
    new = {"step": old["step"], MASTER: master}
    if REST in state:
        new[REST] = rest_of(weight, master)
    for key in form.moments:
        new[key] = local_shard(old.pop(key)).float() if key in old else dequantize(*_codes(old, key), key == "exp_avg")
        if form.size:
            new[f"{key}_8bit"], new[f"{key}_scale"] = quantize(new.pop(key), form.size, key == "exp_avg")
    for key in ("step", *form.tensors):
        local_shard(state[key]).copy_(new[key])


def has_form(parameter: torch.Tensor, state: dict[str, Any], form: Form) -> bool:
    """Whether a state has this format."""
    return state.keys() == {"step", *form.tensors, *([STREAM] if form.size else [])} and all(
        state[key].dtype == dtype and state[key].numel() * share == parameter.numel()
        for key, (dtype, share) in form.tensors.items()
    )


def _codes(state: dict[str, Any], key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove and return this rank's codes and scales of a moment. If a block spans ranks, scales are per element."""
    codes, scales = state.pop(f"{key}_8bit"), state.pop(f"{key}_scale")
    size = codes.shape[-1] // scales.shape[-1]
    mine, of_mine = local_shard(codes), local_shard(scales)
    if mine.shape[-1] == of_mine.shape[-1] * size:
        return mine, of_mine
    _, offset = compute_local_shape_and_global_offset(codes.shape, codes.device_mesh, codes.placements)
    each = of_mine.repeat_interleave(size, -1).narrow(-1, offset[-1], mine.shape[-1])
    return mine, each


def _block(parameter: torch.Tensor) -> int:
    """Return the block size for a parameter, 0 if none divides its rows on a rank."""
    parts = num_shards(parameter, parameter.ndim - 1)
    fits = (size for size in SIZES if parameter.shape[-1] % (parts * size) == 0)
    return next(fits, 0) if local_shard(parameter).is_contiguous() else 0
