"""The configuration of a run: nine short YAML sections, one sentence per key.

The sentence is the only documentation of a key: the CLI help, the JSON Schema (`expertmesh schema`) and the docs are
generated from it. No key is ever ignored: an unknown key is an error that suggests the nearest known one.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from expertmesh.kernels.recompute import Policy, check_policy, levels_of
from expertmesh.train.errors import ConfigError
from expertmesh.train.sections import Count, Name, Section, Size, number, parse, read


def _expand_auto(section: Any) -> Any:
    return {"ep_size": "auto"} if section == "auto" else section


class ModelSection(Section):
    """The model that is trained."""

    name: Name
    """Model to fine-tune: a Hugging Face id, a local directory, or `demo` for a tiny Qwen3-MoE with new weights."""
    revision: Name = "main"
    """Branch, tag or commit of the model on the Hugging Face Hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; `auto` takes the checkpoint's dtype on a GPU and float32 on a CPU."""
    attn_implementation: Name | None = None
    """Attention backend, by Transformers' name (`sdpa`, `flash_attention_2`, `eager`, ...); unset takes its default."""
    random_weights: bool = False
    """Whether to start from random weights, made on the device; only config.json and tokenizer of `name` are read."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the checkpoint."""
    fused: bool | dict[str, bool] = True
    """Fast layers: all on, all off (stock Transformers), or switched by kind, as in `{experts: false}`."""


class DataSection(Section):
    """The training and evaluation data."""

    name: Name | Annotated[list[Name], Field(min_length=1)]
    """Training data: a json, jsonl, csv, parquet or txt file, folder, Hugging Face id, or `demo:all`."""
    config: Name | None = None
    """Configuration of a Hugging Face dataset that has several."""
    split: Name = "train"
    """Split to train on, where the source has splits."""
    eval_split: Name | None = None
    """Split to evaluate on; unset holds back a share of the training split."""
    eval_fraction: Annotated[Size, Field(lt=1)] = 0.05
    """Share of the training split held back for evaluation if `eval_split` is unset; 0 disables evaluation."""
    max_length: Annotated[Count, Field(gt=1)] = 1024
    """Longest sequence in tokens; longer examples are truncated, and packed sequences have about this length."""
    packing: bool = False
    """Whether to pack several examples into a sequence instead of padding; they do not attend to each other."""
    assistant_only_loss: bool = False
    """Whether only the assistant's tokens of a conversation have labels, not the user's."""


class TrainSection(Section):
    """The optimizer, the batch and what saves memory or time."""

    max_steps: Count | None = None
    """Optimizer steps of the whole run; give this or `num_train_epochs`."""
    num_train_epochs: Annotated[Size, Field(gt=0, le=1e6)] | None = None
    """Passes over the training data; 1 if neither this nor `max_steps` is given."""
    per_device_train_batch_size: Count | Literal["auto"] = 8
    """Sequences per micro-batch in training, on each data-parallel rank; `auto` takes the fastest by the plan."""
    per_device_eval_batch_size: Count = 8
    """Sequences per micro-batch in evaluation, on each data-parallel rank."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    learning_rate: Size = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Name = "cosine"
    """Learning rate schedule as Transformers names it (`cosine`, `linear`, `constant_with_warmup`, ...)."""
    warmup_steps: Size = 0.03
    """Steps of linear warm-up; a number below 1 is a fraction of all steps."""
    weight_decay: Size = 0.0
    """Decoupled weight decay of matrices (not of norms and biases)."""
    max_grad_norm: Size = 1.0
    """Norm to which the gradient of the whole model is clipped; 0 never clips."""
    optim: Name = "adamw_torch_fused"
    """Optimizer as Transformers names it, or `muon`: Muon for hidden matrices, experts included, AdamW for the rest."""
    optim_states: Literal["8bit", "24bit", "float32"] | None = None
    """AdamW's states: `8bit` (4 bytes per bfloat16 weight and its states), `24bit` (5), `float32` (14); unset: 6."""
    optim_offload: bool = False
    """Whether AdamW's states of large weights are in host memory, copied over PCIe at each step; one GPU only."""
    bf16: bool = False
    """Mixed precision: float32 weights, bfloat16 matrix products (autocast)."""
    activation_checkpointing: Annotated[Policy, AfterValidator(check_policy)] = False
    """Recompute all (`true`; `offload`: inputs in host memory), `experts`, no matmul (`light`), or {level: layers}."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Whether to record steps as CUDA graphs and replay them, faster if the CPU is the limit; `auto`: if that pays."""
    gradient_release: Literal["running", "exact"] | None = None
    """Update weights in the backward, keeping no gradients; clip by a `running` norm, or `exact` at twice the work."""
    seed: Annotated[int, BeforeValidator(number), Field(ge=0, lt=2**32)] = 42
    """Seed of weights, data order and dropout; the same seed on the same machine gives the same run."""

    def optimizer(self) -> tuple[str, str | None]:
        """Return `optim` and `optim_args` for TrainingArguments, which have no Muon."""
        is_muon = self.optim == "muon"
        words = [f"states={self.optim_states}"] * bool(self.optim_states) + ["offload=true"] * self.optim_offload
        words += ["matrices=muon"] * is_muon
        return "adamw_torch_fused" if is_muon else self.optim, ",".join(words) or None


