"""SFTTrainer: TRL's, with what trainer.py adds. A file of its own, because TRL is an extra and Trainer does without."""

import logging
from typing import Any, Literal

import torch
import transformers
import trl

from expertmesh.fuse import FusedModel
from expertmesh.kernels.linear_cross_entropy import statistics_reference
from expertmesh.layers.head import FastHead, next_tokens
from expertmesh.train.trainer import Trainer

log = logging.getLogger(__name__)


class SFTTrainer(Trainer, trl.SFTTrainer):
    """TRL's SFTTrainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    All else is TRL's. In training the loss comes from the model's own head where that is the same number
    (`why_not_own_loss`): TRL's makes the logits twice, and waits for the device at every step to read its metrics.
    These are made with the loss, and read when they are logged.
    """

    _makes_logits = False  # whether the head was seen making them

    def __init__(self, *args: Any, cuda_graph: bool | Literal["auto"] = "auto", **kwargs: Any):
        super().__init__(*args, cuda_graph=cuda_graph, **kwargs)
        # of one microbatch: labelled tokens, sums of entropies and hits, tokens, auxiliary loss, 1 once they are there;
        # always at the same place, as a recorded step writes to it
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        self._unread: list[torch.Tensor] = []
        if (reason := self.why_not_own_loss()) is not None:
            log.info("SFTTrainer: the loss comes from TRL's head, because of %s.", reason)

    def why_not_own_loss(self) -> str | None:
        """What in the settings or the model asks for TRL's head in training, or None."""
        settings: Any = self.args
        layout, model = self.accelerator.parallelism_config, self._causal_lm
        defers = isinstance(model, FusedModel) and isinstance(model.get_output_embeddings(), FastHead)
        reasons = {
            f"loss_type={settings.loss_type!r}": settings.loss_type != "nll",
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "torch_compile": settings.torch_compile,
            "tensor parallelism": self.get_tp_size() > 1,
            "sequence or context parallelism": any(getattr(layout, f"{way}_enabled", False) for way in ("sp", "cp")),
            "virtual tokens": getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False),
            "an auxiliary loss that the model adds by its configuration": self.aux_loss_enabled
            and not hasattr(model, "router_aux_loss_coef"),
            # a recorded step must not wait, at the price of the logits' memory
            "a head that makes logits": self.cuda_graph is not True and (self._makes_logits or not defers),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @property
    def _causal_lm(self) -> Any:
        # accelerate's is_peft_model reads files at every call
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def why_not_recorded(self) -> str | None:
        """As in `Trainer`, and what asks for another loss than the model's own."""
        if (reason := self.why_not_own_loss()) is None:
            return super().why_not_recorded()
        return f"the model's own loss cannot take the place of TRL's because of {reason}. Leave that out"

    def _as_one_row(self, inputs: Any, row: Any) -> Any:
        return inputs if self.why_not_own_loss() is not None else super()._as_one_row(inputs, row)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not model.training or self.why_not_own_loss() is not None:
            self._read_metrics()
            counted = self._total_train_tokens
            if self._base is not None and not inputs.keys() & {"attention_mask", "cu_seq_lens_q"}:  # TRL counts by it
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self._release is not None and self._release.measuring:  # the same batch comes again
                self._total_train_tokens = counted
            return loss
        inputs |= {"use_cache": False, "count_predictions": True}
        aux_loss, causal_lm = 0.0, self._causal_lm
        if not self.aux_loss_enabled:
            loss, outputs = transformers.Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        else:  # the model computes it, and TRL's formula adds it
            inputs["output_router_logits"] = True
            coef, causal_lm.router_aux_loss_coef = causal_lm.router_aux_loss_coef, 0.0
            try:
                loss, outputs = transformers.Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
            finally:
                causal_lm.router_aux_loss_coef = coef
            aux_loss = outputs.aux_loss
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        self._count(inputs, outputs.logits, aux_loss)
        return loss

    @torch.no_grad()
    def _count(self, inputs: dict[str, Any], logits: torch.Tensor, aux_loss: torch.Tensor | float) -> None:
        found = getattr(logits, "statistics", None)
        if found is None:
            found = statistics_reference(logits.flatten(0, -2), next_tokens(inputs["labels"]).flatten())
            if self.cuda_graph is not True:
                log.warning("SFTTrainer: from now on the loss comes from TRL's, because of a head that made logits.")
                self._makes_logits = True
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        for place, value in zip(self._sums, (*found, tokens, aux_loss, 1.0), strict=True):
            place.fill_(value)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._sums.zero_()
        loss = super().training_step(model, inputs, num_items_in_batch)
        data = self.accelerator.gradient_state
        if data.end_of_dataloader and 0 < data.remainder <= self.accelerator.process_index:
            self._sums.zero_()  # repeated rows that fill the last batch: TRL does not count them
        self._unread.append(self._sums.clone())
        return loss

    def _read_metrics(self) -> None:
        """Hand TRL the metrics of all microbatches since the last call, which is the same on all ranks."""
        rows = self.accelerator.reduce(torch.stack(self._unread), "sum").tolist() if self._unread else []
        self._unread.clear()
        metrics = self._metrics["train"]
        for labelled, entropy, correct, tokens, aux_loss, ranks in rows:
            if not ranks:  # TRL's own loss, which has counted
                continue
            metrics["entropy"].append(entropy / labelled if labelled else 0.0)
            metrics["mean_token_accuracy"].append(correct / labelled if labelled else 0.0)
            self._total_train_tokens += int(tokens) // self._tp_size
            metrics["num_tokens"] = [self._total_train_tokens]
            if self.aux_loss_enabled:
                metrics["aux_loss"].append(aux_loss / ranks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.keys() & {"loss", "train_loss"}:  # a record that all ranks write
            self._read_metrics()
        super().log(logs, start_time)
