"""Callbacks of a run: stop with a checkpoint after a signal, and show the progress on stderr."""

import os
import signal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

from expertmesh.timeouts import gather_on_hosts
from expertmesh.train.errors import EXIT_CODES, signal_handler

LOG_FORMATS = {"loss": "loss {:.4f}", "eval_loss": "held-out loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


class Interrupt(TrainerCallback):
    """Callback and context manager around `trainer.train()` that turns signals into "save a checkpoint and stop".

    `exit_code` is None if the run was not stopped. A second signal ends the process at once. It is enough if one rank
    gets the signal: after every step, all ranks agree whether to stop.
    """

    exit_code: int | None = None
    _received = 0

    def __enter__(self) -> "Interrupt":
        self._before = signal_handler(self._on_signal)
        self._terminals = [output for output in (1, 2) if os.isatty(output)]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: object) -> None:
        self._received = number
        self.__exit__()
        for output in self._terminals if number == signal.SIGHUP else ():  # writing to a closed terminal raises
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)

    def on_step_end(self, args, state, control, **kwargs):
        received = max(*gather_on_hosts("the end of a step", self._received))  # 0 if no rank received one
        if received and state.global_step < state.max_steps:
            self.exit_code = EXIT_CODES[signal.Signals(received)]
            control.should_save = control.should_training_stop = True


class ProgressLine(TrainerCallback):
    """Show loss, tokens/s and expert balance on stderr: a bar on a terminal, else one line per record.

    Expert balance is the mean load over the largest load: 100% is even, 1/experts means one expert gets everything.
    """

    def __init__(self):
        self.console = Console(stderr=True, highlight=False)
        text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))
        columns = BarColumn(16), MofNCompleteColumn(), text, TimeRemainingColumn(compact=True)
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", text="")
        self.stop = self.bar.stop  # call it at the end, also after an error

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        parts = [template.format(logs[key]) for key, template in LOG_FORMATS.items() if key in logs]
        if "moe/max_vio" in logs:
            parts.append(f"expert balance {1 / (1 + logs['moe/max_vio']):.0%}")
        text = "  ".join(parts)
        if text and self.console.is_terminal and "eval_loss" not in logs:
            self.bar.update(self.task, text=text)
        elif text:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}")
