"""Extend transformers' Trainer by checkpoints (resume.py), checks for nan (guard.py), router metrics (routing.py) and
CUDA graphs (graphed.py). sft.py adds the same to TRL's SFTTrainer.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import transformers

from expertmesh import backends
from expertmesh.memory.adamw import AdamW
from expertmesh.memory.muon import Muon
from expertmesh.memory.release import GradientRelease
from expertmesh.parallel import ranks
from expertmesh.parallel.clip import clip_grad_norm, grad_norm
from expertmesh.timeouts import cpu_group, gather_on_hosts, step_timeout
from expertmesh.train.buckets import Sizes, bucket_for, fused_base, one_row, pad_to_bucket, sizes
from expertmesh.train.graphed import BEGINNING, GraphedStep, why_not, why_not_auto
from expertmesh.train.guard import ONE_ROW, ROW, KeepRows, StepRecord, padding_mask, refuse_to_release
from expertmesh.train.metrics import MetricsFile
from expertmesh.train.resume import ResumableTrainer
from expertmesh.train.routing import RouterLoad

MOST_TOKENS = 8192  # per GPU and step: with more tokens the GPU is the limit, and a graph would only take memory
CANNOT, EITHER, BUCKET = 2, 1, 0  # a rank's batch: cannot be padded to a bucket, needs no bucket, needs one


class Trainer(ResumableTrainer):
    """transformers.Trainer that stops at a loss or gradient that is not finite, logs the load of the experts and writes
    every record to output_dir/metrics.jsonl.

    Other arguments, methods and files are those of transformers. `load` (RouterLoad) has the token counts per layer and
    expert. `train` raises NonFiniteError before the optimizer step, and ValueError if all labels of a step are masked.

    cuda_graph: whether `train` records forward and backward as a CUDA graph and replays it (`GraphedStep`). Packed and
    padded batches are first padded to a few shapes (buckets.py). "auto" records if that works and pays, else it logs
    the reason. True raises ValueError if it cannot work; the message says what to change.
    """

    processing_class: Any

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        *rest: Any,
        cuda_graph: bool | Literal["auto"] = "auto",
        gradient_release: Literal["running", "exact"] | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, _numbered(train_dataset), *rest, **kwargs)
        self.cuda_graph, self.gradient_release = cuda_graph, gradient_release
        self._release: GradientRelease | None = None
        self._graphed: GraphedStep | None = None
        self._plan: bool | None = None  # whether this run records steps; None: not decided yet
        self._logged: set[str] = set()
        self._full_shape: torch.Size | None = None  # shape of the first batch without padding
        self._buckets: list[Sizes] = []
        self._base: Any = None  # the fused base model if it takes packed rows
        self._one_row_pays = False  # whether eager steps also get batches as one row
        if cuda_graph is True:
            self._records()
        if self.args.dataloader_pin_memory:  # else the copy of the next batch waits for the current step
            self.accelerator.dataloader_config.non_blocking = True
        self.args.logging_nan_inf_filter = False  # it hides nan, and waits for the device at every micro-batch
        self.load = RouterLoad(self.model)
        self.add_callback(MetricsFile(self.args.output_dir or ".", self.load))
        self._record = StepRecord()
        self._ahead = _Ahead(iter(()))
        self.tokens: torch.Tensor | int = 0  # tokens of this rank since `train` began, without padding
        self._logged_tokens = 0.0  # `tokens` at the last record
        self._since: float | None = None  # time of the first batch or last record, plus pauses (evaluation, save)

    def get_train_dataloader(self):
        """As in transformers, but batches also contain their row numbers and, if useful, a packed version."""
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)  # split among ranks after collation
        self._base = None if streamed else fused_base(self.model)
        fixed = self.args.torch_compile or self.args.neftune_noise_alpha is not None  # noise depends on a row's length
        can_pack = self._base is not None and not fixed
        self._one_row_pays = can_pack and why_not_auto(self) is None
        pack = one_row if self._one_row_pays or (can_pack and self._records()) else None
        self.data_collator = KeepRows(collator, self._base is not None, pack)
        self._signature_columns = [*columns, ROW]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._since = time.perf_counter() if self._since is None else self._since
        if self._ahead.source is not epoch_iterator:
            self._ahead = _Ahead(epoch_iterator)
        batches, num_items = super().get_batch_samples(self._ahead, num_batches, device)
        mappings = [batch if isinstance(batch, MutableMapping) else {} for batch in batches]
        self._record = StepRecord(mappings, [batch.pop(ROW, None) for batch in mappings], num_items)
        for batch in mappings:
            mask, ids = padding_mask(batch), batch.get("input_ids")
            # no .item() here: the sum stays on the device until the next record is logged
            self.tokens = self.tokens + (mask.sum() if mask is not None else 0 if ids is None else ids.numel())
        return batches, num_items

    def train(self, *args: Any, **kwargs: Any):
        self._plan = None  # decide again: arguments may have changed
        self.tokens = self._logged_tokens = 0
        if self.gradient_release is not None:
            refuse_to_release(self)
        try:
            done = super().train(*args, **kwargs)
            if self.cuda_graph is True and self._graphed is not None and not self._graphed.replayed:
                backends.logger().warning("cuda_graph=True replayed no step: too few batches had the same shape.")
            return done
        finally:
            for resource in (self._graphed, self._release):
                if resource is not None:
                    resource.close()
            self._graphed = self._since = self._release = None

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any):
        with self._waiting("the count of labels"):
            return super()._get_num_items_in_batch(*args, **kwargs)

    def _waiting(self, place: str) -> AbstractContextManager[None]:
        """Context manager that gives collectives of a sharded model the step timeout, not the longer one of loading."""
        if not self.is_distributed_loading_by_transformers or ranks.world_size() == 1:
            return nullcontext()
        world: Any = torch.distributed.group.WORLD
        return step_timeout(f"{place} of step {self.state.global_step + 1}", world, cpu_group(world))

    def training_step(self, model, inputs, num_items_in_batch=None):
        row = inputs.pop(ONE_ROW, None) if isinstance(inputs, MutableMapping) else None
        with self._waiting("forward and backward"):
            if isinstance(inputs, Mapping) and self._begins_recorded(model):
                loss = self._graphed_step(model, inputs, row, num_items_in_batch)
            else:
                step = self._plain_step if self.gradient_release is None else self._released_step
                loss = step(model, self._as_one_row(inputs, row), num_items_in_batch)
        self._record.losses.append(loss)
        return loss

    def _plain_step(self, model, inputs, num_items_in_batch):
        self.load.mask = padding_mask(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _released_step(self, model, inputs, num_items_in_batch):
        if self._release is None:
            bound = self.args.max_grad_norm or None
            self._release = GradientRelease(self._torch_optimizer, self.gradient_release, bound)
        release, backward = self._release, self.accelerator.backward

        def checked(loss: torch.Tensor, **options: Any) -> None:
            # for a step without labels this divides by zero, so that it is refused as not finite
            release.check(loss if num_items_in_batch is None else loss.detach() / (num_items_in_batch > 0))
            backward(loss, **options)

        self.accelerator.backward = checked
        try:
            return release.run(lambda: self._plain_step(model, copy.copy(inputs), num_items_in_batch))
        finally:
            del self.accelerator.backward

    def _as_one_row(self, inputs: Any, row: dict[str, Any] | None) -> Any:
        """Return the packed row if it saves the base model a synchronization, else the unchanged batch."""
        if row is None or not self._one_row_pays or _is_full(inputs, row):
            return inputs
        return row if self._base.takes_documents(row["input_ids"].shape[1]) else inputs

    def why_not_recorded(self) -> str | None:
        """Return why steps cannot be recorded as CUDA graphs with this trainer, and what to change; else None."""
        return why_not(self)

    def _records(self) -> bool:
        """Whether steps should be recorded. Raise ValueError if cuda_graph=True and they cannot be."""
        if self._plan is None:
            why = self.why_not_recorded() if self.cuda_graph else None
            if why and self.cuda_graph is True:
                raise ValueError(f"Steps cannot be recorded with cuda_graph=True: {why}, or set cuda_graph=False.")
            if why:
                self._log_reason(why)
            self._plan = bool(self.cuda_graph) and why is None
        return self._plan and not (self._graphed is not None and self._graphed.gave_up)

    def _log_reason(self, why: str) -> None:
        if why not in self._logged:
            self._logged.add(why)
            backends.logger().info(f"Steps are not recorded as CUDA graphs: {why}.")

    def _begins_recorded(self, model) -> bool:
        """Whether this step should be recorded. Before the first, all ranks agree whether to record at all."""
        if self._records() and self._graphed is None:
            strict = self.cuda_graph is True
            why = None if strict else why_not_auto(self)
            self._plan = not any(*gather_on_hosts(BEGINNING, why is not None))
            if self._plan:
                self._graphed = GraphedStep(model, lambda n, weight, **batch: self._plain_step(model, batch, n), strict)
            else:
                self._log_reason(why or "another rank does not")
        return self._records()

    def _graphed_step(self, model, inputs, row, num_items_in_batch):
        model.train()  # a replay runs no Python, so switch the modes here
        self.optimizer.train()
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=self.args.device)
        batch, is_small = self._into_bucket(inputs, row)
        weight = getattr(self.accelerator.unwrap_model(model), "mtp_loss_weight", None)  # if it changes: a new graph
        step = self._graphed if is_small else self._graphed.eager
        return step(n=num_items_in_batch, weight=weight, **self._prepare_inputs(batch))

    def _into_bucket(self, inputs: Mapping[str, Any], row: dict[str, Any] | None) -> tuple[Mapping[str, Any], bool]:
        """Return the batch, padded to a bucket that fits all ranks, and whether it is small enough to be recorded."""
        ids: Any = inputs.get("input_ids")
        full = row is not None and _is_full(inputs, row)
        self._full_shape = ids.shape if full and self._full_shape is None else self._full_shape
        kind = CANNOT if row is None else EITHER if full and ids.shape == self._full_shape else BUCKET
        local_sizes = sizes(row) if row is not None else (0 if ids is None else ids.numel(), 0, 0)
        kinds, *all_sizes = gather_on_hosts(BEGINNING, kind, *local_sizes)
        tokens, documents, longest = map(max, all_sizes)
        if self.cuda_graph == "auto" and tokens > MOST_TOKENS:
            self._log_reason(f"a batch has more than {MOST_TOKENS:,} tokens per GPU, so the CPU is not the limit")
            return self._as_one_row(inputs, row), False
        if row is not None and BUCKET in kinds and CANNOT not in kinds:
            bucket = bucket_for((tokens, documents, longest), self._buckets)
            if self._base.takes_documents(bucket[0]):
                return pad_to_bucket(row, bucket), True
        return inputs, True

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in transformers, but with expertmesh's AdamW for PyTorch's, except under DeepSpeed. `optim_args` may set
        its `states` and `offload`; with "matrices=muon" it is expertmesh's Muon, which takes the model.
        """
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        given = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
        ours: dict[str, Any] = {key: given[key] for key in ("states", "offload", "matrices") if key in given}
        if cls is not torch.optim.AdamW or args.deepspeed_plugin or args.device.type not in ("cuda", "cpu"):
            for key in ours:
                raise ValueError(f"optim_args: {key}= works with expertmesh's AdamW, not {cls.__name__}: remove it.")
            return cls, options
        if "offload" in ours:
            ours["offload"] = ours["offload"].lower() == "true"
        if (matrices := ours.pop("matrices", None)) not in (None, "muon"):
            raise ValueError(f"optim_args: matrices= must be muon or left out, not {matrices!r}.")
        own = Muon if matrices else AdamW
        backends.logger().info("optim=%s: expertmesh's %s, which clips as it steps.", args.optim.value, own.__name__)
        if matrices:  # transformers takes this for a factory and passes the model
            return (lambda: Muon), options | ours | {"weight_decay": args.weight_decay}
        return AdamW, options | ours

    def _clip_grad_norm(self, model, max_norm: float | None = None) -> Any:
        """Clip now or in the optimizer's step, and return the norm before that; None: transformers computes it."""
        max_norm = self.args.max_grad_norm if max_norm is None else max_norm
        if self._release is not None:
            return self._release.grad_norm
        if (optimizer := self._own_adamw) is not None:
            norm = grad_norm(model.parameters())
            optimizer.clip_next(norm, max_norm)
            return norm
        if self.is_distributed_loading_by_transformers:
            return clip_grad_norm(model.parameters(), max_norm)
        return super()._clip_grad_norm(model) if math.isfinite(max_norm) else None

    @property
    def _own_adamw(self) -> AdamW | None:
        """expertmesh's optimizer if it clips the gradients and skips refused steps itself, else None."""
        optimizer = self._torch_optimizer
        return optimizer if isinstance(optimizer, AdamW) and not (self._has_other_format or self._scales_loss) else None

    @property
    def _scales_loss(self) -> bool:
        """Whether float16's loss scaler is on, which needs transformers' own clipping."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled()

    def _get_grad_norm(self, model, grad_norm=None):
        """Start the check of losses and gradients. transformers calls this at every step, last before the optimizer."""
        if grad_norm is None:
            grad_norm = self._clip_grad_norm(model, math.inf)
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with float16 the loss scaler adjusts its scale at infinite gradients and skips such steps itself
        watched = 0.0 if self._scales_loss else grad_norm
        refused, optimizer = self._record.start_check(watched), self._own_adamw

        def check(*_: Any) -> None:
            """Raise if a loss or gradient of this step is not finite."""
            if optimizer is not None:
                handle.remove()
                del optimizer.found_inf
            self._ahead.fetch()  # while the device still computes the flags
            self._record.check(self, watched)

        if optimizer is None:
            check()
        else:
            optimizer.found_inf = refused  # the optimizer skips its update on the device; the host reads the flag later
            handle = optimizer.register_step_post_hook(check)
        return grad_norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        pause = self.control.should_evaluate or self.control.should_save
        if (pause or self.control.should_log) and self.is_distributed_loading_by_transformers:
            gather_on_hosts(f"the end of step {self.state.global_step}")  # wait for all ranks: what follows is slow
        began = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pause and self._since is not None:  # evaluating and saving do not count as training time
            self._since += time.perf_counter() - max(began, self._since)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a record of training, not of evaluation
            logs |= self.load.window()
            tokens = float(self.tokens)  # waits for the device, so that the time below includes its work
            now = time.perf_counter()
            seconds = 0.0 if self._since is None else now - self._since
            logs["tokens_per_second"] = round((tokens - self._logged_tokens) / max(seconds, 1e-9), 1)
            self._logged_tokens, self._since = tokens, now
        super().log(logs, start_time)


class _Ahead(Iterator[Any]):
    """Iterator over `source` that can fetch one item ahead. `next` raises an error that occurred in `fetch`.

    The trainer fetches before it waits for the device, so that the next batch is collated while the device works.
    """

    def __init__(self, source: Iterator[Any]):
        self.source = source
        self._fetched: list[Future[Any]] = []

    def fetch(self) -> None:
        """Fetch the next item, unless that has been done."""
        if not self._fetched:
            self._fetched.append(Future())
            try:
                self._fetched[0].set_result(next(self.source))
            except Exception as error:  # StopIteration among them
                self._fetched[0].set_exception(error)

    def __next__(self) -> Any:
        self.fetch()
        return self._fetched.pop().result()


def _is_full(inputs: Any, row: dict[str, Any]) -> bool:
    """Whether each row of a batch is a single document without padding."""
    return sizes(row)[:2] == (inputs["input_ids"].numel(), len(inputs["input_ids"]))


def _numbered(dataset: Any) -> Any:
    """Add the row numbers to a datasets.Dataset as a column; return other data sets unchanged (rows unknown)."""
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__") or ROW in dataset.column_names:
        return dataset
    return dataset.add_column(ROW, list(range(len(dataset))))
