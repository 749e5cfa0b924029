"""What AdamW keeps of a parameter, chosen by one word, and what that costs.

states      moments                  of a bfloat16 weight                      bytes a parameter, with that weight
None        in the weight's dtype    rounded to the nearest                    6
"float32"   float32                  a float32 copy is stepped                 14
"24bit"     8 bits, in blocks        8 more bits of it are stepped with it     5.03
"8bit"      8 bits, in blocks        rounded stochastically                    4.03

Weights in float32 are stepped as they are. A block is a part of a row (the last dimension) on one rank. So codes and
scales are sharded like their parameter, and move to another layout as they are, bit for bit. What has fewer than
`SMALL` elements, or rows that no block divides, keeps "float32" states: norms, biases, sinks.

On the host: states of weights of `LARGE` bytes lie in its pinned memory, where the GPU's kernel reads and writes them.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from expertmesh.kernels.block_quant import dequantize, join, quantize, rest_of
from expertmesh.parallel.clip import local

STATES = ("8bit", "24bit", "float32")
SMALL = 4096
LARGE = 2**26
SIZES = (256, 128, 64, 32)  # of a block: the first one that divides a row
MOMENTS = ("exp_avg", "exp_avg_sq")
REST, MASTER = "remainder", "master"  # of a weight, beside it, and in its place
STREAM = "stream"  # whose random numbers


class Form(NamedTuple):
    """How the state of one parameter is kept on this rank. size: of a block, 0 where moments are floats of `dtype`.

    master: the dtype of what is kept of the weight itself, None for nothing. first: the place of this rank's first
    element in the whole tensor. host: it lies in memory of the host.
    """

    size: int
    dtype: torch.dtype | None
    master: torch.dtype | None
    first: int
    host: bool = False


def form_of(parameter: torch.Tensor, states: str | None, offload: bool = False) -> Form:
    """The form that `states` asks for; the same one on every rank. `parameter` may be on the meta device."""
    host = offload and is_large(parameter.nbytes) and parameter.is_contiguous()
    if states is None:
        return Form(0, parameter.dtype, None, 0, host)
    narrow = parameter.dtype == torch.bfloat16
    size = 0 if states == "float32" or parameter.numel() < SMALL else _block(parameter)
    if not size:
        return Form(0, torch.float32, torch.float32 if narrow else None, 0, host)
    first = 0
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        first = sum(at * step for at, step in zip(offset, _strides(parameter.shape), strict=True))
    return Form(size, None, torch.int8 if narrow and states == "24bit" else None, first, host)


def is_large(size: float) -> bool:
    """Whether the states of a weight of so many bytes go to the host where any do."""
    return size >= LARGE


def refuse(parameters: Iterable[torch.Tensor], states: str | None) -> None:
    """Raise ValueError for states that do not exist, or not for weights of these dtypes."""
    if states is not None and states not in STATES:
        raise ValueError(f"states={states!r} does not exist: take {', '.join(map(repr, STATES))}, or None.")
    dtypes = {parameter.dtype for parameter in parameters}
    if states is not None and (odd := dtypes - {torch.bfloat16, torch.float32}):
        raise ValueError(f"states={states!r} are of bfloat16 and float32 weights, not of {odd.pop()}: cast the model.")
    if states == "24bit" and dtypes and torch.bfloat16 not in dtypes:
        raise ValueError(
            'states="24bit" extends bfloat16 weights, and these are float32: use "8bit", or cast the model.'
        )


def bytes_kept(parameters: Iterable[torch.Tensor], states: str | None) -> int:
    """Bytes of the parameters and their states on this rank; works on the meta device."""
    total = 0
    for parameter in parameters:
        form, weight = form_of(parameter, states), local(parameter)
        a_moment = 1 + 4 / form.size if form.size else form.dtype.itemsize  # type: ignore[union-attr]
        master = form.master.itemsize if form.master else 0
        total += 4 + round(weight.numel() * (weight.dtype.itemsize + 2 * a_moment + master))
    return total


def create(parameter: nn.Parameter, state: dict[str, Any], form: Form, stream: int) -> None:
    """The state before the first step, beside the parameter or, but for the count of steps, on the host."""
    place = place_of(parameter, form)
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if not form.size:
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, dtype=form.dtype, memory_format=torch.preserve_format, **place)
        if form.master:
            state[MASTER] = torch.empty_like(parameter, dtype=form.master, **place).copy_(parameter.detach())
        return
    state[STREAM] = stream
    weight = local(parameter)
    for key in MOMENTS:
        state[f"{key}_8bit"] = torch.zeros_like(parameter, dtype=torch.uint8, **place)
        scales = weight.new_zeros((*weight.shape[:-1], weight.shape[-1] // form.size), dtype=torch.float32, **place)
        state[f"{key}_scale"] = _like(parameter, scales, parameter.shape[-1] // form.size)
    if form.master:
        state[REST] = torch.zeros_like(parameter, dtype=form.master, **place)


def place_of(parameter: torch.Tensor, form: Form) -> dict[str, Any]:
    """Where its state lies, as options of `torch.empty`."""
    return {"device": "cpu", "pin_memory": parameter.is_cuda} if form.host else {"device": parameter.device}


def convert(parameter: nn.Parameter, state: dict[str, Any], form: Form, stream: int) -> None:
    """Bring a state of any form, as another AdamW or another layout kept it, into this one, through float32."""
    if not {"exp_avg", "exp_avg_8bit"} & state.keys():
        raise ValueError(f"This state ({', '.join(state)}) is another optimizer's: AdamW cannot go on from it.")
    old = dict(state)
    weight = local(parameter)
    if MASTER in old:
        whole = local(old[MASTER]).float()
    else:
        whole = join(weight, local(old[REST])) if REST in old else weight.float()
    state.clear()
    create(parameter, state, form, old.get(STREAM, stream))
    state["step"].copy_(old["step"])
    for key in MOMENTS:
        floats = local(old[key]).float() if key in old else dequantize(*_codes(old, key), key == "exp_avg")
        if form.size:
            codes, scales = quantize(floats, form.size, key == "exp_avg")
            local(state[f"{key}_8bit"]).copy_(codes)
            local(state[f"{key}_scale"]).copy_(scales)
        else:
            local(state[key]).copy_(floats)
        del floats
        for name in (key, f"{key}_8bit", f"{key}_scale"):
            old.pop(name, None)
    if form.master:
        local(state[MASTER if MASTER in state else REST]).copy_(whole if MASTER in state else rest_of(weight, whole))


def has_form(state: dict[str, Any], form: Form, states: str | None) -> bool:
    """Whether a state is kept in this form. Without `states` floats of any dtype are taken as they come."""
    if not form.size:
        return (
            "exp_avg" in state
            and (MASTER in state) == bool(form.master)
            and REST not in state
            and (states is None or state["exp_avg"].dtype == form.dtype)
        )
    if "exp_avg_8bit" not in state or (REST in state) != bool(form.master):
        return False
    rows, blocks = (state[f"exp_avg_{kind}"].shape[-1] for kind in ("8bit", "scale"))  # of all ranks
    return rows == blocks * form.size and STREAM in state


def tensors_of(state: dict[str, Any], form: Form) -> dict[str, Any]:
    """What an `Update` takes of a state of this form: this rank's pieces."""
    if not form.size:
        kept = {key: local(state[key]) for key in MOMENTS}
        return kept | {"master": local(state[MASTER])} if form.master else kept
    kept = {key: local(state[f"{key}_8bit"]) for key in MOMENTS}
    scales = tuple(local(state[f"{key}_scale"]) for key in MOMENTS)
    master = local(state[REST]) if form.master else None
    return {**kept, "scales": scales, "master": master, "stream": state[STREAM], "first": form.first}


