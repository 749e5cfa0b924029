"""What `expertmesh train` says of its plan: before any weight is read, and after ten steps beside what was measured."""

import copy
import statistics
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from expertmesh.plan import Plan
from expertmesh.plan.gpus import GIB
from expertmesh.train.config import Config
from expertmesh.train.errors import in_short
from expertmesh.train.planned import gpu_here, plan_of

WARM_UP, MEASURED = 3, 10  # steps: the first ones compile, tune and record
SHOWN = 4  # pieces of memory, and of time
UNITS = ("step_ms", ",.0f", "ms"), ("tokens_per_second", ",.0f", "tokens/s"), ("peak_gib", ".1f", "GiB")


def foretell(config: Config, num_ranks: int) -> Plan | None:
    """Print what a run on this machine's GPUs needs and how fast it will be, and return it.

    Without a GPU nothing is said. A run that cannot be planned runs all the same, and a line says why it was not.
    """
    try:
        if (gpu := gpu_here()) is None:
            return None
        with torch.random.fork_rng(devices=[]):  # the model's weights are drawn later
            found = plan_of(config, num_ranks, gpu)
    except Exception as error:  # whatever a model's code does on tensors without memory, it may do right on a GPU
        say(f"No plan: {in_short(error)}.")
        return None
    for line in lines(found):
        say(line)
    return found


def lines(found: Plan) -> list[str]:
    """A plan in two lines: memory and time, the largest pieces of both."""
    memory, speed, gpu = found.layout.memory, found.layout.speed, found.gpu
    rest = f"{found.left / GIB:.1f} are left" if found.fits else f"does not fit, {-found.left / GIB:.1f} lack"
    return [
        f"Plan: {memory.needed / GIB:.1f} of {gpu.memory / GIB:.1f} GiB of each {gpu.name}, {rest} "
        f"({_largest(memory.pieces, 1 / GIB, '.1f')})",
        f"Plan: {speed.step * 1e3:,.0f} ms for a step of {speed.tokens:,} tokens on each, "
        f"{speed.tokens_per_second:,.0f} tokens/s ({_largest(speed.seconds, 1e3, '.0f')})",
    ]


class BesidePlan(TrainerCallback):
    """After ten steps: their median time, tokens and memory, beside what was planned. Goes into metrics.jsonl, too."""

    def __init__(self, plan: Plan, trainer: Any) -> None:
        self.plan, self.trainer = plan, trainer
        self.ends: list[tuple[float, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.ends) == MEASURED:
            return
        self.ends.append((time.perf_counter(), self.trainer.tokens))
        if len(self.ends) < MEASURED:
            return
        times, tokens = zip(*self.ends[WARM_UP - 1 :], strict=True)
        seconds = statistics.median(after - before for before, after in pairwise(times))
        memory, speed = self.plan.layout.memory, self.plan.layout.speed
        rate = float(tokens[-1] - tokens[0]) / (len(tokens) - 1) / seconds
        measured = {"step_ms": seconds * 1e3, "tokens_per_second": rate}
        planned = {"step_ms": speed.step * 1e3, "tokens_per_second": speed.tokens_per_second}
        if torch.cuda.is_available():
            measured["peak_gib"], planned["peak_gib"] = torch.cuda.max_memory_allocated() / GIB, memory.peak / GIB
        told = [
            f"{measured[key]:{form}} {unit} (planned {planned[key]:{form}})"
            for key, form, unit in UNITS
            if key in measured
        ]
        say(f"Step {state.global_step}: {', '.join(told)}.")
        logs = {f"measured/{key}": round(x, 2) for key, x in measured.items()}
        logs |= {f"planned/{key}": round(x, 2) for key, x in planned.items()}
        self.trainer.callback_handler.on_log(args, state, copy.copy(control), logs)  # it clears `should_log`


def say(line: str) -> None:
    """Print a line for whoever started the run."""
    print(line, file=sys.stderr)


def _largest(pieces: Mapping[str, float], scale: float, digits: str) -> str:
    ordered = sorted(pieces.items(), key=lambda piece: -piece[1])
    shown = [(name, size) for name, size in ordered[:SHOWN]] + [("others", sum(size for _, size in ordered[SHOWN:]))]
    return ", ".join(f"{name} {format(size * scale, digits)}" for name, size in shown if size)
