"""Trainer and SFTTrainer: transformers' and TRL's, plus three things that every run should have.

    a loss or gradient that is not finite stops the run before the optimizer step     guard.py
    how evenly the tokens are spread over the experts, in the logs                    routing.py
    every record in output_dir/metrics.jsonl                                          metrics.py

All arguments, methods and files are those of the classes below; a script changes its import line and nothing else.
"""

import time
from typing import Any

import datasets
import torch
import transformers
import trl

from expertmesh.train.guard import ROW, KeepRows, StepRecord
from expertmesh.train.metrics import MetricsFile
from expertmesh.train.routing import RouterLoad


class _Watched:
    """The three things, for any subclass of transformers.Trainer.

    `load` (RouterLoad) holds the counts of tokens per layer and expert, for plots.
    """

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, *rest: Any, **kwargs: Any):
        if isinstance(train_dataset, datasets.Dataset) and ROW not in train_dataset.column_names:
            train_dataset = train_dataset.add_column(ROW, list(range(len(train_dataset))))
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        self.args.logging_nan_inf_filter = False  # it hides a nan, and waits for every microbatch
        self.load = RouterLoad(self.model)
        self.add_callback(MetricsFile(self.args.output_dir, self.load))
        self._record = StepRecord()
        self._tokens: torch.Tensor | int = 0
        self._seconds = 0.0
        self._step_began: float | None = None

    def get_train_dataloader(self):
        """As in transformers, and the batches say which rows of the data they hold."""
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        self.data_collator, self._signature_columns = KeepRows(collator), [*columns, ROW]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._step_began = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._record = StepRecord(batches, [batch.pop(ROW, None) for batch in batches], num_items)
        for batch in batches:
            mask = batch.get("attention_mask")
            # no .item() here: the sum stays on the device until the next record is logged
            self._tokens = self._tokens + (batch["input_ids"].numel() if mask is None else mask.sum())
        return batches, num_items

    def training_step(self, model, inputs, *args, **kwargs):
        self.load.mask = inputs.get("attention_mask")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._record.losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The last thing that transformers calls before the optimizer, at every step, clipped or not."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        # with float16 an infinite gradient is how the loss scaler finds its scale: it skips the step by itself
        watched = 0.0 if scaler is not None and scaler.is_enabled() else grad_norm
        decode = getattr(self.processing_class, "decode", None)
        self._record.check(watched, self.state.global_step + 1, self.args.output_dir, model, decode)
        return grad_norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._step_began is not None:
            self._seconds += time.perf_counter() - self._step_began
            self._step_began = None
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a record of training, not of evaluation
            logs |= self.load.window()
            logs["tokens_per_second"] = round(float(self._tokens) / max(self._seconds, 1e-9), 1)
            self._tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)


class Trainer(_Watched, transformers.Trainer):
    """transformers.Trainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    Raises `NonFiniteError` before the optimizer step, and ValueError for a step without a single supervised label.
    """


class SFTTrainer(_Watched, trl.SFTTrainer):
    """TRL's SFTTrainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    Raises `NonFiniteError` before the optimizer step, and ValueError for a step without a single supervised label.
    """
