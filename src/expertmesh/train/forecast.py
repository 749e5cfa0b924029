"""What `expertmesh train` says of its plan: before weights are read, after ten measured steps, when memory ends."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from expertmesh import backends
from expertmesh.plan import Plan
from expertmesh.plan.gpus import GIB
from expertmesh.train.config import Config
from expertmesh.train.errors import in_short, is_out_of_memory
from expertmesh.train.planned import ROOM, gpu_here, next_setting, plan_of

WARM_UP, MEASURED = 3, 10  # steps: the first ones compile, tune and record
LESS = 0.9  # of what the plan says that a run needs, for settings that are proposed where even that did not fit
NOTHING = "No other settings fit: take more GPUs, or larger ones."
SHOWN = 4  # pieces of memory, and of time


def planned(config: Config, num_ranks: int) -> Plan | None:
    """The plan of a run on so many GPUs of this machine's kind; None without a GPU, or with a line that says why."""
    try:
        if (gpu := gpu_here()) is None:
            return None
        return plan_of(config, num_ranks, gpu)
    except Exception as error:  # whatever a model's code cannot do on tensors without memory, it may do on a GPU
        backends.logger().info(f"No plan: {in_short(error)}.")
        return None


@torch.random.fork_rng(devices=[])  # the model's weights are drawn later
def foretell(config: Config, num_ranks: int) -> Plan | None:
    """Say what a run needs and how fast it will be, if it can be `planned`, and return that."""
    if (found := planned(config, num_ranks)) is None:
        return None
    for line in lines(found):
        backends.logger().info(line)
    if not found.fits:
        fits = next_setting(config, num_ranks, found.gpu, ROOM * found.gpu.memory)
        backends.logger().info(f"Plan: this fits: {fits}" if fits else f"Plan: {NOTHING}")
    return found


class NoRoomError(RuntimeError):
    """The GPU's memory did not do for a run. Its text says what the run needs by the plan, and which settings fit."""


@contextmanager
def naming_what_fits(config: Config, num_ranks: int) -> Iterator[None]:
    """Within, running out of a GPU's memory is a `NoRoomError`, if the run can be planned."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error) or (advice := _what_fits(config, num_ranks)) is None:
            raise
        raise NoRoomError(f"The GPU ran out of memory ({in_short(error).split('.')[0]}). {advice}") from error


def _what_fits(config: Config, num_ranks: int) -> str | None:
    """What a run needs by its plan, and keys that make it fit; None if it cannot be planned, which is said."""
    if (plan := planned(config, num_ranks)) is None:
        return None
    memory, gpu = plan.layout.memory, plan.gpu
    pieces = _largest(memory.pieces, 1 / GIB, ".1f")
    said = f"By its plan the run needs {memory.needed / GIB:.1f} of {gpu.memory / GIB:.1f} GiB ({pieces})"
    limit = ROOM * gpu.memory
    if plan.fits:
        limit = min(limit, LESS * memory.needed)
        said += ", so another process may hold the rest (nvidia-smi), or the experts have uneven loads"
    line = next_setting(config, num_ranks, gpu, limit)
    return f"{said}. " + (f"This fits: {line}" if line else NOTHING)


def lines(found: Plan) -> list[str]:
    """A plan in two lines: memory and time, the largest pieces of both."""
    memory, speed, gpu = found.layout.memory, found.layout.speed, found.gpu
    rest = f"{found.left / GIB:.1f} are left" if found.fits else f"does not fit, {-found.left / GIB:.1f} lack"
    pieces = _largest(memory.pieces, 1 / GIB, ".1f")
    return [
        f"Plan: {memory.needed / GIB:.1f} of {gpu.memory / GIB:.1f} GiB of each {gpu.name}, {rest} ({pieces})",
        f"Plan: {speed.step * 1e3:,.0f} ms for a step of {speed.tokens:,} tokens on each, "
        f"{speed.tokens_per_second:,.0f} tokens/s ({_largest(speed.seconds, 1e3, '.0f')})",
    ]


class MeasuredSteps(TrainerCallback):
    """After ten steps: their median time, tokens and memory, and what was planned. Goes into metrics.jsonl, too."""

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
        seconds = float(np.median(np.diff(times)))
        memory, speed = self.plan.layout.memory, self.plan.layout.speed
        rate = float(tokens[-1] - tokens[0]) / (len(tokens) - 1) / seconds
        rows = [  # measured, planned
            ("step_ms", seconds * 1e3, speed.step * 1e3, ",.0f", "ms"),
            ("tokens_per_second", rate, speed.tokens_per_second, ",.0f", "tokens/s"),
        ]
        if torch.cuda.is_available():
            rows.append(("peak_gib", torch.cuda.max_memory_allocated() / GIB, memory.peak / GIB, ".1f", "GiB"))
        parts = [f"{found:{form}} {unit} (planned {plan:{form}})" for _, found, plan, form, unit in rows]
        backends.logger().info(f"Step {state.global_step}: {', '.join(parts)}.")
        logs = {f"measured/{key}": round(found, 2) for key, found, *_ in rows}
        logs |= {f"planned/{key}": round(plan, 2) for key, _, plan, *_ in rows}
        self.trainer.callback_handler.on_log(args, state, copy.copy(control), logs)  # it clears `should_log`


def _largest(pieces: Mapping[str, float], scale: float, digits: str) -> str:
    ordered = sorted(pieces.items(), key=lambda piece: -piece[1])
    shown = [(name, size) for name, size in ordered[:SHOWN]] + [("others", sum(size for _, size in ordered[SHOWN:]))]
    return ", ".join(f"{name} {format(size * scale, digits)}" for name, size in shown if size)
