"""What a configuration leaves to the planner (`auto`), and which settings fit where a run's own do not."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expertmesh import backends
from expertmesh.kernels.recompute import Policy
from expertmesh.parallel.setup import WHOLE, DistributedSetup
from expertmesh.plan.gpus import GPU
from expertmesh.plan.layouts import GAIN, MOST_ROWS, Layout, ep_sizes, layout_of
from expertmesh.train.config import Config, ConfigError, load_config
from expertmesh.train.errors import refusing
from expertmesh.train.folder import starting_point
from expertmesh.train.planned import gpu_here, job_of, plan_of

BATCH, EP_SIZE = "train.per_device_train_batch_size", "parallel.ep_size"
ACCUMULATION, RECOMPUTE = "train.gradient_accumulation_steps", "train.activation_checkpointing"
LEVELS: tuple[dict[str, Any], ...] = {}, {RECOMPUTE: "experts"}, {RECOMPUTE: True}, {RECOMPUTE: "offload"}
ROOM = 0.97  # of a GPU's memory for what is chosen here; plans count 6 % for fragmentation besides
SHORTEST = 256  # tokens of a row that is still proposed


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

    First what leaves a step's numbers as they are (fewer rows at once, recomputed layers), then 8-bit states, released
    gradients, states on the host of one GPU, shorter rows, adapters. Of each kind it is the fastest.
    """

    def fitting(keys: dict[str, Any]) -> tuple[float, dict[str, Any]] | None:
        try:
            layout = plan_of(changed(config, keys), num_ranks, gpu).layout
        except ValueError:  # keys that do not go together, or cannot be planned: they are not proposed
            return None
        return (layout.speed.tokens_per_second, keys) if layout.memory.needed <= limit else None

    for kind in _kinds(config, num_ranks):
        found = []
        for recompute in _levels(config.train.activation_checkpointing):
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


def _levels(policy: Policy) -> tuple[dict[str, Any], ...]:
    """What to recompute instead, the least first: what is set stays, but layers that are recomputed may offload."""
    return (*LEVELS[:1], *LEVELS[-1:]) if policy in WHOLE else LEVELS[:1] if policy else LEVELS


def _fewer_rows(config: Config, released: bool) -> Iterator[dict[str, Any]]:
    """A micro-batch of as many rows, of a half, a quarter, ..., of one; the batch of a step stays, where it can."""
    rows, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    assert isinstance(rows, int)
    yield {}
    for fewer in sorted({rows // 2**n for n in range(1, rows.bit_length()) if not rows % 2**n} | {1}, reverse=True):
        if fewer < rows:
            once = released or config.train.gradient_release  # no accumulation
            yield {BATCH: fewer} | ({} if once else {ACCUMULATION: steps * rows // fewer})
