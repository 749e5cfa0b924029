"""Run a configuration: build model, data and trainer, train, evaluate, and write everything to one folder.

docs/train.md describes the folder; `logs/` has the output of all ranks but the first.
"""

import json
import logging
import os
import platform
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

import expertmesh
from expertmesh import backends, data
from expertmesh.parallel import ranks
from expertmesh.parallel.ranks import check_same_on_all_ranks
from expertmesh.parallel.setup import WHOLE, current_world_size, recompute
from expertmesh.train.callbacks import Interrupt, ProgressLine
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.conversations import count_unlearned, nothing_learned
from expertmesh.train.errors import as_config_error, install
from expertmesh.train.folder import check_folder, check_room, save_final, starting_point
from expertmesh.train.inputs import Inputs, freeze_routers, gather, load_model_config, loading_part, lora, origin
from expertmesh.train.launch import join_ranks, layout
from expertmesh.train.metrics import read_metrics
from expertmesh.train.planned import MeasuredSteps, log_plan, resolve_auto, suggest_what_fits
from expertmesh.train.sft import SFTTrainer
from expertmesh.weights.files import folder_lock

log = logging.getLogger(__name__)


@dataclass
class Result:
    """Result of a run. `exit_code` is 0, or 75 / 130 after SIGTERM / Ctrl-C. `final` is None if no model was saved."""

    output_dir: Path
    exit_code: int = 0
    final: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run(config: Config) -> Result:
    """Run a configuration. Raise ConfigError if it is not valid, NonFiniteError if a loss or gradient is not finite."""
    check_folder(config)
    with folder_lock(config.save.output_dir, ranks.ALONE) if _is_first() else nullcontext():  # before loading a model
        config = resolve_auto(config, current_world_size())
        with suggest_what_fits(config, current_world_size()):
            return train(config, build(config))


def build(config: Config) -> SFTTrainer:
    """Return the trainer of a run, with model, tokenizer and prepared data, ready for the first step."""
    if not _is_first():  # log only errors: rank 0 logs the rest
        logging.disable(logging.WARNING)
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
    transformers.set_seed(config.train.seed)
    if (setup := layout(config, current_world_size())) is not None:
        join_ranks(config.parallel.start_timeout_minutes)
        setup.join()
        sections = config.model_dump(exclude={"save": {"output_dir"}}).items()
        values = {f"{name}.{key}": value for name, keys in sections for key, value in (keys or {}).items()}
        check_same_on_all_ranks("the configuration", values)
    inputs = gather(config)
    plan = log_plan(config, current_world_size()) if _is_first() else None
    model = load_model(config)
    freeze_routers(config, model)
    with as_config_error("train.activation_checkpointing"):
        recompute(model, policy if (policy := config.train.activation_checkpointing) not in WHOLE else False)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=inputs.train_rows,
        eval_dataset=inputs.eval_rows,
        processing_class=inputs.tokenizer,
        peft_config=lora(config),
        cuda_graph=config.train.cuda_graph,
        gradient_release=config.train.gradient_release,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # transformers adds it because of `disable_tqdm`
    if plan is not None:
        trainer.add_callback(MeasuredSteps(plan, trainer))
    _check_prepared(trainer, inputs, config)
    return trainer


def train(config: Config, trainer: SFTTrainer) -> Result:
    """Train with the trainer from `build`, evaluate, and write the folder of the run."""
    output_dir = Path(config.save.output_dir)
    with folder_lock(output_dir):
        if config.save.final:
            check_room(trainer.model, output_dir)
        checkpoint = starting_point(config)
        progress, interrupt = ProgressLine(), Interrupt()
        trainer.add_callback(interrupt)
        if first := _is_first():
            (output_dir / "config.yaml").write_text(config.to_yaml())
            (output_dir / "env.json").write_text(json.dumps(environment(trainer.model), indent=2) + "\n")
            trainer.add_callback(progress)
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=checkpoint)
            if interrupt.exit_code is not None:
                return Result(output_dir, interrupt.exit_code)
            final = output_dir / "final" if config.save.final else None
            if final is not None:  # save before evaluating, so that no error there loses the trained model
                save_final(trainer.model, trainer.processing_class, final)
            metrics = _evaluate(trainer)
        finally:
            progress.stop()
        if first:
            plot(trainer, output_dir)
        return Result(output_dir, 0, final, metrics)


