"""Every key of the configuration acts: a row for each says what a value of it changes in what the libraries are asked.

The command line runs as ever up to the first training step. Models, tokenizers and data sets are asked of stand-ins
that note how; the trainer notes its arguments and stops.
"""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch

import expertmesh
from expertmesh import data
from expertmesh.bench.tiny import tiny_model
from expertmesh.cli.train import train as command
from expertmesh.data import demo_tokenizer
from expertmesh.data.tokenizer import VOCABULARY
from expertmesh.moe.block import routers
from expertmesh.parallel.setup import DistributedSetup
from expertmesh.train import inputs, launch, run
from expertmesh.train.config import known_keys

#: key: (its value, what is seen then and not without it, what else is set in both runs)
ROWS: dict[str, tuple[Any, dict[str, Any], str] | tuple[Any, dict[str, Any]]] = {
    "model.name": ("org/other", dict.fromkeys(["model.name", "config.name", "tokenizer.name"], "org/other")),
    "model.revision": ("v2", dict.fromkeys(["model.revision", "config.revision", "tokenizer.revision"], "v2")),
    "model.dtype": ("bfloat16", {"model.dtype": "bfloat16"}),
    "model.attn_implementation": ("eager", {"model.attn_implementation": "eager"}),
    "model.random_weights": (True, {"made anew": True}),
    "model.trust_remote_code": (
        True,
        dict.fromkeys([f"{part}.trust_remote_code" for part in ("model", "config", "tokenizer")], True),
    ),
    "model.fused": ("{experts: false}", {"model.fused": {"experts": False}}),
    "data.name": ("[org/a, org/b]", {"data": [("org/a", None, "train"), ("org/b", None, "train")]}),
    "data.config": (
        "main",
        {"data": [("org/rows", "main", "train"), ("org/rows", "main", "test")]},
        "data.eval_split=test",
    ),
    "data.split": ("extra", {"data": [("org/rows", None, "extra")]}),
    "data.eval_split": ("test", {"data": [("org/rows", None, "train"), ("org/rows", None, "test")], "rows": [40, 40]}),
    "data.eval_fraction": (0.25, {"rows": [30, 10]}),
    "data.max_length": (77, {"args.max_length": 77}),
    "data.packing": (True, {"args.packing": True}),
    "data.assistant_only_loss": (True, {"args.assistant_only_loss": True}),
    "train.max_steps": (7, {"args.max_steps": 7}),
    "train.num_train_epochs": (2.5, {"args.num_train_epochs": 2.5}),
    "train.per_device_train_batch_size": (3, {"args.per_device_train_batch_size": 3}),
    "train.per_device_eval_batch_size": (5, {"args.per_device_eval_batch_size": 5}),
    "train.gradient_accumulation_steps": (4, {"args.gradient_accumulation_steps": 4}),
    "train.learning_rate": (0.5, {"args.learning_rate": 0.5}),
    "train.lr_scheduler_type": ("linear", {"args.lr_scheduler_type": "linear"}),
    "train.warmup_steps": (6, {"args.warmup_steps": 6}),
    "train.weight_decay": (0.25, {"args.weight_decay": 0.25}),
    "train.max_grad_norm": (0.125, {"args.max_grad_norm": 0.125}),
    "train.optim": ("sgd", {"args.optim": "sgd"}),
    "train.optim_states": ("8bit", {"args.optim_args": "states=8bit"}),
    "train.optim_offload": (True, {"args.optim_args": "offload=true"}),
    "train.bf16": (True, {"args.bf16": True}),
    "train.activation_checkpointing": (True, {"args.gradient_checkpointing": True}),
    "train.cuda_graph": (False, {"cuda_graph": False}),
    "train.gradient_release": ("exact", {"gradient_release": "exact"}),
    "train.seed": (7, {"args.seed": 7, "seed of weights": 7, "seeds of data": [7, 7]}),
    "parallel.nproc": (3, {"launched": 3}),
    "parallel.ep_size": (2, {"layout.ep_size": 2}),
    "parallel.tp_size": (2, {"layout.tp_size": 2}),
    "parallel.dp_replicate_size": (2, {"layout.dp_replicate_size": 2}),
    "parallel.timeout_minutes": (3, {"layout.timeout_minutes": 3}),
    "parallel.start_timeout_minutes": (2, {"minutes to start": 2}),
    "lora.r": (3, {"lora.r": 3}, "lora={}"),
    "lora.alpha": (5, {"lora.lora_alpha": 5}, "lora={}"),
    "lora.dropout": (0.25, {"lora.lora_dropout": 0.25}, "lora={}"),
    "lora.target_modules": ("[q_proj]", {"lora.target_modules": {"q_proj"}}, "lora={}"),
    "lora.target_parameters": ("[experts.down_proj]", {"lora.target_parameters": ["experts.down_proj"]}, "lora={}"),
    "quantization.experts": ("mxfp4", {"model.quantization_config": expertmesh.ExpertsQuantConfig("mxfp4")}, "lora={}"),
    "moe.router_aux_loss_coef": (0.125, {"args.router_aux_loss_coef": 0.125}),
    "moe.freeze_router": (True, {"routers learn": False}),
    "log.logging_steps": (3, {"args.logging_steps": 3}),
    "log.eval_steps": (4, {"args.eval_steps": 4, "args.eval_strategy": "steps"}),
    "log.report_to": ("tensorboard", {"args.report_to": ["tensorboard"]}),
    "save.output_dir": ("{tmp}/other", {"args.output_dir": "{tmp}/other", "written to": ["other"]}),
    "save.final": (False, {"room for it": False}),
    "save.save_steps": (2, {"args.save_steps": 2, "args.save_strategy": "steps"}),
    "save.save_total_limit": (4, {"args.save_total_limit": 4}),
    "save.resume_from_checkpoint": ("{tmp}/checkpoint-3", {"resumed": "{tmp}/checkpoint-3"}),
}


