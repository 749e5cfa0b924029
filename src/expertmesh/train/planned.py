"""The plan of a run from its configuration, what is left to it (`auto`), and what fits where its settings do not."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from expertmesh import backends
from expertmesh.parallel.setup import WHOLE, DistributedSetup
from expertmesh.plan import Plan, plan
from expertmesh.plan.gpus import GPU, GPUS
from expertmesh.plan.layouts import GAIN, MOST_ROWS, Layout, ep_sizes, layout_of
from expertmesh.plan.memory import Job
from expertmesh.train.config import Config, ConfigError, load_config
from expertmesh.train.errors import known, refusing
from expertmesh.train.folder import starting_point
from expertmesh.train.inputs import freeze_routers, load_model_config, lora
from expertmesh.train.launch import layout

#: optimizers by transformers' names -> by plan/memory.py's
OPTIMS = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "adamw_8bit": "adamw-8bit"}
OPTIMS |= {"adamw_bnb_8bit": "adamw-8bit", "adamw_torch_8bit": "adamw-8bit", "sgd": "sgd"}
BATCH, EP_SIZE = "train.per_device_train_batch_size", "parallel.ep_size"
ACCUMULATION, RECOMPUTE = "train.gradient_accumulation_steps", "train.activation_checkpointing"
LEVELS: tuple[dict[str, Any], ...] = {}, {RECOMPUTE: "experts"}, {RECOMPUTE: True}, {RECOMPUTE: "offload"}
ROOM = 0.97  # of a GPU's memory for what is chosen here; plans count 6 % for fragmentation besides
SHORTEST = 256  # tokens of a row that is still proposed


def plan_of(config: Config, gpus: int, gpu: GPU | str) -> Plan:
    """The plan of this run on so many GPUs of a kind of `GPUS`; of the model only its config.json is read.

    Raises ConfigError for settings that cannot be planned, or do not fit each other.
    """
    kind, job = gpu_of(gpu) if isinstance(gpu, str) else gpu, job_of(config, gpus)
    try:
        return plan(job, kind, config.train.gradient_accumulation_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def gpu_of(name: str) -> GPU:
    """The GPU of this name. Raises ConfigError for an unknown one."""
    known("--gpu", name, list(GPUS))
    return GPUS[name]


def gpu_here() -> GPU | None:
    """This machine's GPU, of a kind of `GPUS`, with the memory that it has; None without a GPU.

    Raises ConfigError for another kind.
    """
    found = backends.gpu()
    if found is None:
        return None
    name, memory = found
    words = set(re.split(r"\W+", name.lower()))
    for kind, gpu in GPUS.items():
        if {word for word in kind.split("-") if not word.endswith("gb")} <= words and "mig" not in words:
            return replace(gpu, memory=memory)
    raise ConfigError(f"no rates are known of this machine's {name}, only of {', '.join(GPUS)}.")


def job_of(config: Config, gpus: int) -> Job:
    """The `Job` of a run. Raises ConfigError for settings that a plan does not know."""
    train, parallel = config.train, config.parallel
    batch, ep_size = train.per_device_train_batch_size, parallel.ep_size
    assert isinstance(batch, int) and isinstance(ep_size, int), "what is `auto` is chosen before (settle)"
    if train.bf16:
        raise ConfigError("train.bf16: a plan does not know autocast. Set model.dtype to bfloat16 instead.")
    if train.optim not in OPTIMS:
        raise ConfigError(f"train.optim: a plan does not know {train.optim!r}, only {', '.join(OPTIMS)}.")
    layout(config, gpus)
    model = load_model_config(config)
    if hasattr(model, "auto_map"):
        raise ConfigError("model.trust_remote_code: a plan does not run code that comes with a checkpoint.")
    own = model.dtype if isinstance(model.dtype, torch.dtype) else torch.bfloat16
    own = torch.float32 if config.model.name == "demo" else own  # as load_model has it
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
        dtype=own if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
        fused=config.model.fused,
        attention=config.model.attn_implementation,
        experts=config.quantization.experts if config.quantization else None,
        adapt=partial(_adapt, config) if config.lora or config.moe.freeze_router else None,
        mtp=config.model.fused is not False
        and not config.model.random_weights
        and (getattr(model, "num_nextn_predict_layers", 0) or 0) > 0,
        accumulates=train.gradient_accumulation_steps > 1,
    )


def _adapt(config: Config, model: Any) -> Any:
    """What a run does to its model before it trains."""
    freeze_routers(config, model)
    if config.lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora(config))


def open_keys(config: Config) -> list[str]:
    """The keys whose value is `auto`."""
    return [key for key, value in values(config).items() if value == "auto"]


def settle(config: Config, num_ranks: int) -> Config:
    """The configuration with a number for each key that is `auto`, which is said: the plan's fastest on so many GPUs of
    this machine's kind. A run that goes on from a checkpoint keeps those of the config.yaml beside it.

    Raises ConfigError without a GPU of a known kind, and where nothing fits.
    """
    keys, config = open_keys(config), _as_before(config, num_ranks)
    if num_ranks == 1 and EP_SIZE in open_keys(config):
        config = changed(config, {EP_SIZE: 1})
    if left := open_keys(config):
        try:
            gpu = gpu_here()
        except ConfigError as error:
            raise ConfigError(f"{left[0]}: `auto` needs a plan, and {error} Set a number.") from error
        if gpu is None:
            raise ConfigError(f"{left[0]}: `auto` is planned for a GPU, and there is none here. Set a number.")
        config = choose(config, num_ranks, gpu)
    if keys:
        backends.logger().info(f"auto: {written({key: values(config)[key] for key in keys})}")
    return config


def choose(config: Config, num_ranks: int, gpu: GPU) -> Config:
    """The configuration with a number for each key that is `auto`: the fastest that leaves 3 % of such a GPU's memory.

    Micro-batches of 1, 2, 4, ... rows are tried, and sizes that divide experts and ranks. Raises ConfigError if nothing
    fits, and says what would.
    """
    if not (keys := open_keys(config)):
        return config
    smallest = changed(config, dict.fromkeys(keys, 1))
    job, steps = job_of(smallest, num_ranks), config.train.gradient_accumulation_steps
    sizes = ep_sizes(job) if EP_SIZE in keys else [job.ep_size]
    rows = [2**n for n in range(MOST_ROWS.bit_length())] if BATCH in keys else [job.batch]
    found: list[Layout] = []
    with refusing(f"{keys[0]}: `auto` needs a plan"):
        for size in sizes:
            before = 0.0
            for batch in rows:
                layout = layout_of(replace(job, ep_size=size, batch=batch), gpu, steps)
                speed = layout.speed.tokens_per_second
                if layout.memory.needed > ROOM * gpu.memory or speed < GAIN * before:
                    break
                found.append(layout)
                before = speed
    if not found:
        line = next_setting(smallest, num_ranks, gpu, ROOM * gpu.memory)
        raise ConfigError(
            f"{keys[0]}: `auto` finds nothing that fits {num_ranks} x {gpu.name}. "
            + (f"This does: {line}" if line else "Take more GPUs, or larger ones.")
        )
    best = max(found, key=lambda layout: layout.speed.tokens_per_second).job
    return changed(config, {key: {BATCH: best.batch, EP_SIZE: best.ep_size}[key] for key in keys})


def next_setting(config: Config, num_ranks: int, gpu: GPU, limit: float) -> str | None:
    """Keys to add to a command so that its run needs at most so many bytes by the plan; None if none do.

    First what leaves a step's numbers as they are (fewer rows at once, recomputed layers), then what `_kinds` changes.
    Of each kind it is the fastest.
    """

    def fitting(keys: dict[str, Any]) -> tuple[float, dict[str, Any]] | None:
        try:
            layout = plan_of(changed(config, keys), num_ranks, gpu).layout
        except ValueError:  # keys that do not go together, or cannot be planned: they are not proposed
            return None
        return (layout.speed.tokens_per_second, keys) if layout.memory.needed <= limit else None

    policy = config.train.activation_checkpointing  # what is set stays, but layers that are recomputed may offload
    levels = LEVELS if not policy else (LEVELS[0], LEVELS[-1]) if policy in WHOLE else LEVELS[:1]
    for kind in _kinds(config, num_ranks):
        found = []
        for recompute in levels:
            steps = [kind | fewer | recompute for fewer in _fewer_rows(config, "train.gradient_release" in kind)]
            if fitting(steps[-1]) is not None:
                found.append(next(filter(None, map(fitting, steps))))
        if found:
            return written(max(found, key=lambda one: one[0])[1])
    return None


def changed(config: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration with other values of these keys. Raises ValueError if they do not go together."""
    tree = config.model_dump(exclude_unset=True)
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree[section] = tree.get(section, {}) | {name: value} if name else value
    return Config.model_validate(tree)


