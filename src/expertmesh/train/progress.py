"""What a run shows on the screen: a bar on a terminal, one line per record anywhere else. It writes to stderr."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

SAID = {"loss": "loss {:.4f}", "eval_loss": "held-out loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


class ProgressLine(TrainerCallback):
    """Loss, tokens/s and expert balance, as they are logged.

    Balance is the mean load of the experts over the load of the busiest one: 100% is even, 1/experts is a collapse.
    """

    def __init__(self):
        self.console = Console(stderr=True, highlight=False)
        said = TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True))
        columns = BarColumn(16), MofNCompleteColumn(), said, TimeRemainingColumn(compact=True)
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", said="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        said = _say(logs or {})
        if said and self.console.is_terminal and "eval_loss" not in logs:
            self.bar.update(self.task, said=said)
        elif said:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {said}")

    def stop(self) -> None:
        """Gives the terminal back: to be called at the end, also of a training that ends with an error."""
        self.bar.stop()


def _say(logs: dict[str, float]) -> str:
    parts = [text.format(logs[key]) for key, text in SAID.items() if key in logs]
    if "moe/max_vio" in logs:
        parts.append(f"expert balance {1 / (1 + logs['moe/max_vio']):.0%}")
    return "  ".join(parts)
