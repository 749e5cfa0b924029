"""The plan of a run from its configuration: what `expertmesh plan` prints."""

import re
from dataclasses import replace
from typing import Any

import torch

from expertmesh import backends
from expertmesh.moe.block import routers
from expertmesh.plan import Plan, plan
from expertmesh.plan.gpus import GPU, GPUS
from expertmesh.plan.memory import Job
from expertmesh.plan.simulate import Simulation, simulate
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import known
from expertmesh.train.inputs import load_model_config, lora
from expertmesh.train.launch import layout

#: optimizers by transformers' names -> by plan/memory.py's
OPTIMS = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "adamw_8bit": "adamw-8bit"}
OPTIMS |= {"adamw_bnb_8bit": "adamw-8bit", "adamw_torch_8bit": "adamw-8bit", "sgd": "sgd"}


def plan_of(config: Config, gpus: int, gpu: GPU | str) -> Plan:
    """The plan of this run on so many GPUs of a kind of `GPUS`; of the model only its config.json is read.

    Raises ConfigError for settings that cannot be planned, or do not fit each other.
    """
    kind, job = gpu_of(gpu) if isinstance(gpu, str) else gpu, job_of(config, gpus)
    try:
        return plan(job, kind, config.train.gradient_accumulation_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def simulation_of(config: Config, ranks: int, gpu: GPU, per_node: int) -> Simulation:
    """The plan of this run on so many ranks, from the shards of the real layout. Raises ConfigError as `plan_of`."""
    job = replace(job_of(config, ranks), per_node=per_node)
    try:
        return simulate(job, gpu, config.train.gradient_accumulation_steps)
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
    assert isinstance(batch, int) and isinstance(ep_size, int), "what is `auto` is chosen before (choice.py)"
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
    job = Job(
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
        adapt=_adapted(config) if config.lora or config.moe.freeze_router else None,
        mtp=config.model.fused is not False
        and not config.model.random_weights
        and (getattr(model, "num_nextn_predict_layers", 0) or 0) > 0,
        accumulates=train.gradient_accumulation_steps > 1,
    )
    return job


def _adapted(config: Config) -> Any:
    """What a run does to its model before it trains."""

    def adapted(model: Any) -> Any:
        if config.moe.freeze_router:
            for _, router in routers(model):
                router.requires_grad_(False)
        if config.lora is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, lora(config))

    return adapted
