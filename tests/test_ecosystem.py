"""Trainer, TRL, PEFT and Accelerate run on our model with no change but the import, on the stock model's path.

Each test runs the same few steps on the stock model and on ours, from the same weights and seed, and compares losses
and final weights.
"""

import functools
import gc
import math

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

import expertmesh
from expertmesh.bench.parity import CPU_TOLERANCE
from expertmesh.bench.rows import relative_error, worst_error
from tests.models import load_ours, load_stock

STEPS = 3
RATE = 0.1
BOTH = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])


@pytest.fixture(scope="module", autouse=True)
def _short_collections():
    """Each Trainer collects garbage; with all that the imports made set aside, that takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def rows(count: int = 16, length: int = 12) -> list[dict]:
    """Token rows whose prompts (labels -100) differ in length, so that microbatches hold different token counts."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 128, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 7] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 128))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def arguments(cls, folder, **options):
    """Arguments under which a float32 run on one CPU thread is repeatable; plain SGD, so weights show gradients."""
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 3,
    }
    return cls(**given | options)


def history(trainer: Trainer, key: str = "loss") -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def assert_same_path(trainers: list[Trainer], *keys: str) -> None:
    stock, ours = trainers
    for key in ("loss", *keys):
        assert len(history(stock, key)) > 0, key
        # what Trainer keeps in its history is not rounded
        assert relative_error(history(ours, key), history(stock, key)) <= CPU_TOLERANCE, key
    assert_same_updates(ours.model, stock.model)


def remember(model: torch.nn.Module) -> torch.nn.Module:
    model.weights_before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model


