"""Measure a training step: time by phase, memory, host synchronizations and kernel launches.

On a GPU, times are measured by CUDA events, so queued work counts in the phase in which it runs. On the CPU they are
wall time.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from expertmesh.parallel.clip import clip_grad_norm

PHASES = ("forward", "backward", "clip", "optimizer")
WARMUP, REPEATS = 3, 7
PACKED = (12, 9, 8, 7, 6, 5, 4, 3, 3, 2, 2, 1, 1, 1)  # documents of a packed row, in 64ths of it


def documents(seq: int, packed: bool) -> list[int]:
    """Return the lengths of the documents in a row of seq tokens."""
    return [share * seq // 64 for share in PACKED] if packed else [seq]


class Step:
    """A training step of one model on fixed tokens. With `packed`, each row holds 14 documents of different lengths,
    and the model gets position_ids and cu_seq_lens, as from a packing collator.

    With `full`, gradients are clipped to norm 1, by our function if `ours`, else by PyTorch's. Fused AdamW follows,
    with states in the weights' dtype and a learning rate of 0, so that every step has the same weights and
    routing. Setting gradients to None is not timed.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, seq: int, full: bool, ours: bool = False, packed: bool = False
    ) -> None:
        self.model, self.device = model, model.device
        self.clip: Callable[..., Any] = clip_grad_norm if ours else torch.nn.utils.clip_grad_norm_
        vocab = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(1)).to(self.device)
        self.inputs: dict[str, Any] = {"input_ids": ids}
        if packed:
            lengths = documents(seq, packed) * batch
            bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
            self.inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            self.inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths), "use_cache": False}
            self.inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).view(batch, seq).to(self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if full else None

    def run(self) -> tuple[list[Any], torch.Tensor]:
        """Launch one step without waiting for it. Return the time marks between its phases, and the loss."""
        self.model.zero_grad(set_to_none=True)
        marks = [_mark(self.device)]
        loss = self.model(**self.inputs, labels=self.inputs["input_ids"]).loss
        marks.append(_mark(self.device))
        loss.backward()
        marks.append(_mark(self.device))
        if self.optimizer is not None:
            self.clip(self.model.parameters(), 1.0)
            marks.append(_mark(self.device))
            self.optimizer.step()
            marks.append(_mark(self.device))
        return marks, loss.detach()

    def milliseconds(self) -> dict[str, float]:
        """Run one step, wait for it, and return the ms by phase."""
        marks, _ = self.run()
        return dict(zip(PHASES, _between(marks), strict=False))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list[Any]) -> list[float]:
    """Return the milliseconds from each mark to the next."""
    pairs = list(zip(marks, marks[1:], strict=False))
    if isinstance(marks[0], float):
        return [(end - start) * 1e3 for start, end in pairs]
    marks[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def measure(step: Step, warmup: int, repeats: int) -> dict[str, Any]:
    """Return median times of `repeats` steps after `warmup` steps (the first compiles), peak memory and loss."""
    start = time.perf_counter()
    step.milliseconds()
    first = time.perf_counter() - start
    for _ in range(warmup - 1):
        step.milliseconds()
    on_gpu = step.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # launched without synchronizing between steps, as in training; otherwise the GPU would wait for the CPU
    queued = [step.run()[0] for _ in range(repeats)]
    runs = [dict(zip(PHASES, _between(marks), strict=False)) for marks in queued]
    found: dict[str, Any] = {f"{phase}_ms": None for phase in PHASES}
    for phase in runs[0]:
        found[f"{phase}_ms"] = round(statistics.median(run[phase] for run in runs), 2)
    found["step_ms"] = round(statistics.median(sum(run.values()) for run in runs), 2)
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    found["first_step_s"] = round(first, 1)
    found["loss"] = step.run()[1].item()
    return found


def host_syncs(step: Step) -> list[str] | None:
    """Return file:line of each time the CPU waits for the GPU in one step; None on the CPU."""
    if step.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = (warning for warning in said if "called a synchronizing" in str(warning.message))
    return [f"{warning.filename}:{warning.lineno}" for warning in waits]


def count_launches(step: Step) -> int | None:
    """Return the number of kernels, copies and fills of one step on the GPU; None on the CPU."""
    if step.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step.run()
        torch.cuda.synchronize()
    on_gpu = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu)


def gemm_tflops(device: str) -> float:
    """Return the matrix-product rate of this device in TFLOP/s: bfloat16, 8192³ (on the CPU float32, 512³)."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_ms(lambda: a @ b, device) / 1e9


def copy_tb_per_second(device: str) -> float:
    """Return the bytes read and written per second by a device copy of 2 GiB (on the CPU 64 MiB), in TB/s."""
    source = torch.empty(2**31 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_ms(lambda: target.copy_(source), device) / 1e9


def release() -> None:
    """Free unreferenced memory, so that it does not count in the next peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # one per stream, and a recorded step has its own stream
        torch.cuda.empty_cache()


def _median_ms(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        start = _mark(torch.device(device))
        run()
        times += _between([start, _mark(torch.device(device))])
    return statistics.median(times[3:])
