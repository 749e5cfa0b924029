"""Ctrl-C and SIGTERM end a run after the step that is running, with a checkpoint and an exit code that says why."""

import signal
from types import FrameType

from transformers import TrainerCallback

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75: EX_TEMPFAIL, "put me in the queue again"


class Interrupt(TrainerCallback):
    """A callback, and a context manager around `trainer.train()`: within it the signals ask for checkpoint and stop.

    `exit_code` is 75 after SIGTERM, 130 after SIGINT, None if the run was not stopped. A second signal acts at once.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._on_signal) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def on_step_end(self, args, state, control, **kwargs):
        if self._received is not None and state.global_step < state.max_steps:
            self.exit_code = EXIT_CODES[signal.Signals(self._received)]
            control.should_save = True
            control.should_training_stop = True