class ParallelSection(Section):
    """How the run is spread over GPUs."""

    nproc: Annotated[Count, Field(le=1024)] | None = None
    """Ranks that `expertmesh train` starts on this machine; unset starts one per GPU, or one without a GPU."""
    ep_size: Count | Literal["auto"] = 1
    """Ranks that split the experts of every layer; all stay data-parallel; `auto` takes the fastest by the plan."""
    tp_size: Count = 1
    """Ranks that process the same batch and split attention and dense layers (tensor parallelism)."""
    dp_replicate_size: Count = 1
    """Replicas of the model, each sharded over its part of the ranks; 1 shards one replica over all ranks."""
    timeout_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 5
    """Minutes that a rank waits for another in a step before it ends the run; loading and saving may take longer."""
    start_timeout_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 1
    """Minutes in which all ranks must have started and connected to each other."""


class LoraSection(Section):
    """Low-rank adapters."""

    r: Count = 16
    """Rank of the update."""
    alpha: Count = 32
    """Scale of the update, which is multiplied by alpha / r."""
    dropout: Annotated[Size, Field(lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Annotated[list[Name], Field(min_length=1)] | Name = ["q_proj", "k_proj", "v_proj", "o_proj"]
    """Linear modules that get an adapter, by the end of their name, or `all-linear`, experts included."""
    target_parameters: list[Name] = []
    """Weights of routed experts that get an adapter, by the end of their name, such as `experts.down_proj`."""


class QuantizationSection(Section):
    """Quantized, frozen weights under LoRA adapters."""

    experts: Literal["nf4", "mxfp4"]
    """4-bit format of the routed experts' weights: `nf4`, or `mxfp4`, which keeps GPT-OSS as it is published."""


class MoeSection(Section):
    """Routers and experts."""

    router_aux_loss_coef: Size | None = None
    """Weight of the load-balancing loss; unset takes the model's value, 0 switches it off."""
    freeze_router: bool = False
    """Whether to freeze the routers and train everything else."""


class LogSection(Section):
    """Logging and evaluation."""

    logging_steps: Count = 10
    """Optimizer steps between two records in metrics.jsonl and on the screen."""
    eval_steps: Count | None = None
    """Optimizer steps between two evaluations; unset evaluates at the end only."""
    report_to: Annotated[list[Name], BeforeValidator(lambda names: [names] if isinstance(names, str) else names)] = []
    """Trackers that also get the metrics (`tensorboard`, `wandb`, `trackio`, `mlflow`)."""


class SaveSection(Section):
    """What is saved, and where."""

    output_dir: Name = "runs/expertmesh"
    """Folder of the run: its configuration, metrics, plots, checkpoint-<step>/ and the finished model in final/."""
    final: bool = True
    """Whether to write the trained model to final/; if not, a run leaves metrics, and checkpoints by `save_steps`."""
    save_steps: Count | None = None
    """Optimizer steps between two checkpoints; unset saves only on an interrupt, and the finished model."""
    save_total_limit: Count | None = 2
    """Number of checkpoints that are kept; older ones are deleted."""
    resume_from_checkpoint: Annotated[
        Name | None, BeforeValidator(lambda value: ("auto" if value else None) if isinstance(value, bool) else value)
    ] = None
    """Checkpoint to resume from: a folder, or `auto` (or true) for the newest one in output_dir, if there is one."""


class Config(Section):
    """A fine-tuning run."""

    model: ModelSection
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    parallel: Annotated[ParallelSection, BeforeValidator(_expand_auto, ParallelSection | Literal["auto"])] = Field(
        default_factory=ParallelSection
    )
    """How the run is spread over GPUs; `auto` is `{ep_size: auto}`."""
    lora: LoraSection | None = None
    """Low-rank adapters instead of all weights; `{}` takes the defaults, unset trains all weights."""
    quantization: QuantizationSection | None = None
    """Experts in 4 bits under LoRA adapters; unset keeps the model's dtype."""
    moe: MoeSection = Field(default_factory=MoeSection)
    log: LogSection = Field(default_factory=LogSection)
    save: SaveSection = Field(default_factory=SaveSection)

    @model_validator(mode="after")
    def _check_conflicts(self) -> "Config":
        if conflict := next(self._conflicts(), None):
            raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Yield an error message for every combination of keys that exclude each other."""
        train, states, records = self.train, self.train.optim_states, self.train.cuda_graph is True
        accumulates, muon = train.gradient_accumulation_steps > 1, train.optim == "muon"
        if train.max_steps and train.num_train_epochs:
            yield "`train.max_steps` and `train.num_train_epochs` are both set: remove one."
        if self.data.eval_split is not None and "eval_fraction" in self.data.model_fields_set:
            yield "`data.eval_split` and `data.eval_fraction` are both set: remove one."
        if records and accumulates:
            yield "`train.cuda_graph` records one batch: set `auto`, or remove `train.gradient_accumulation_steps`."
        if records and "offload" in levels_of(train.activation_checkpointing, 1):
            yield "`train.activation_checkpointing: offload` cannot be recorded: leave `train.cuda_graph` at `auto`."
        if muon and (self.lora or states in ("8bit", "24bit")):
            key = "lora" if self.lora else "train.optim_states"
            yield f"`train.optim: muon` needs full weights and float32 states: change it, or remove `{key}`."
        for key, others in {"optim_states": {"muon"}, "optim_offload": set()}.items():
            if getattr(train, key) and train.optim not in {"adamw_torch", "adamw_torch_fused"} | others:
                yield f"`train.{key}` is an option of AdamW, not of `train.optim` {train.optim}: remove one."
        if states == "24bit" and (self.lora or self.model.dtype == "float32"):
            weights = "LoRA's weights" if self.lora else "the weights"
            yield f"`train.optim_states: 24bit` extends bfloat16, and {weights} are float32: take `8bit`."
        conflicts = {"gradient_accumulation_steps": accumulates, "cuda_graph": records}
        for key, conflict in (conflicts | {"optim": not train.optim.startswith("adamw")}).items():
            if conflict and train.gradient_release:
                yield f"`train.gradient_release` cannot be combined with `train.{key}`: remove one of them."
        if train.gradient_release == "exact" and not train.max_grad_norm:
            yield "`train.gradient_release` is exact and `train.max_grad_norm` is 0: set it to `running`."
        if self.quantization is not None and self.lora is None:
            yield "`quantization.experts` freezes the experts in 4 bits: add `lora`, or remove it."
        if self.quantization is not None and self.parallel.tp_size > 1:
            yield "`quantization.experts` cannot be split by `parallel.tp_size`: set it to 1, take `parallel.ep_size`."
        fused = self.model.fused if isinstance(self.model.fused, dict) else {"experts": self.model.fused}
        if self.quantization is not None and not fused.get("experts", True):
            yield "`quantization.experts` needs fused experts: change `model.fused`."

    def to_yaml(self) -> str:
        """Return all keys and values as YAML, in the order of the sections. Loading it gives the same configuration."""
        dumped = self.model_dump(mode="json")
        if self.data.eval_split is not None:
            del dumped["data"]["eval_fraction"]
        return yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)


DEMO: dict[str, dict[str, Any]] = {
    "model": {"name": "demo"},
    "data": {"name": "demo:all", "max_length": 128, "assistant_only_loss": True},
    "train": {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
    "moe": {"router_aux_loss_coef": 0.01},
    "save": {"output_dir": "runs/demo"},
}
"""The configuration of `expertmesh train` without a file; it takes a minute on two CPU cores."""

#: abbreviations of the keys, and their names in other tools, for suggestions
ALIASES = {
    "data.max_length": "sequence_length",
    "data.name": "data_path dataset",
    "log.report_to": "wandb",
    "lora.r": "rank",
    "model.attn_implementation": "flash_attention",
    "model.name": "model_name_or_path",
    "parallel.ep_size": "ep expert_parallel_size",
    "parallel.nproc": "gpus",
    "parallel.tp_size": "tp tensor_parallel_size",
    "save.resume_from_checkpoint": "resume",
    "train.bf16": "mixed_precision",
    "train.gradient_accumulation_steps": "grad_accum",
    "train.learning_rate": "lr",
    "train.num_train_epochs": "epochs",
    "train.per_device_eval_batch_size": "eval_batch_size",
    "train.per_device_train_batch_size": "batch_size",
    "train.weight_decay": "wd",
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration from `path` (None: `DEMO`) and apply `key.sub=value` overrides, with values in YAML.

    Raises ConfigError if the file cannot be read, a key does not exist, or a value is not valid.
    """
    tree = copy.deepcopy(DEMO) if path is None else read(Path(path))
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate({name: section for name, section in tree.items() if section is not None})
    except ValidationError as error:
        raise ConfigError(f"{path or 'the command line'}: " + " ".join(_messages(error))) from None


def known_keys() -> Iterator[tuple[str, str]]:
    """Yield (dotted path, sentence) of every key, in order."""
    for name, field in Config.model_fields.items():
        section: Any = (get_args(field.annotation) or [field.annotation])[0]  # LoraSection for `LoraSection | None`
        for key, leaf in section.model_fields.items():
            yield f"{name}.{key}", leaf.description or ""


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} is neither a file nor an override like train.learning_rate=1e-4.")
    *parents, leaf = dotted.strip().split(".")
    for parent in parents:
        section = {} if tree.get(parent) is None else tree[parent]
        tree[parent] = _expand_auto(section) if parent == "parallel" else section
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r} sets a key below `{parent}`, which is {tree!r} and holds no keys.")
    tree[leaf] = parse(text, f"The value in {override!r:.200}", f"Quote it, as in '{dotted}=\"...\"'.")


