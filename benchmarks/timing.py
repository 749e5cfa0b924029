"""How the micro-benchmarks measure a call: behind other work, so that the first launches are not waited for.

Later ones are not either, as long as the CPU launches faster than the GPU runs. The other work moves memory: after much
of it a GPU that was at its limit of power multiplies matrices at higher clocks, as after a rest.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 2**28  # more than an L2 cache holds
FLUSHES_PER_MS = 16  # or fewer, where memory is slower than an H200's


def median_ms(run: Callable[[], Any], repeats: int, warmup: int = 3, queued: int = 1, lead: int = 1) -> float:
    """Milliseconds of a call on the device, as `medians_ms`."""
    return medians_ms(run, repeats, warmup, queued, lead)[0]


def medians_ms(
    run: Callable[[], Any], repeats: int, warmup: int = 3, queued: int = 1, lead: int = 1
) -> tuple[float, float]:
    """Milliseconds of a call on the device, and of the CPU until it returns: medians of `repeats` rows of
    `queued` calls one behind the other. Before a row come about `lead` milliseconds of what empties the L2 cache and
    lets the CPU launch ahead.

    Without a GPU both are the time of the call.
    """
    on_gpu = torch.cuda.is_available()
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.int8, device="cuda" if on_gpu else "cpu")
    rows = []
    for _ in range(warmup + repeats):
        if on_gpu:
            for _ in range(lead * FLUSHES_PER_MS):
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        begin = time.perf_counter()
        for _ in range(queued):
            run()
        elapsed = cpu = (time.perf_counter() - begin) * 1e3
        if on_gpu:
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        rows.append((elapsed / queued, cpu / queued))
    device, host = zip(*rows[warmup:], strict=True)
    return statistics.median(device), statistics.median(host)