def assert_same_updates(ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    """The sum of all steps, weight by weight. Weights have seven digits and move by a hundredth: hence 1e-3."""
    found, expected = (
        {name: parameter.detach() - model.weights_before[name] for name, parameter in model.named_parameters()}
        for model in (ours, stock)
    )
    error, where = worst_error(found, expected)
    assert error <= 100 * CPU_TOLERANCE, where


def train(model, folder, data=None, callbacks=None, resume=None, cls=Trainer, **options) -> Trainer:
    trainer = cls(
        model=remember(model),
        args=arguments(TrainingArguments, folder, **options),
        train_dataset=data or rows(),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def both(family: str, folder, prepare=lambda model: model, **options) -> list[Trainer]:
    """The same Trainer run on (stock, ours)."""
    trainers = []
    for index, load in enumerate((load_stock, load_ours)):
        torch.manual_seed(4)
        trainers.append(train(prepare(load(family)), folder / str(index), **options))
    return trainers


@BOTH
def test_trainer_takes_the_stock_path(family, tmp_path):
    assert_same_path(both(family, tmp_path), "grad_norm")


def test_a_slightly_wrong_gradient_would_be_noticed(tmp_path):
    stock, ours = load_stock("qwen3_moe"), load_ours("qwen3_moe")
    ours.get_parameter("model.layers.2.mlp.experts.down_proj").register_hook(lambda gradient: gradient * 1.002)
    trainers = [train(model, tmp_path / str(index)) for index, model in enumerate((stock, ours))]
    with pytest.raises(AssertionError):
        assert_same_path(trainers)


@BOTH
def test_trainer_with_gradient_accumulation(family, tmp_path):
    """Microbatches of different token counts: the loss is the sum over all of them / num_items_in_batch."""
    trainers = both(family, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert_same_path(trainers, "grad_norm")
    whole = train(load_ours(family), tmp_path / "whole", per_device_train_batch_size=4)
    assert relative_error(history(trainers[1]), history(whole)) <= CPU_TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_trainer_with_gradient_checkpointing(family, tmp_path):
    assert_same_path(both(family, tmp_path, gradient_checkpointing=True))


def test_trainer_with_reentrant_gradient_checkpointing(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert_same_path(both("qwen3_moe", tmp_path, **options))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_trainer_with_the_router_loss(family, tmp_path):
    """Without accumulation a microbatch's share of the batch is 1, and the router loss is stock's."""

    def with_router_loss(model):
        model.config.output_router_logits = True
        return model

    trainers = both(family, tmp_path, prepare=with_router_loss)
    assert_same_path(trainers)
    without = train(load_ours(family), tmp_path / "without")
    assert relative_error(history(trainers[1]), history(without)) > 1e-2


def test_router_loss_does_not_depend_on_how_a_batch_is_split(tmp_path):
    """Four equal microbatches and one of them alone: the same loss. Stock's grows with every microbatch."""
    alike = [rows()[0]] * 16
    losses = []
    for steps in (1, 4):
        model = load_ours("qwen3_moe", output_router_logits=True)
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps, "max_steps": 2}
        losses.append(history(train(model, tmp_path / str(steps), data=alike, **options)))
    assert relative_error(losses[1], losses[0]) <= CPU_TOLERANCE


def test_trainer_in_bfloat16_stays_near_stock(tmp_path):
    stock, ours = both("qwen3_moe", tmp_path, bf16=True)
    exact = train(load_stock("qwen3_moe"), tmp_path / "exact")
    own = relative_error(history(stock), history(exact))
    assert relative_error(history(ours), history(exact)) <= 1.5 * own + 1e-3


def test_trainer_with_label_smoothing(tmp_path):
    assert_same_path(both("qwen3_moe", tmp_path, label_smoothing_factor=0.1))


def test_trainer_with_adamw_clipping_and_decay(tmp_path):
    """Clipping looks at all gradients at once, AdamW divides by their size: three steps amplify any difference."""
    options = {"optim": "adamw_torch", "max_grad_norm": 0.1, "weight_decay": 0.1, "learning_rate": 1e-3}
    stock, ours = both("qwen3_moe", tmp_path, **options)
    assert relative_error(history(ours), history(stock)) <= CPU_TOLERANCE
    assert relative_error(history(ours, "grad_norm"), history(stock, "grad_norm")) <= CPU_TOLERANCE


def test_trainer_evaluates_and_predicts_with_logits(tmp_path):
    def mean(prediction):
        return {"mean": float(prediction.predictions.mean()), "first": float(prediction.predictions[0, 0, 0])}

    found = []
    for load in (load_stock, load_ours):
        args = arguments(TrainingArguments, tmp_path, per_device_eval_batch_size=4)
        model = load("qwen3_moe").train()
        trainer = Trainer(
            model=model,
            args=args,
            eval_dataset=rows()[:8],
            data_collator=default_data_collator,
            compute_metrics=mean,
        )
        metrics = trainer.evaluate()
        found.append(torch.tensor([metrics[key] for key in ("eval_loss", "eval_mean", "eval_first")]))
        predictions = torch.as_tensor(trainer.predict(rows()[:8]).predictions)
        assert predictions.shape == (8, 12, 128)
        found[-1] = torch.cat([found[-1], predictions.flatten()])
    assert relative_error(found[1], found[0]) <= CPU_TOLERANCE


def test_trainer_evaluates_during_training(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainers = []
    for index, load in enumerate((load_stock, load_ours)):
        args = arguments(TrainingArguments, tmp_path / str(index), **options)
        trainer = Trainer(
            model=remember(load("qwen3_moe")),
            args=args,
            train_dataset=rows(),
            eval_dataset=rows()[:8],
            data_collator=default_data_collator,
        )
        trainer.train()
        trainers.append(trainer)
    assert_same_path(trainers, "eval_loss")


@pytest.mark.parametrize(
    ("family", "trainer"), [("gpt_oss", Trainer), ("qwen3_moe", Trainer), ("qwen3_moe", expertmesh.Trainer)]
)
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(family, trainer, tmp_path):
    """Transformers' Trainer gives a checkpoint's tensors to `load_state_dict` as they are: GPT-OSS's bear the names it
    trains under, Qwen3-MoE's are saved expert by expert, and the stock model would keep its initial experts.
    """
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    whole = train(load_ours(family), tmp_path, cls=trainer, **options)
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = train(load_ours(family), tmp_path / "resumed", cls=trainer, resume=checkpoint, **options)
    assert torch.equal(history(whole)[2:], history(resumed)[-2:])
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resumed" / "checkpoint-4")
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], parameter), name


def test_callbacks_that_read_gradients_see_the_stock_ones(tmp_path):
    class Norms(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            self.seen.append(torch.stack([p.grad.norm() for p in model.parameters()]))

    recorded = []
    for index, load in enumerate((load_stock, load_ours)):
        callback = Norms()
        train(load("qwen3_moe"), tmp_path / str(index), callbacks=[callback])
        recorded.append(torch.stack(callback.seen))
    assert relative_error(recorded[1], recorded[0]) <= CPU_TOLERANCE


# --- PEFT


LORA_TARGETS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "experts": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "trained router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
}


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_lora_on_anything_trains_as_on_stock(targets, tmp_path):
    def adapt(model):
        torch.manual_seed(9)
        return get_peft_model(model, lora(**LORA_TARGETS[targets]))

    assert_same_path(both("qwen3_moe", tmp_path, prepare=adapt))


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "qwen3_next", "glm4_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "mixtral"]
)
def test_lora_on_every_linear_layer_of_other_families(family, tmp_path):
    """A kernel that reads `.weight` of a layer under LoRA would silently leave the adapter out."""

    def adapt(model):
        torch.manual_seed(9)
        # PEFT refuses to adapt the output projection of a Mamba layer
        mamba = {"exclude_modules": ["out_proj"]} if family == "nemotron_h" else {}
        # in ours it reaches the experts of families that PEFT does not know
        named = {"gpt_oss": "gate_up_proj", "qwen2_moe": "gate_up_proj", "nemotron_h": "up_proj"}
        experts = [f"experts.{named[family]}", "experts.down_proj"] if family in named else None
        return get_peft_model(model, lora(target_modules="all-linear", target_parameters=experts, **mamba))

    assert_same_path(both(family, tmp_path, prepare=adapt))


def test_lora_with_gradient_checkpointing(tmp_path):
    def adapt(model):
        torch.manual_seed(9)
        model.enable_input_require_grads()
        return get_peft_model(model, lora(**LORA_TARGETS["attention"]))

    assert_same_path(both("qwen3_moe", tmp_path, prepare=adapt, gradient_checkpointing=True))


# --- TRL


def sft(model, folder, data, **options) -> SFTTrainer:
    peft_config = options.pop("peft_config", None)
    args = arguments(SFTConfig, folder, max_length=16, dataset_num_proc=None, **options)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )
    remember(trainer.model)
    trainer.train()
    return trainer


