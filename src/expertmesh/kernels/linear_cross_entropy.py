"""The language-model loss from hidden states: linear head and cross entropy without storing logits [N, V].

    logits = hidden @ weight.T + bias         loss = sum over rows of (logsumexp(logits) - logits[label]) / count
    dlogits = softmax(logits) - onehot        dhidden = dlogits @ weight      dweight = dlogits.T @ hidden

Rows are processed in chunks. As the loss is the last operation of a step, forward already computes the gradients. It
makes a chunk's logits once (6 N H V operations in all), a row kernel replaces them by their gradients in place, and two
GEMMs consume these. The gradients are stored unscaled, so that float16 does not underflow. The weight's is summed in
float32 over the chunks. Backward only multiplies by `grad_output / count`. With few rows dlogits is smaller than the
weight's gradient: forward stores dlogits, and backward computes the weight's gradient from it.

On request the pass over a row that computes its logsumexp also computes metrics of the predictions (`Statistics`).

Letters: N rows (tokens), H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit


class Statistics(NamedTuple):
    """Sums over labelled rows, scalars on the device without gradient. labelled: number of rows. entropy: of
    softmax(logits), in nats. correct: number of labels that are the argmax, which is the first maximum.
    """

    labelled: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor


class Loss(NamedTuple):
    """Result of `linear_cross_entropy`; the loss is total / divisor.

    divisor: the number of labelled rows, or the given number. parts: gradients of `total` in hidden, weight and bias
    (None if not wanted), and None. If the weight's is deferred, parts[1], parts[3] are dlogits [N, V] and hidden [N,
    H].
    """

    total: torch.Tensor
    divisor: torch.Tensor
    labelled: torch.Tensor
    parts: tuple[torch.Tensor | None, ...]
    statistics: Statistics | None


def statistics_reference(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> Statistics:
    """The specification of `Statistics`, from logits [N, V]."""
    labelled = labels != ignore_index
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    correct = labelled & (logits.argmax(dim=-1) == labels)
    return Statistics(labelled.sum(), entropy.masked_fill(~labelled, 0.0).sum(), correct.sum())


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the rows per chunk. Logits of a chunk take up to 1.25 GiB on a large GPU, 1/64 of the memory of a small
    one (but at least 1024 rows), 8 MiB on a CPU (but at least 256 rows). Larger chunks are faster on a GPU, as every
    chunk reads and writes the weight's whole gradient. On a CPU the page faults of a larger buffer cost more.

    Where they fit, chunks are multiples of 2048 rows. The hidden states' gradient is a GEMM with few columns: at a
    width of 2048, 2048 rows are 128 output tiles, just below the 132 multiprocessors of a Hopper. Other counts leave
    part of the last wave idle. Elsewhere chunks are equal.
    """
    memory = backends.device_memory(device)
    budget, min_rows = (min(5 * 2**28, memory // 64), 1024) if memory else (2**23, 256)
    rows = max(min_rows, budget // (vocab_size * dtype.itemsize))
    if memory and rows >= 2048:
        rows = rows // 2048 * 2048
    else:
        chunks = max(1, -(-num_rows // rows))
        rows = -(-num_rows // (chunks * 64)) * 64  # whole GEMM tiles
    return max(1, min(num_rows, rows))


#: elements per step of a program, and warps; statistics take more registers
TUNING = {
    "rows": {"BLOCK": 32768, "num_warps": 32},
    "statistics": {"BLOCK": 16384, "num_warps": 32},
    "scale": {"BLOCK": 4096, "num_warps": 8},
}
_LOWEST = tl.constexpr(-1e37)  # below any logit, and finite, as a lane may only get padding


@triton.jit
def _merge(x, cols, label, largest, total, weighted, before, STATISTICS: tl.constexpr):
    """Update running values per lane with x [:, lane]: the maximum m and the sum of exp(x - m). With STATISTICS also
    the sum of (x - m) exp(x - m), and the maximum of the columns before the label's.
    """
    new_largest = tl.maximum(largest, tl.max(x, axis=0))
    shifted = x - new_largest[None, :]
    exps = tl.exp(shifted)
    scale = tl.exp(largest - new_largest)
    if STATISTICS:
        weighted = (weighted + total * (largest - new_largest)) * scale + tl.sum(exps * shifted, axis=0)
        before = tl.maximum(before, tl.max(tl.where(cols < label, x, _LOWEST), axis=0))
    return new_largest, total * scale + tl.sum(exps, axis=0), weighted, before


@fast_jit
def _rows_kernel(
    logits_ptr, labels_ptr, out_ptr, V, stride, ignore_index,
    GRAD: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row: write its loss to out [C, 1] and, with GRAD, softmax(logits) - onehot(label) over the
    logits. With STATISTICS out is [C, 3] and also gets the entropy and whether the label is the argmax.

    The first pass computes maximum and sum of exponentials, the second the gradient. Only its program touches a row.
    Rows may be read and written up to their stride, a multiple of 16, so accesses stay wide for any V. The loops avoid
    work per element: lanes are merged at the end, so no warp waits for another; only the last block is masked; the
    label's own entry is written last.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    out_ptr += row * (3 if STATISTICS else 1)
    cols = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    start = 0
    if label == ignore_index:
        for i in tl.static_range(3 if STATISTICS else 1):
            tl.store(out_ptr + i, 0.0)
        if GRAD:
            while start < V:  # not `for … in range`: NumPy >= 2.4 broke that in Triton's interpreter
                tl.store(logits_ptr + start + cols, tl.zeros_like(cols).to(tl.float32), start + cols < stride)
                start += BLOCK
    else:
        valid = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, valid, other=float("nan")).to(tl.float32)
        lane_largest = tl.full((LANES,), _LOWEST, tl.float32)
        lane_before = lane_largest
        lane_total = tl.zeros((LANES,), tl.float32)
        lane_weighted = lane_total
        while start + BLOCK <= V:
            x = tl.load(logits_ptr + start + cols, eviction_policy="evict_last").to(tl.float32)
            lane_largest, lane_total, lane_weighted, lane_before = _merge(
                x, cols, (label - start).to(tl.int32), lane_largest, lane_total, lane_weighted, lane_before, STATISTICS
            )
            start += BLOCK
        if start < V:
            x = tl.load(logits_ptr + start + cols, start + cols < stride, other=0.0).to(tl.float32)
            x = tl.where(start + cols < V, x, _LOWEST)
            lane_largest, lane_total, lane_weighted, lane_before = _merge(
                x, cols, (label - start).to(tl.int32), lane_largest, lane_total, lane_weighted, lane_before, STATISTICS
            )
        largest = tl.max(lane_largest, axis=0)
        lane_scale = tl.exp(lane_largest - largest)
        total = tl.sum(lane_total * lane_scale, axis=0)
        logsumexp = tl.where(
            valid, largest + tl.log(total), float("nan")
        )  # nan for an invalid label, no read elsewhere
        tl.store(out_ptr, logsumexp - target)
        if STATISTICS:
            weighted = tl.sum((lane_weighted + lane_total * (lane_largest - largest)) * lane_scale, axis=0)
            tl.store(out_ptr + 1, tl.log(total) - weighted / total)
            first = (target >= largest) & (target > tl.max(lane_before, axis=0))
            tl.store(out_ptr + 2, first.to(tl.float32))
        if GRAD:
            start = 0
            while start + BLOCK <= V:
                x = tl.load(logits_ptr + start + cols, eviction_policy="evict_first").to(tl.float32)
                tl.store(logits_ptr + start + cols, tl.exp(x - logsumexp))
                start += BLOCK
            if start < V:
                mask = start + cols < stride
                x = tl.load(logits_ptr + start + cols, mask, other=0.0).to(tl.float32)
                tl.store(logits_ptr + start + cols, tl.exp(x - logsumexp), mask)
            tl.debug_barrier()  # orders this write after those of the program's other threads
            tl.store(logits_ptr + label, tl.exp(target - logsumexp) - 1.0, valid)


@fast_jit
def _scale_kernel(x_ptr, scale_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + at, x * tl.load(scale_ptr).to(tl.float32), at < N)


def _rows(logits: torch.Tensor, labels: torch.Tensor, out: torch.Tensor, ignore_index: int, grad: bool) -> None:
    """Run `_rows_kernel` or its PyTorch reference: write out [C, 1 or 3] and, with `grad`, replace the logits."""
    if use_triton(logits):
        tuning = TUNING["statistics" if out.shape[1] > 1 else "rows"]
        block = min(tuning["BLOCK"], triton.next_power_of_2(logits.shape[1]))
        warps = max(1, tuning["num_warps"] * block // tuning["BLOCK"])
        _rows_kernel[(logits.shape[0],)](
            logits, labels, out, logits.shape[1], logits.stride(0), ignore_index,
            GRAD=grad, STATISTICS=out.shape[1] > 1, BLOCK=block, LANES=min(block, warps * 256), num_warps=warps,
        )  # fmt: skip
        return
    ignored = labels == ignore_index
    if labels.device.type == "cpu" and bool((~ignored & ((labels < 0) | (labels >= logits.shape[1]))).any()):
        raise ValueError(
            f"Labels must lie in [0, {logits.shape[1]}) or be ignore_index ({ignore_index}); got {int(labels.min())} "
            f"to {int(labels.max())}. Does the tokenizer belong to this model?"
        )
    target = labels.masked_fill(ignored, 0)[:, None]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    out[:, 0] = -log_probs.gather(1, target)[:, 0].masked_fill(ignored, 0.0)
    if out.shape[1] > 1:
        out[:, 1] = -(log_probs.exp() * log_probs).sum(1).masked_fill(ignored, 0.0)
        out[:, 2] = (logits.argmax(1) == target[:, 0]).masked_fill(ignored, False)
    if grad:
        grad_rows = log_probs.exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
        torch.mul(grad_rows, ~ignored[:, None], out=logits)


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """Compute total = a.T @ b (first) or total += a.T @ b in total's dtype, for a and b of any dtype."""
    beta, mixed = 0 if first else 1, a.dtype != total.dtype
    if mixed and not backends.on_gpu(a):  # CPUs have no GEMM from bfloat16 to float32
        a, b, mixed = a.to(total.dtype), b.to(total.dtype), False
    options: dict[str, Any] = {"out_dtype": total.dtype} if mixed else {}
    torch.addmm(total, a.t(), b, beta=beta, out=total, **options)


def scaled(x: Any, scale: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return x * scale, multiplied in float32; None for None. scale is [1]: 0-dim would be rounded to x's dtype."""
    if x is None:
        return None
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not use_triton(x):
        return torch.mul(x, scale, out=out)
    tuning = TUNING["scale"]
    _scale_kernel[(triton.cdiv(x.numel(), tuning["BLOCK"]),)](x, scale, out, x.numel(), **tuning)
    return out


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None, ignore_index: int, wanted: list[bool], counts: bool,
) -> Loss:  # fmt: skip
    """Return the float32 cross entropy of `hidden @ weight.T + bias` against labels, and all that its backward needs.

    hidden: [N, H]; weight: [V, H]; bias: [V]; labels: [N], integers, already shifted. The loss is the mean over rows
    whose label is not `ignore_index` (nan without any), or their sum divided by `num_items_in_batch`, a number or a
    tensor that is read without a sync. wanted: whether hidden, weight and bias get a gradient. counts: whether to
    compute statistics. Must equal transformers' `ForCausalLMLoss` on those logits. An invalid label, outside [0, V) and
    not `ignore_index`, raises ValueError on a CPU. On a GPU, where an error would need a sync, it makes the loss nan.
    """
    assert hidden.ndim == weight.ndim == 2 and labels.shape == hidden.shape[:1], "flatten batch and sequence"
    (N, H), V = hidden.shape, weight.shape[0]
    labels = labels.long().contiguous()
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    rows = chunk_rows(N, V, hidden.dtype, hidden.device)
    allocate = torch.empty if N else torch.zeros  # without rows no chunk overwrites it
    defer_dweight = min(rows, H) >= N and hidden.dtype != torch.float16  # float16 lacks the range for it
    one_chunk = rows >= N and hidden.dtype == torch.bfloat16  # nothing to sum, so no wider dtype
    dtype = hidden.dtype if one_chunk else sum_dtype
    dweight = allocate(V, H, dtype=dtype, device=hidden.device) if wanted[1] and not defer_dweight else None
    dbias = torch.zeros(V, dtype=sum_dtype, device=hidden.device) if wanted[2] else None
    width = -(-V // 16) * 16  # rows start aligned for GEMMs and wide loads, whatever V is
    buffer = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device)[:, :V]
    out = torch.empty(N, 3 if counts else 1, dtype=torch.float32, device=hidden.device)
    for start in range(0, N, rows):
        hidden_CH = hidden[start : start + rows]
        logits_CV = buffer[: hidden_CH.shape[0]]
        if bias is None:
            torch.mm(hidden_CH, weight.t(), out=logits_CV)
        else:
            torch.addmm(bias, hidden_CH, weight.t(), out=logits_CV)
        _rows(logits_CV, labels[start : start + rows], out[start : start + rows], ignore_index, any(wanted))
        dlogits_CV = logits_CV  # overwritten in place
        if dhidden is not None:
            torch.mm(dlogits_CV, weight, out=dhidden[start : start + rows])
        if dweight is not None:
            _accumulate(dweight, dlogits_CV, hidden_CH, first=start == 0)
        if dbias is not None:
            dbias += dlogits_CV.sum(0, dtype=sum_dtype)
    total, *statistics = out.sum(0).unbind()
    labelled = count = (labels != ignore_index).sum()
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch)  # may stay on the CPU: division needs no copy of it
        count = count.to(total.device) if count.device.type != "cpu" else count
    factors = (buffer[:N], hidden) if wanted[1] and defer_dweight else (dweight, None)
    parts = dhidden, factors[0], dbias, factors[1]
    return Loss(total, count, labelled, parts, Statistics(labelled, *statistics) if counts else None)