def written(keys: Mapping[str, Any]) -> str:
    """Keys and values as the command line takes them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in keys.items())


def values(config: Config) -> dict[str, Any]:
    """The keys that may be `auto`, and what they are."""
    return {BATCH: config.train.per_device_train_batch_size, EP_SIZE: config.parallel.ep_size}


def _as_before(config: Config, num_ranks: int) -> Config:
    """With what the run chose that this one goes on from."""
    keys, checkpoint, sizes = open_keys(config), starting_point(config), config.parallel
    if not keys or checkpoint is None:
        return config
    folder = Path(config.save.output_dir) if checkpoint is True else Path(checkpoint).absolute().parent
    if not (folder / "config.yaml").is_file():
        return config
    before = values(load_config(folder / "config.yaml"))
    try:
        DistributedSetup(before[EP_SIZE], sizes.tp_size, None, sizes.dp_replicate_size, world_size=num_ranks)
    except ValueError:  # it ran on another number of ranks
        before[EP_SIZE] = "auto"
    if before[EP_SIZE] == 1:  # perhaps on one rank; on the same as then a plan finds it again
        before[EP_SIZE] = "auto"
    return changed(config, {key: before[key] for key in keys})


def _kinds(config: Config, num_ranks: int) -> Iterator[dict[str, Any]]:
    """What else than rows and recomputing is changed."""
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


def _fewer_rows(config: Config, released: bool) -> Iterator[dict[str, Any]]:
    """A micro-batch of as many rows, of a half, a quarter, ..., of one; the batch of a step stays, where it can."""
    rows, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    assert isinstance(rows, int)
    once, fewer = released or config.train.gradient_release, rows  # no accumulation
    yield {}
    while fewer > 1:
        fewer = 1 if fewer % 2 else fewer // 2
        yield {BATCH: fewer} | ({} if once else {ACCUMULATION: steps * rows // fewer})
