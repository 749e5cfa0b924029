"""Ctrl-C and SIGTERM end a run after the step that is running, with a checkpoint and an exit code that says why."""

import signal
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from expertmesh.train.errors import EXIT_CODES


class Interrupt(TrainerCallback):
    """A callback, and a context manager around `trainer.train()`: within it the signals ask for checkpoint and stop.

    `exit_code` is 75 after SIGTERM, 130 after SIGINT, None if the run was not stopped. A second signal acts at once.
    Ranks need not get the signal at the same time, nor all of them: after every step they agree whether to stop.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._received: int | None = None
        self._before: dict[int, object] = {}
        self._group: dist.ProcessGroup | None = None

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

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # the GPU's queue need not drain for the question

    def _agreed(self) -> int:
        """The signal that any rank received, 0 if none did."""
        received = torch.tensor(self._received or 0)
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, self._group)
        return int(received)

    def on_step_end(self, args, state, control, **kwargs):
        received = self._agreed()
        if received and state.global_step < state.max_steps:
            self.exit_code = EXIT_CODES[signal.Signals(received)]
            control.should_save = True
            control.should_training_stop = True