LAYOUT = "ep_size", "tp_size", "dp_replicate_size", "timeout_minutes"


class Begun(Exception):
    """The run has come to its first step, or to starting ranks."""


@functools.cache
def parts():
    """(tokenizer, model), of which no run trains a step."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 2048, "moe_intermediate_size": 32}
    return demo_tokenizer(), tiny_model("qwen3_moe", **sizes)


def seen(folder: Path, overrides: list[str], num_ranks: int) -> dict[str, Any]:
    """What `expertmesh train` asks of the libraries before its first step, by name."""
    found: dict[str, Any] = {
        "data": [],
        "seeds of data": [],
        "launched": None,
        "layout.ep_size": None,
        "room for it": False,
    }
    tokenizer, model = parts()
    model.requires_grad_(True)

    def asked(what, answer):
        def from_pretrained(pretrained_model_name_or_path, **options):
            found.update(
                {f"{what}.name": pretrained_model_name_or_path}
                | {f"{what}.{key}": value for key, value in options.items()}
            )
            return answer

        return from_pretrained

    def from_config(config, **options):
        found["made anew"] = True
        return asked("model", model)(config, **options)

    def read(name, config, *, split):
        found["data"].append((name, config, split))
        turns = [[{"role": role, "content": f"{name} {i}"} for role in ("user", "assistant")] for i in range(40)]
        return datasets.Dataset.from_dict({"messages": turns})

    def noting_seed(call):
        def noted(rows, what, seed, **options):
            found["seeds of data"].append(seed)
            return call(rows, what, seed, **options)

        return noted

    def trainer(*, args, train_dataset, eval_dataset, peft_config, cuda_graph, gradient_release, **_):
        found.update({f"args.{key}": value for key, value in vars(args).items()})
        found.update({f"lora.{key}": value for key, value in vars(peft_config).items()} if peft_config else {})
        found.update({"rows": [len(train_dataset), len(eval_dataset)], "cuda_graph": cuda_graph})
        found["gradient_release"] = gradient_release
        made = mock.MagicMock(model=model, train_dataset=train_dataset)
        made.train = lambda resume_from_checkpoint: begin(resumed=resume_from_checkpoint)
        return made

    def begin(**more):
        found.update(more)
        raise Begun

    def load_on_gpus(config):
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            return load_model(config)

    load_model = run.load_model
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(expertmesh.AutoModelForCausalLM, "from_pretrained", asked("model", model))
        patched.setattr(expertmesh.AutoModelForCausalLM, "from_config", from_config)
        patched.setattr(inputs.AutoConfig, "from_pretrained", asked("config", model.config))
        patched.setattr(inputs.AutoTokenizer, "from_pretrained", asked("tokenizer", tokenizer))
        patched.setitem(inputs.INTEGRATION_TO_CALLBACK, "tensorboard", lambda: None)  # as if it were installed
        patched.setattr(datasets, "load_dataset", read)
        patched.setattr(data, "load_dataset", noting_seed(data.load_dataset))
        patched.setattr(data, "hold_out", noting_seed(data.hold_out))
        patched.setattr(run.transformers, "set_seed", lambda seed: found.update({"seed of weights": seed}))
        patched.setattr(run, "SFTTrainer", trainer)
        patched.setattr(launch, "launch", lambda _, nproc, __: begin(launched=nproc))
        if num_ranks > 1:
            patched.setattr(launch, "is_rank", lambda: True)
            patched.setattr(run, "current_world_size", lambda: num_ranks)
            patched.setattr(run, "load_model", load_on_gpus)
            patched.setattr(run, "join_ranks", lambda minutes: found.update({"minutes to start": minutes}))
            patched.setattr(DistributedSetup, "join", lambda _: None)
            patched.setattr(run, "check_same_on_all_ranks", lambda *_: None)
        patched.setattr(run, "check_room", lambda *_: found.update({"room for it": True}))
        patched.setattr(run, "environment", lambda _: {})
        patched.setattr(run, "_check_prepared", lambda *_: None)  # nothing was
        (folder / "run.yaml").write_text("model: {name: org/model}\ndata: {name: org/rows}\n")
        with pytest.raises(Begun):
            command([str(folder / "run.yaml"), f"save.output_dir={folder}/run", *overrides])
    layout = found.get("model.distributed_setup")
    found |= {f"layout.{key}": getattr(layout, key, None) for key in LAYOUT}
    found["routers learn"] = any(p.requires_grad for _, router in routers(model) for p in router.parameters())
    found["written to"] = [path.parent.name for path in folder.glob("*/config.yaml")]
    return found


def test_every_key_has_a_row():
    assert ROWS.keys() == dict(known_keys()).keys(), "say in ROWS what the key changes"


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What is seen with none but these overrides."""
    return functools.cache(lambda num_ranks, *beside: seen(tmp_path_factory.mktemp("without"), beside, num_ranks))


@pytest.mark.parametrize("key", ROWS)
def test_a_key_acts(tmp_path, without, key):
    value, expected, *beside = ROWS[key]
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")

    def placed(this):
        return this.format(tmp=tmp_path) if isinstance(this, str) and "{tmp}" in this else this

    num_ranks = 8 if key.startswith("parallel.") and key != "parallel.nproc" else 1
    found = seen(tmp_path, [*beside, f"{key}={placed(value)}"], num_ranks)
    for what, want in expected.items():
        assert found[what] == placed(want), what
        assert without(num_ranks, *beside).get(what) != placed(want), f"{what} is so without {key}, too"


@pytest.mark.parametrize("key", ["model.dtype", "model.attn_implementation", "model.fused"])
def test_a_key_of_the_model_acts_on_the_demo_too(tmp_path, key):
    value, expected = ROWS[key]
    found = seen(tmp_path, ["model.name=demo", f"{key}={value}"], 1)
    assert {what: found[what] for what in expected} == expected
