"""Code shared by the scripts of this folder: options, result file, timing of calls, and cases with several arms."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.bench.origin import origin, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16
BYTES_PER_MS, FLOP_PER_MS = 4.25e9, 788e9  # rates for floors: one H200's copy, and product of 8192 x 8192
FLUSH_BYTES = 2**28  # more than an L2 cache holds
FLUSHES_PER_MS = 16  # on an H200; fewer on GPUs with slower memory


def parser(doc: str | None, repeats: int = 20, cases: bool = False) -> argparse.ArgumentParser:
    """Return a parser of the common options. `doc` is the script's docstring; `cases` adds the choice of cases."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", help="write the JSON here as well")
    found.add_argument("--commit", default="", help="default: that of the working tree")
    found.add_argument("--repeats", type=int, default=repeats, help="timed calls")
    found.add_argument("--tiny", action="store_true", help="small sizes, to try the script; its times mean nothing")
    if cases:
        found.add_argument("--only", default="", help="with commas: cases whose names begin with one of these")
    return found


class Result:
    """The JSON of one run: its provenance and its rows. Each row is printed and written at once, because a later one
    may fail.
    """

    def __init__(
        self, options: argparse.Namespace, packages: tuple[str, ...] = ("triton", "transformers"), **more: Any
    ):
        command = ["python", *sys.argv]
        self.content = origin(command, options.commit, packages) | more | {"rows": []}
        self.out = options.out

    def add(self, row: dict[str, Any], key: str = "rows") -> None:
        print(json.dumps(row), flush=True)
        self.content.setdefault(key, []).append(row)
        self.save()

    def save(self) -> None:
        write(self.content, self.out)


def interpreted() -> contextlib.AbstractContextManager:
    """Context manager that runs our kernels in Triton's interpreter, also on a CPU, if TRITON_INTERPRET=1."""
    wanted = os.environ.get("TRITON_INTERPRET") == "1"
    return backends.interpreted() if wanted else contextlib.nullcontext()


def attempt(run: Callable[[], dict[str, Any]], ours: bool) -> dict[str, Any]:
    """Return the result of `run`, or {"failed": reason} if another library's kernel fails. Our errors are raised."""
    try:
        return run()
    except Exception as error:
        if ours:
            raise
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:150]}


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return a leaf tensor of normal random numbers that requires a gradient."""
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE).requires_grad_()


class Case(NamedTuple):
    """One operation, and the functions that compute it. Names of ours begin with "expertmesh".

    floors: minimum milliseconds of forward and backward on one H200; a backward of 0 is not compared. whole: compare
    only the sum of both, because some arm computes its gradients in the forward.
    """

    name: str
    arms: dict[str, Callable]
    inputs: Sequence[torch.Tensor]
    floors: tuple[float, float]
    whole: bool = False


def time_cases(result: Result, cases: Iterable[Case], options: Any, queued: int = 1, lead: int = 1) -> None:
    """Add a row per case, arm and pass to `result`. With --only, run only cases whose names begin with one of these."""
    only = tuple(filter(None, options.only.split(",")))
    with interpreted():
        for case in cases:
            if not only or case.name.startswith(only):
                for row in _rows(case, options.repeats, queued, lead):
                    result.add(row)
                if DEVICE == "cuda":
                    torch.compiler.reset()


def _rows(case: Case, repeats: int, queued: int, lead: int) -> Iterator[dict[str, Any]]:
    for arm, fn in case.arms.items():
        row = {"kernel": case.name, "implementation": arm}
        args = fn, case.inputs, repeats, queued, lead
        found = attempt(lambda args=args: forward_backward(*args), arm.startswith("expertmesh"))
        if "failed" in found:
            yield row | found
            continue
        for (what, (ms, cpu_ms)), floor in zip(found.items(), [*case.floors, sum(case.floors)], strict=False):
            if what == "both" or not case.whole:
                times = {"pass": what, "ms": round(ms, 4), "cpu_ms": round(cpu_ms, 4)}
                yield row | times | {"floor_ms": round(floor, 4), "share_of_floor": round(floor / ms, 3)}


def forward_backward(
    fn: Callable, inputs: Sequence[torch.Tensor], repeats: int, queued: int = 1, lead: int = 1
) -> dict[str, tuple[float, float]]:
    """Return (ms, CPU ms) of the "forward" with saved tensors, of the "backward", and of "both" together.

    Without an input that requires a gradient, return only "forward". queued, lead: as in `medians_ms`.
    """
    leaves = [x for x in inputs if x.requires_grad]

    def outputs() -> list[torch.Tensor]:
        found = fn(*inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def backward(results: list[torch.Tensor], keep: bool) -> Any:
        return torch.autograd.grad(results, leaves, gradients, retain_graph=keep, allow_unused=True)

    times = {"forward": medians_ms(outputs, repeats, queued, lead)}
    if leaves:
        kept = outputs()
        gradients = [torch.randn_like(y) for y in kept]
        times["backward"] = medians_ms(lambda: backward(kept, True), repeats, queued, lead)
        kept = []
        times["both"] = medians_ms(lambda: backward(outputs(), False), repeats, queued, lead)
    return times


def medians_ms(
    run: Callable[[], Any], repeats: int, queued: int = 1, lead: int = 1, warmup: int = 3
) -> tuple[float, float]:
    """Return the milliseconds of a call on the device and on the CPU: medians over `repeats` series of calls.

    A series is `queued` consecutive calls. Before each, about `lead` milliseconds of writes flush the L2 cache
    while the CPU launches ahead; a long lead also lets a GPU at its power limit recover its clocks. Without a GPU both
    values are the time of the call.
    """
    on_gpu = torch.cuda.is_available()
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.int8, device="cuda" if on_gpu else "cpu")
    rows, warmup = [], min(warmup, repeats)  # a single repeat only tries the script
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