def both_sft(tmp_path, data, family: str = "qwen3_moe", **options) -> list[SFTTrainer]:
    trainers = []
    for index, load in enumerate((load_stock, load_ours)):
        torch.manual_seed(4)
        trainers.append(sft(load(family), tmp_path / str(index), data, **options))
    return trainers


def texts() -> Dataset:
    return Dataset.from_list(
        [{"text": " ".join(f"w{3 + (i * 7 + j * j) % 120}" for j in range(5 + i % 8))} for i in range(16)]
    )


def prompts() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"w{9 + i} w{20 + i} ",
                "completion": " ".join(f"w{3 + (i * j) % 120}" for j in range(2, 4 + i % 8)),
            }
            for i in range(16)
        ]
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_sft_on_text(family, tmp_path):
    assert_same_path(both_sft(tmp_path, texts(), family), "mean_token_accuracy", "entropy")


def test_sft_on_completions_with_accumulation(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "completion_only_loss": True}
    assert_same_path(both_sft(tmp_path, prompts(), **options), "mean_token_accuracy")


def test_sft_with_lora_and_checkpointing(tmp_path):
    options = {"peft_config": lora(**LORA_TARGETS["attention"]), "gradient_checkpointing": True}
    assert_same_path(both_sft(tmp_path, texts(), **options))


def test_sft_with_the_router_loss(tmp_path):
    trainers = []
    for index, load in enumerate((load_stock, load_ours)):
        model = load("qwen3_moe", output_router_logits=True)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainers.append(sft(model, tmp_path / str(index), texts(), **options))
    assert_same_path(trainers, "aux_loss")


def test_sft_packed(tmp_path):
    options = {"packing": True, "packing_strategy": "wrapped"}
    assert_same_path(both_sft(tmp_path, texts(), **options))


# --- Accelerate, and after training


def accelerate_loop(model) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)
    losses = []
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                losses.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@BOTH
def test_a_hand_written_accelerate_loop(family):
    stock, ours = remember(load_stock(family)), remember(load_ours(family))
    theirs, found = torch.tensor(accelerate_loop(stock)), torch.tensor(accelerate_loop(ours))
    assert relative_error(found, theirs) <= CPU_TOLERANCE
    assert_same_updates(ours, stock)


@BOTH
def test_generation_after_training_equals_stock_after_training(family, tmp_path):
    prompt = rows()[0]["input_ids"][None, :5]
    found = [
        trainer.model.eval().generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for trainer in both(family, tmp_path, learning_rate=0.1)
    ]
    assert torch.equal(*found)


def test_a_loss_that_falls(tmp_path):
    """Trained on two rows for a while, the model knows them: all the above is not the equality of two standstills."""
    trainer = train(
        load_ours("qwen3_moe"), tmp_path, data=rows()[:4] * 8, max_steps=60, optim="adamw_torch", learning_rate=1e-2
    )
    losses = history(trainer)
    assert losses[-1] < 0.5 < math.log(128) < losses[0]
