"""Plan a run from its configuration, choose values for `auto` keys, and suggest settings that fit in memory.

`expertmesh train` logs the plan before loading weights and after ten measured steps, and adds it to memory errors.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from expertmesh import backends
from expertmesh.parallel.setup import WHOLE
from expertmesh.plan import Plan, plan
from expertmesh.plan.gpus import GIB, GPU, gpu_here
from expertmesh.plan.layouts import MOST_ROWS, ep_sizes, fastest
from expertmesh.plan.memory import Job
from expertmesh.train.config import Config, ConfigError, load_config
from expertmesh.train.errors import as_config_error, is_out_of_memory, short_message
from expertmesh.train.folder import starting_point
from expertmesh.train.inputs import freeze_routers, load_model_config, lora
from expertmesh.train.launch import layout

#: {Transformers' name of an optimizer: its name in plan/memory.py}
OPTIMS = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "adamw_8bit": "adamw-8bit"}
OPTIMS |= {"adamw_bnb_8bit": "adamw-8bit", "adamw_torch_8bit": "adamw-8bit", "sgd": "sgd"}
BATCH, EP_SIZE = "train.per_device_train_batch_size", "parallel.ep_size"
ACCUMULATION, RECOMPUTE = "train.gradient_accumulation_steps", "train.activation_checkpointing"
LEVELS: tuple[dict[str, Any], ...] = {}, {RECOMPUTE: "experts"}, {RECOMPUTE: True}, {RECOMPUTE: "offload"}
ROOM = 0.97  # share of a GPU's memory that chosen settings may use; plans add another 6 % for fragmentation
SHORTEST = 256  # tokens; shorter rows are not suggested
WARM_UP, MEASURED = 3, 10  # steps: the first ones compile, tune and record
LESS = 0.9  # limit for suggested settings, relative to the plan of a run that should have fit but ran out of memory
SHOWN = 4  # largest pieces of memory and of time that are listed


def plan_of(config: Config, gpus: int, gpu: GPU) -> Plan:
    """Return the plan of this run on `gpus` GPUs of type `gpu`. Only the model's config.json is read.

    Raises ConfigError for settings that cannot be planned, ValueError for settings that conflict.
    """
    return plan(job_of(config, gpus), gpu, config.train.gradient_accumulation_steps)


def job_of(config: Config, gpus: int) -> Job:
    """Return the `Job` of a run. Raise ConfigError for settings that plans do not support."""
    train, parallel, section = config.train, config.parallel, config.model
    batch, ep_size = train.per_device_train_batch_size, parallel.ep_size
    assert isinstance(batch, int) and isinstance(ep_size, int), "resolve_auto comes first"
    if train.bf16:
        raise ConfigError("train.bf16: a plan does not support autocast. Set model.dtype to bfloat16 instead.")
    if train.optim not in OPTIMS:
        raise ConfigError(f"train.optim: a plan does not support {train.optim!r}, only {', '.join(OPTIMS)}.")
    layout(config, gpus)
    model = load_model_config(config)
    if hasattr(model, "auto_map"):
        raise ConfigError("model.trust_remote_code: a plan does not run code that comes with a checkpoint.")
    has_mtp = bool(getattr(model, "num_nextn_predict_layers", 0))
    default: Any = torch.float32 if section.name == "demo" else model.dtype or torch.bfloat16  # as in load_model
    return Job(
        model,
        batch=batch,
        seq=config.data.max_length,
        world_size=gpus,
        ep_size=ep_size,
        dp_replicate_size=parallel.dp_replicate_size,
        tp_size=parallel.tp_size,
        recompute=train.activation_checkpointing,
        optimizer=f"adamw-{train.optim_states}" if train.optim_states else OPTIMS[train.optim],
        released=train.gradient_release or False,
        offloaded=train.optim_offload,
        dtype=default if section.dtype == "auto" else getattr(torch, section.dtype),
        fused=section.fused,
        attention=section.attn_implementation,
        experts=config.quantization.experts if config.quantization else None,
        adapt=partial(_adapt, config) if config.lora or config.moe.freeze_router else None,
        mtp=has_mtp and section.fused is not False and not section.random_weights,
        accumulates=train.gradient_accumulation_steps > 1,
    )


def _adapt(config: Config, model: Any) -> Any:
    """Freeze routers and add LoRA adapters, as a run does before it trains."""
    freeze_routers(config, model)
    if config.lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora(config))


def open_keys(config: Config) -> list[str]:
    """Return the keys whose value is `auto`."""
    return [key for key, value in auto_values(config).items() if value == "auto"]


def resolve_auto(config: Config, num_ranks: int) -> Config:
    """Replace `auto` by the numbers that are fastest by the plan on `num_ranks` of this machine's GPUs, and log them.

    A resumed run keeps the numbers in the config.yaml next to its checkpoint. Raises ConfigError without a GPU of a
    known type, or if nothing fits.
    """
    keys, config = open_keys(config), _from_earlier_run(config, num_ranks)
    if num_ranks == 1 and EP_SIZE in open_keys(config):
        config = with_keys(config, {EP_SIZE: 1})
    if unresolved := open_keys(config):
        with as_config_error(f"{unresolved[0]}: `auto` is planned for a GPU, so set a number"):
            if (gpu := gpu_here()) is None:
                raise ValueError("there is none here")
        config = fastest_settings(config, num_ranks, gpu)
    if keys:
        backends.logger().info(f"auto: {as_arguments({key: auto_values(config)[key] for key in keys})}")
    return config


def fastest_settings(config: Config, num_ranks: int, gpu: GPU) -> Config:
    """Replace `auto` values by the fastest numbers that leave 3 % of the memory of such a GPU.

    Raises ConfigError if nothing fits; the message suggests settings that do.
    """
    keys, room = open_keys(config), ROOM * gpu.memory
    smallest = with_keys(config, dict.fromkeys(keys, 1))
    job, steps = job_of(smallest, num_ranks), config.train.gradient_accumulation_steps
    sizes = ep_sizes(job) if EP_SIZE in keys else [job.ep_size]
    rows = [2**n for n in range(MOST_ROWS.bit_length())] if BATCH in keys else [job.batch]
    with as_config_error(f"{keys[0]}: `auto` needs a plan"):
        layout = fastest(job, gpu, sizes, rows, room, steps)
    if layout is None:
        fits = next_setting(smallest, num_ranks, gpu, room)
        raise ConfigError(f"{keys[0]}: `auto` finds nothing that fits {num_ranks} x {gpu.name}. {fits}")
    best = {BATCH: layout.job.batch, EP_SIZE: layout.job.ep_size}
    return with_keys(config, {key: best[key] for key in keys})


def next_setting(config: Config, num_ranks: int, gpu: GPU, limit: float) -> str:
    """Return a sentence that suggests keys with which the run needs at most `limit` bytes by the plan.

    It first tries keys that keep a step's numerics (smaller micro-batches, recomputed layers), then adds the changes of
    `_changes` one after the other. Of the first change that fits, it suggests the fastest variant.
    """

    def fitting(keys: dict[str, Any]) -> tuple[float, dict[str, Any]] | None:
        try:
            layout = plan_of(with_keys(config, keys), num_ranks, gpu).layout
        except ValueError:  # these keys conflict or cannot be planned: do not suggest them
            return None
        return (layout.speed.tokens_per_second, keys) if layout.memory.needed <= limit else None

    policy = config.train.activation_checkpointing  # keep the user's policy; but whole-layer recompute may offload
    levels = LEVELS if not policy else (LEVELS[0], LEVELS[-1]) if policy in WHOLE else LEVELS[:1]
    for change in _changes(config, num_ranks):
        rows = _fewer_rows(config, "train.gradient_release" in change)
        tried = (map(fitting, (change | fewer | recompute for fewer in rows)) for recompute in levels)
        if fitted := [fits for level in tried for fits in takewhile(bool, level) if fits]:
            return f"This fits: {as_arguments(max(fitted, key=lambda fit: fit[0])[1])}"
    return "No other settings fit: take more GPUs, or larger ones."


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return the configuration with these keys replaced. Raise ValueError if the values conflict."""
    tree = config.model_dump(exclude_unset=True)
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree[section] = tree.get(section, {}) | {name: value} if name else value
    return Config.model_validate(tree)


