"""SFTTrainer: TRL's, with what trainer.py adds. A file of its own, because TRL is an extra and Trainer does without."""

from typing import Any, Literal

import transformers
import trl

from expertmesh.train.trainer import Trainer


class SFTTrainer(Trainer, trl.SFTTrainer):
    """TRL's SFTTrainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    All arguments, methods and files are TRL's; what is added is described at `Trainer`. Where steps are recorded the
    loss in training is the model's own, which is the same number: TRL's looks for the labelled tokens on the CPU. Then
    TRL's `entropy`, `mean_token_accuracy` and `aux_loss` are in the records of evaluation only, `num_tokens` in none.
    """

    _reads_masks = True  # TRL counts tokens by them
    _uncounted = False  # whether there were steps whose tokens it did not count

    def __init__(self, *args: Any, cuda_graph: bool | Literal["auto"] = "auto", **kwargs: Any):
        super().__init__(*args, cuda_graph=cuda_graph, **kwargs)
        if self.why_not_recorded() or not cuda_graph:
            return
        for module in self.model.modules():
            if hasattr(module, "router_aux_loss_coef"):
                module.router_aux_loss_coef = self.router_aux_loss_coef

    def why_not_recorded(self) -> str | None:
        """As in `Trainer`, and other losses than the model's own."""
        settings: Any = self.args
        if settings.loss_type != "nll" or self.label_smoother is not None or self.compute_loss_func is not None:
            return (
                "what is recorded is the model's own loss. Leave out loss_type, label_smoothing_factor and "
                "compute_loss_func"
            )
        return super().why_not_recorded()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self._graphing and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"], self._uncounted = False, True
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._uncounted:
            self._metrics["eval"].pop("num_tokens", None)  # those of training
        super().log(logs, start_time)