def load_model(config: Config) -> transformers.PreTrainedModel:
    """Load the fused model of `model.name` onto the training device; with several ranks, each loads its shards."""
    section, on_gpu, auto = config.model, torch.cuda.is_available(), expertmesh.AutoModelForCausalLM
    options = section.model_dump(include={"fused", "dtype", "attn_implementation"}, exclude_none=True)
    if section.dtype == "auto" and (section.name == "demo" or not on_gpu):
        options["dtype"] = "float32"
    if config.quantization is not None:
        options["quantization_config"] = expertmesh.ExpertsQuantConfig(config.quantization.experts)
    if (setup := layout(config, current_world_size())) is not None:
        options["distributed_setup"] = setup
        if setup.tp_size > 1 and not on_gpu:
            raise ConfigError("parallel.tp_size: Accelerate supports tensor parallelism on GPUs only. Set it to 1.")
    device = torch.cuda.current_device() if on_gpu and setup is None else None
    if section.name == "demo" or section.random_weights:
        model_config = data.demo_config() if section.name == "demo" else load_model_config(config)
        if options["dtype"] == "auto":
            options["dtype"] = model_config.dtype or torch.bfloat16
        with nullcontext() if device is None else torch.device("cuda", device):
            return auto.from_config(model_config, trust_remote_code=section.trust_remote_code, **options)
    if device is not None:
        options["device_map"] = {"": device}  # load directly to the GPU, not through host memory
    try:
        with loading_part(config, "model", (OSError, SafetensorError)):
            return auto.from_pretrained(**origin(config), **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"model.name: the weights of {section.name} and its config.json differ in shapes (as reported above). "
            "Take the config.json that belongs to the weights."
        ) from error


def training_arguments(config: Config):
    """Return the TRL arguments for `config`."""
    from trl import SFTConfig

    train, log, save, on_gpu = config.train, config.log, config.save, torch.cuda.is_available()
    ours = "optim optim_states optim_offload activation_checkpointing cuda_graph gradient_release"
    optim, optim_args = train.optimizer()
    return SFTConfig(
        **train.model_dump(exclude={"max_steps", "num_train_epochs", *ours.split()}),
        **config.data.model_dump(include={"max_length", "packing", "assistant_only_loss"}),
        max_steps=train.max_steps or -1,
        num_train_epochs=train.num_train_epochs or 1.0,
        optim=optim,
        optim_args=optim_args,
        gradient_checkpointing=train.activation_checkpointing in WHOLE,  # TRL only reads this old name
        # without it, transformers treats ranks on CPUs as a single process and refuses bf16
        use_cpu=not on_gpu and (current_world_size() > 1 or not torch.accelerator.is_available()),
        dataloader_pin_memory=on_gpu,
        router_aux_loss_coef=config.moe.router_aux_loss_coef,
        logging_steps=log.logging_steps,
        report_to=log.report_to or "none",
        eval_strategy="steps" if log.eval_steps else "no",
        eval_steps=log.eval_steps,
        output_dir=save.output_dir,
        save_strategy="steps" if save.save_steps else "no",
        save_steps=save.save_steps or 500,
        save_total_limit=save.save_total_limit,
        disable_tqdm=True,
    )


def environment(model: torch.nn.Module) -> dict[str, Any]:
    """Return versions, hardware and fusions, as plain data for env.json."""
    report = getattr(model, "fusion_report", None)
    return {
        "expertmesh": expertmesh.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "packages": {row.name: row.version for row in backends.table()},
        "fusions": [asdict(fusion) for fusion in report()] if report else [],
    }


def plot(trainer: SFTTrainer, output_dir: Path) -> None:
    """Write plots/loss.png and, for a model with routers, plots/router.png. Log a warning without matplotlib."""
    if backends.version_of("matplotlib") is None:
        log.warning("No plots were drawn: matplotlib is not installed. %s adds it.", install("matplotlib"))
        return
    from expertmesh.train import plots

    plots.loss_curve(read_metrics(output_dir / "metrics.jsonl"), output_dir / "plots" / "loss.png")
    load, steps = trainer.load, f"{trainer.args.logging_steps:g} steps"
    if load.first is not None and load.last is not None:
        windows = [(f"first {steps}", load.first), (f"last {steps}", load.last)]
        plots.router_heatmap(windows, output_dir / "plots" / "router.png")


def _is_first() -> bool:
    """Whether this is rank 0, the only one that prints and writes the common files."""
    return os.environ.get("RANK", "0") == "0"


def _evaluate(trainer: SFTTrainer) -> dict[str, float]:
    """Evaluate, or return the metrics if the last step was already evaluated; {} without evaluation data."""
    if trainer.eval_dataset is None:
        return {}
    last = trainer.state.log_history[-2:]  # the record of the last evaluation, then the summary of the training
    done = next((dict(record) for record in last if "eval_loss" in record), None)
    return done if done and done.pop("step") == trainer.state.global_step else trainer.evaluate()


def _check_prepared(trainer: SFTTrainer, inputs: Inputs, config: Config) -> None:
    """Warn of rows whose labels were all cut off by max_length. Raise ConfigError if that holds for all rows."""
    prepared: Any = trainer.train_dataset, trainer.eval_dataset
    for which, given, rows in zip(("training", "evaluation"), inputs[1:], prepared, strict=True):
        lost = 0 if given is None else count_unlearned(rows) if config.data.packing else len(given) - len(rows)
        if lost and lost == len(given):
            raise nothing_learned(config, f"the {which} rows of {config.data.name}")
        if lost:
            what = f"{lost} of {len(given)} {which} rows have no token to learn"
            log.warning("%s within data.max_length=%d: they have no effect.", what, config.data.max_length)