def is_plain(state: dict[str, Any]) -> bool:
    """Whether PyTorch's AdamW can read the state."""
    return not state.keys() - {"step", *MOMENTS}


def _codes(state: dict[str, Any], key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's codes and scales of a moment, scales of blocks that other ranks' rows share included."""
    codes, scales = state[f"{key}_8bit"], state[f"{key}_scale"]
    size = codes.shape[-1] // scales.shape[-1]
    mine, of_mine = local(codes), local(scales)
    if mine.shape[-1] == of_mine.shape[-1] * size:
        return mine, of_mine
    _, offset = compute_local_shape_and_global_offset(codes.shape, codes.device_mesh, codes.placements)
    each = of_mine.repeat_interleave(size, -1).narrow(-1, offset[-1], mine.shape[-1])
    return mine, each  # blocks of one element


def _block(parameter: torch.Tensor) -> int:
    row = parameter.shape[-1]
    if isinstance(parameter, DTensor):
        sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        parts = math.prod(size for placement, size in sizes if _shards(placement, parameter.ndim - 1))
        row = row // parts if row % parts == 0 else 0
    fits = (size for size in SIZES if row and row % size == 0)
    return next(fits, 0) if local(parameter).is_contiguous() else 0


def _shards(placement: Any, dim: int) -> bool:
    return not placement.is_replicate() and placement.dim == dim  # Shard(d) and _StridedShard(d)


def _like(parameter: torch.Tensor, piece: torch.Tensor, row: int) -> torch.Tensor:
    """A tensor laid out like the parameter, of other rows; this rank has `piece` of it."""
    if not isinstance(parameter, DTensor):
        return piece
    shape = torch.Size((*parameter.shape[:-1], row))
    return DTensor.from_local(
        piece, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=_strides(shape)
    )


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
