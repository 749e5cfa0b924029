"""`expertmesh demo`: train a small Qwen3-MoE on real text on any machine, and verify its export.

It is an ordinary run of `expertmesh train` on built-in data. It shows the model's answers and the held-out loss before
and after training, and checks that stock Transformers computes the same logits from the saved checkpoint.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUESTIONS = [
    "What does `math.sqrt` do?",
    "What is the class `ValueError`?",
    "Explain the Python topic `lambda`.",
]
LOSS_MUST_FALL_TO = 0.75  # of the loss before training: a drop far above noise, and easily reached by the demo
# Relative, float32. On a CPU only the order of summation differs; a GPU may use TF32 with its 10-bit mantissas.
LOGITS_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the checkpoint, the metrics and the plots.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int, typer.Option(min=20, help="Optimizer steps; the default takes about two minutes on two cores.")
    ] = 500,
) -> None:
    """Train a small Qwen3-MoE on this machine, export it, and verify the export."""
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    # OpenMP threads that spin while they wait would take cores from other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.status("loading"):
        import datasets
        import transformers

        from expertmesh.train.config import Config
        from expertmesh.train.run import build, train

        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        config = Config.model_validate(settings(output_dir, steps))
        trainer = build(config)
    model, tokenizer = trainer.model, trainer.processing_class
    _introduce(console, trainer)

    before = trainer.evaluate()["eval_loss"]
    answers = [_answer(model, tokenizer, question) for question in QUESTIONS]
    result = train(config, trainer)
    if result.final is None:
        raise typer.Exit(result.exit_code)
    after = result.metrics["eval_loss"]
    for question, early in zip(QUESTIONS, answers, strict=True):
        _show(console, question, early, _answer(model, tokenizer, question))

    differing, logits_error = compare_with_stock(model, tokenizer, result.final)
    weights = f"{len(differing)} tensors differ, such as {differing[0]}" if differing else "every tensor bit-equal"
    tolerance = LOGITS_TOLERANCE[model.device.type]
    promises = [
        ("held-out loss", f"{before:.3f} → {after:.3f}", f"below {LOSS_MUST_FALL_TO * before:.3f}"),
        ("weights, reloaded", weights, "bit-equal"),
        ("logits, stock against fused", f"{logits_error:.1e} apart", f"at most {tolerance:.0e}"),
    ]
    kept = [after <= LOSS_MUST_FALL_TO * before, not differing, logits_error <= tolerance]
    _report(console, promises, kept, result.output_dir)
    console.print(f"[dim]{time.perf_counter() - began:.0f} seconds in all[/]")
    if not all(kept):
        raise typer.Exit(1)


def settings(output_dir: Path, steps: int) -> dict[str, dict]:
    """Return the configuration of the demo, in the format of `expertmesh train`."""
    return {
        "model": {"name": "demo"},
        "data": {"name": "demo:all", "max_length": 64, "assistant_only_loss": True},
        "train": {"max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 6e-3, "weight_decay": 0.1},
        "moe": {"router_aux_loss_coef": 0.05},
        "log": {"logging_steps": max(1, steps // 50), "eval_steps": max(1, steps // 5)},
        "save": {"output_dir": str(output_dir)},
    }


def compare_with_stock(model: "PreTrainedModel", tokenizer: Any, folder: Path) -> tuple[list[str], float]:
    """Compare the model with its checkpoint in `folder`, loaded by stock Transformers.

    Return the names of tensors that are not bit-equal or exist on one side only, and the largest difference of logits
    relative to the largest logit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    stock.to(model.device).eval()
    ours, theirs = model.state_dict(), stock.state_dict()
    differing = sorted(ours.keys() ^ theirs.keys())
    differing += [name for name in sorted(ours.keys() & theirs.keys()) if not torch.equal(ours[name], theirs[name])]
    error = 0.0
    for question in QUESTIONS:
        ids = _prompt(tokenizer, question, model.device)
        with torch.no_grad():
            got, expected = model.eval()(ids).logits, stock(ids).logits
        error = max(error, ((got - expected).abs().max() / expected.abs().max()).item())
    return differing, error


def _introduce(console: Console, trainer: Any) -> None:
    config, rows, held_out = trainer.model.config, len(trainer.train_dataset), len(trainer.eval_dataset)
    console.print(
        f"\n[bold]expertmesh demo[/]: a Qwen3-MoE with {trainer.model.num_parameters() / 1e6:.1f} million weights "
        f"({config.num_hidden_layers} layers, {config.num_experts} experts, {config.num_experts_per_tok} per token), "
        f"untrained,\nlearns from {rows:,} dialogues about Python and the world, on {trainer.model.device}; "
        f"{held_out} others are held out.\n"
    )


def _prompt(tokenizer: Any, question: str, device: "torch.device") -> "torch.Tensor":
    turns = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded["input_ids"].to(device)


def _answer(model: "PreTrainedModel", tokenizer: Any, question: str) -> str:
    """Return the model's greedy answer of at most 60 tokens."""
    ids = _prompt(tokenizer, question, model.device)
    answered = model.eval().generate(ids, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _show(console: Console, question: str, before: str, after: str) -> None:
    console.print(f"\n[bold]{escape(question)}[/]")
    console.print(f"[dim]before:[/] {escape(' '.join(before.split())[:100]) or '(nothing)'}")
    console.print(f"[green]after:[/]  {escape(after)}")


def _report(console: Console, promises: list[tuple[str, str, str]], kept: list[bool], output_dir: Path) -> None:
    """Print a table of all promises, measurements and whether they hold, and then the files of the run."""
    table = Table(box=None, pad_edge=False, title="\nwhat this run shows", title_justify="left")
    for column in ("", "measured", "must be", ""):
        table.add_column(column, no_wrap=True)
    for promise, holds in zip(promises, kept, strict=True):
        table.add_row(*promise, "[green]yes[/]" if holds else "[bold red]no[/]")
    console.print(table)
    for path, what in (
        ("final", "the checkpoint, in Hugging Face's format"),
        ("plots/loss.png", "the loss curve"),
        ("plots/router.png", "where the tokens went, layers by experts"),
        ("metrics.jsonl", "every record of the run"),
    ):
        console.print(f"  {output_dir / path}  [dim]{what}[/]")
