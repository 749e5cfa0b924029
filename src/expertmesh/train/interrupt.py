"""Ctrl-C, SIGTERM and a closed terminal end a run after its step, with a checkpoint and an exit code that says why."""

import os
import signal
from types import FrameType

from transformers import TrainerCallback

from expertmesh.train.errors import EXIT_CODES, handling
from expertmesh.waiting import meet


class Interrupt(TrainerCallback):
    """A callback, and a context manager around `trainer.train()`: within it the signals ask for checkpoint and stop.

    `exit_code` is 75 after SIGTERM or SIGHUP, 130 after SIGINT, None if the run was not stopped. A second signal acts
    at once; one that is ignored, as SIGHUP under nohup, stays so. Ranks need not get the signal at the same time, nor
    all of them: after every step they agree whether to stop.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._received = 0
        self._before: dict[int, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "Interrupt":
        self._before = handling(self._on_signal)
        self._terminals = [output for output in (1, 2) if os.isatty(output)]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self.__exit__()
        for output in self._terminals if number == signal.SIGHUP else ():  # nobody reads there, and writing is an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)

    def on_step_end(self, args, state, control, **kwargs):
        received = max(*meet("the end of a step", self._received))  # 0 if no rank received one
        if received and state.global_step < state.max_steps:
            self.exit_code = EXIT_CODES[signal.Signals(received)]
            control.should_save = True
            control.should_training_stop = True
