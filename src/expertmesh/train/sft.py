"""SFTTrainer: TRL's with the features of trainer.py. It is a separate file because trainer.py must not require TRL."""

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

    In training, the loss comes from the model's own head if that gives the same number (`why_not_own_loss`). TRL's code
    computes the logits twice and waits for the device at every step to read its metrics. Here the metrics are computed
    together with the loss and read only when they are logged.
    """

    _makes_logits = False  # whether the head has returned real logits

    def __init__(self, *args: Any, cuda_graph: bool | Literal["auto"] = "auto", **kwargs: Any):
        super().__init__(*args, cuda_graph=cuda_graph, **kwargs)
        # of one micro-batch: labelled tokens, sum of entropies, correct predictions, tokens, auxiliary loss, and 1 if
        # the others are set; always the same memory, because replayed CUDA graphs write to it
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        self._unread: list[torch.Tensor] = []
        if (reason := self.why_not_own_loss()) is not None:
            log.info("SFTTrainer: TRL computes the loss, because of %s.", reason)

    def why_not_own_loss(self) -> str | None:
        """Return the setting or the property of the model that requires TRL's loss in training, else None."""
        settings: Any = self.args
        layout, model = self.accelerator.parallelism_config, self._causal_lm
        defers = isinstance(model, FusedModel) and isinstance(model.get_output_embeddings(), FastHead)
        reasons = {
            f"loss_type={settings.loss_type!r}": settings.loss_type != "nll",
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "torch_compile": settings.torch_compile,
            "tensor parallelism": self.get_tp_size() > 1,
            "sequence or context parallelism": any(getattr(layout, f"{kind}_enabled", False) for kind in ("sp", "cp")),
            "virtual tokens": getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False),
            "an auxiliary loss that the model adds by its configuration": self.aux_loss_enabled
            and not hasattr(model, "router_aux_loss_coef"),
            # with cuda_graph=True use it anyway: TRL's loss waits for the device; this costs the logits' memory
            "a head that makes logits": self.cuda_graph is not True and (self._makes_logits or not defers),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @property
    def _causal_lm(self) -> Any:
        # not accelerate's is_peft_model, which reads files at every call
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def why_not_recorded(self) -> str | None:
        """As in `Trainer`; in addition, recording needs the model's own loss."""
        if (reason := self.why_not_own_loss()) is None:
            return super().why_not_recorded()
        return f"the model's own loss cannot replace TRL's because of {reason}. Leave that out"

    def _as_one_row(self, inputs: Any, row: Any) -> Any:
        return inputs if self.why_not_own_loss() is not None else super()._as_one_row(inputs, row)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not model.training or self.why_not_own_loss() is not None:
            self._read_metrics()
            counted = self._total_train_tokens
            if self._base is not None and not inputs.keys() & {"attention_mask", "cu_seq_lens_q"}:  # TRL counts with it
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self._release is not None and self._release.measuring:  # a second pass over the same batch follows
                self._total_train_tokens = counted
            return loss
        inputs |= {"use_cache": False, "count_predictions": True}
        aux_loss, causal_lm = 0.0, self._causal_lm
        if not self.aux_loss_enabled:
            loss, outputs = transformers.Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        else:  # the model computes the auxiliary loss; add it by TRL's formula
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
        statistics = getattr(logits, "statistics", None)
        if statistics is None:
            statistics = statistics_reference(logits.flatten(0, -2), next_tokens(inputs["labels"]).flatten())
            if self.cuda_graph is not True:
                log.warning("SFTTrainer: TRL computes the loss of all later steps, because the head made logits.")
                self._makes_logits = True
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        for slot, value in zip(self._sums, (*statistics, tokens, aux_loss, 1.0), strict=True):
            slot.fill_(value)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._sums.zero_()
        loss = super().training_step(model, inputs, num_items_in_batch)
        data = self.accelerator.gradient_state
        if data.end_of_dataloader and 0 < data.remainder <= self.accelerator.process_index:
            self._sums.zero_()  # this rank's rows are repetitions that fill the last batch; TRL does not count them
        self._unread.append(self._sums.clone())
        return loss

    def _read_metrics(self) -> None:
        """Pass the metrics of all micro-batches since the last call to TRL. All ranks must call it together."""
        rows = self.accelerator.reduce(torch.stack(self._unread), "sum").tolist() if self._unread else []
        self._unread.clear()
        metrics = self._metrics["train"]
        for labelled, entropy, correct, tokens, aux_loss, ranks in rows:
            if not ranks:  # TRL's own loss, which has added its metrics already
                continue
            metrics["entropy"].append(entropy / labelled if labelled else 0.0)
            metrics["mean_token_accuracy"].append(correct / labelled if labelled else 0.0)
            self._total_train_tokens += int(tokens) // self._tp_size
            metrics["num_tokens"] = [self._total_train_tokens]
            if self.aux_loss_enabled:
                metrics["aux_loss"].append(aux_loss / ranks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.keys() & {"loss", "train_loss"}:  # all ranks log these records, so all take part in the collective
            self._read_metrics()
        super().log(logs, start_time)