def as_arguments(keys: Mapping[str, Any]) -> str:
    """Format keys and values as command-line arguments."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in keys.items())


def auto_values(config: Config) -> dict[str, Any]:
    """Return the keys that may be `auto`, with their values."""
    return {BATCH: config.train.per_device_train_batch_size, EP_SIZE: config.parallel.ep_size}


def _from_earlier_run(config: Config, num_ranks: int) -> Config:
    """Replace `auto` by the values of the run that this one resumes from, if there is one."""
    keys, checkpoint = open_keys(config), starting_point(config)
    folder = Path(config.save.output_dir) if checkpoint is True else Path(checkpoint or "").absolute().parent
    if not keys or checkpoint is None or not (folder / "config.yaml").is_file():
        return config
    before = auto_values(load_config(folder / "config.yaml"))
    if before[EP_SIZE] == 1 or num_ranks // config.parallel.dp_replicate_size % before[EP_SIZE]:
        before[EP_SIZE] = "auto"  # it ran on another number of ranks, or chose 1, which a new plan would find again
    return with_keys(config, {key: before[key] for key in keys})


def _changes(config: Config, num_ranks: int) -> Iterator[dict[str, Any]]:
    """Yield changes other than rows and recompute, in the order in which `next_setting` tries them."""
    train, small = config.train, dict[str, Any]()
    yield small
    ours = train.optim in ("adamw_torch", "adamw_torch_fused")
    if ours and train.optim_states != "8bit":
        yield (small := {"train.optim_states": "8bit"})
    if ours and train.gradient_release is None and train.cuda_graph is not True:
        small = small | {"train.gradient_release": "running"}
        yield (small := small | ({ACCUMULATION: 1} if train.gradient_accumulation_steps > 1 else {}))
    if ours and num_ranks == 1 and not train.optim_offload:
        yield small | {"train.optim_offload": True}
    for length in (config.data.max_length // 2, config.data.max_length // 4):
        if length >= SHORTEST:
            yield small | {"data.max_length": length}
    if config.lora is None and find_spec("peft"):
        yield {"lora": {}}


def _fewer_rows(config: Config, released: bool) -> list[dict[str, Any]]:
    """Return keys for smaller micro-batches, from 1 row up to the present size. Accumulation keeps the step's batch."""
    rows, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    assert isinstance(rows, int)
    sizes, once = [rows], released or config.train.gradient_release  # released gradients cannot be accumulated
    while sizes[0] > 1:
        sizes.insert(0, 1 if sizes[0] % 2 else sizes[0] // 2)
    return [{BATCH: few} | ({} if once else {ACCUMULATION: steps * rows // few}) for few in sizes[:-1]] + [{}]


def planned(config: Config, num_ranks: int) -> Plan | None:
    """Return the plan of a run on `num_ranks` GPUs of this machine's type; None without a GPU or on a logged error."""
    try:
        return plan_of(config, num_ranks, gpu) if (gpu := gpu_here()) else None
    except Exception as error:  # a model's code that fails on meta tensors may still run on a GPU
        backends.logger().info(f"No plan: {short_message(error)}.")
        return None


@torch.random.fork_rng(devices=[])  # the model's weights are drawn later
def log_plan(config: Config, num_ranks: int) -> Plan | None:
    """Log the memory and speed that the plan predicts, and return the plan; None if the run cannot be planned."""
    if (run_plan := planned(config, num_ranks)) is None:
        return None
    for line in summary_lines(run_plan):
        backends.logger().info(f"Plan: {line}")
    if not run_plan.fits:
        backends.logger().info(f"Plan: {next_setting(config, num_ranks, run_plan.gpu, ROOM * run_plan.gpu.memory)}")
    return run_plan


@contextmanager
def suggest_what_fits(config: Config, num_ranks: int) -> Iterator[None]:
    """Context manager that adds a note to out-of-memory errors: what the run needs by its plan, and what would fit."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) and (plan := planned(config, num_ranks)):
            limit, why = ROOM * plan.gpu.memory, ""
            if plan.fits:
                limit = min(limit, LESS * plan.layout.memory.needed)
                why = ", so another process may hold the rest (nvidia-smi), or the experts have uneven loads"
            fits = next_setting(config, num_ranks, plan.gpu, limit)
            error.add_note(f"By its plan the run needs {summary_lines(plan)[0]}{why}. {fits}")
        raise


def summary_lines(found: Plan) -> list[str]:
    """Return two lines that summarize a plan: memory and time, with the largest pieces of both."""
    memory, speed = found.layout.memory, found.layout.speed
    rest = f"{found.left / GIB:.1f} are left" if found.fits else f"{-found.left / GIB:.1f} lack"
    return [
        f"{memory.needed / GIB:.1f} of {found.gpu.memory / GIB:.1f} GiB of each {found.gpu.name}, {rest} "
        f"({_largest(memory.pieces, 1 / GIB, '.1f')})",
        f"{speed.step * 1e3:,.0f} ms for a step of {speed.tokens:,} tokens on each, "
        f"{speed.tokens_per_second:,.0f} tokens/s ({_largest(speed.seconds, 1e3, '.0f')})",
    ]


class MeasuredSteps(TrainerCallback):
    """Callback that logs measured and planned time, tokens/s and memory after ten steps, also to metrics.jsonl."""

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
        seconds, speed = float(np.median(np.diff(times))), self.plan.layout.speed
        rate = float(tokens[-1] - tokens[0]) / (len(tokens) - 1) / seconds
        rows = [("step_ms", "ms", seconds * 1e3, speed.step * 1e3)]  # measured, planned
        rows += [("tokens_per_second", "tokens/s", rate, speed.tokens_per_second)]
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / GIB
            rows += [("peak_gib", "GiB", peak, self.plan.layout.memory.peak / GIB)]
        parts = [f"{found:,.1f} {unit} (planned {plan:,.1f})" for _, unit, found, plan in rows]
        backends.logger().info(f"Step {state.global_step}: {', '.join(parts)}.")
        logs = {f"measured/{key}": round(found, 2) for key, _, found, _ in rows}
        logs |= {f"planned/{key}": round(plan, 2) for key, *_, plan in rows}
        self.trainer.callback_handler.on_log(args, state, copy.copy(control), logs)  # a copy: it clears `should_log`


def _largest(pieces: Mapping[str, float], scale: float, digits: str) -> str:
    ordered = sorted(pieces.items(), key=lambda piece: -piece[1])
    shown = [(name, size) for name, size in ordered[:SHOWN]] + [("others", sum(size for _, size in ordered[SHOWN:]))]
    return ", ".join(f"{name} {format(size * scale, digits)}" for name, size in shown if size)