def _messages(error: ValidationError) -> Iterator[str]:
    sentences, reported = dict(known_keys()), set()
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        # for a key with several types, pydantic reports an error for each type: report only one
        key = next((path for path in sentences if key.startswith(path + ".")), key)
        if key in reported:
            continue
        reported.add(key)
        if problem["type"] == "extra_forbidden":
            close = _nearest(key, list(sentences))
            hint = f"did you mean `{close}`?" if close else "`expertmesh schema` lists all keys."
            yield f"There is no key `{key}`; {hint}"
        elif problem["type"] == "missing":
            key = key if "." in key else f"{key}.name"  # if a section is missing, report its required key
            yield f"`{key}` is missing. {sentences[key]}"
        elif problem["type"] == "value_error" and not key:
            yield problem["msg"].removeprefix("Value error, ")
        else:
            value, why = problem["input"], problem["msg"].removeprefix("Value error, ")
            scalar = problem["type"] == "string_type" and not isinstance(value, list | dict)
            yield f"`{key}` cannot be {value!r:.200}: {why}.{' Quote it if it is meant as text.' if scalar else ''}"


def _nearest(key: str, keys: Sequence[str]) -> str | None:
    """Return the entry of `keys` (dotted paths) that is most like an unknown `key`; None if none is similar."""
    section, _, leaf = key.rpartition(".")
    if same := [known for known in keys if known.rpartition(".")[2] == leaf]:
        return max(same, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio())
    names = {} if section else {known.partition(".")[0]: known for known in reversed(keys)}
    names |= {known.rpartition(".")[2]: known for known in reversed(keys)}
    names |= {other: known for known, others in ALIASES.items() for other in others.split()}
    close = difflib.get_close_matches(leaf, names, n=1)
    return names[close[0]] if close else None
