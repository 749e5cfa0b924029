"""SFTTrainer: TRL's, with what trainer.py adds. A file of its own, because TRL is an extra and Trainer does without."""

from typing import Any

import transformers
import trl

from expertmesh.train.trainer import Trainer


class SFTTrainer(Trainer, trl.SFTTrainer):
    """TRL's SFTTrainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    All arguments, methods and files are TRL's; what is added is described at `Trainer`. With `cuda_graph=True` the loss
    in training is the model's own, which is the same number: TRL's looks for the labelled tokens on the CPU. Then TRL's
    `entropy`, `mean_token_accuracy` and `aux_loss` are in the records of evaluation only, `num_tokens` in none.
    """

    def __init__(self, *args: Any, cuda_graph: bool = False, **kwargs: Any):
        super().__init__(*args, cuda_graph=cuda_graph, **kwargs)
        if not cuda_graph:
            return
        settings: Any = self.args
        if settings.loss_type != "nll" or self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "cuda_graph=True records the model's own loss: leave out loss_type, label_smoothing_factor and "
                "compute_loss_func, or set cuda_graph=False."
            )
        for module in self.model.modules():
            if hasattr(module, "router_aux_loss_coef"):
                module.router_aux_loss_coef = self.router_aux_loss_coef

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.cuda_graph and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.cuda_graph:
            self._metrics["eval"].pop("num_tokens", None)  # those of training, which nobody counted
        super().log(logs, start_time)
