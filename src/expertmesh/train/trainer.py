"""Trainer: transformers', with checkpoints (resume.py), what every run should have, and steps recorded where that pays
(graphed.py). sft.py gives all that to TRL's SFTTrainer.
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

MOST_TOKENS = 8192  # of a GPU in a step: with more the GPU is the limit, and a recording only takes memory
CANNOT, EITHER, BUCKET = 2, 1, 0  # a rank's batch: fits no bucket, needs none, needs one


class Trainer(ResumableTrainer):
    """transformers.Trainer that stops at a loss or gradient that is not finite, logs the load of the experts and keeps
    every record in output_dir/metrics.jsonl.

    All arguments, methods and files are transformers'. `load` (RouterLoad) holds the counts of tokens per layer and
    expert. `train` raises `NonFiniteError` before the optimizer step, and ValueError for a step without a single
    supervised label.

    cuda_graph: whether `train` records forward and backward as a CUDA graph and replays it (`GraphedStep`). Packed and
    padded batches are rounded up to few shapes before (buckets.py). "auto": where it works and pays; where not, the log
    says why. True: raises ValueError where it cannot work, and says what to change.
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
        self._said: set[str] = set()
        self._usual: torch.Size | None = None  # of the first batch without padding
        self._buckets: list[Sizes] = []
        self._base: Any = None  # that finds documents and padding by itself
        self._one_row_pays = False  # whether steps that are not recorded also take batches as one row
        if cuda_graph is True:
            self._records()
        if self.args.dataloader_pin_memory:  # a copy of the next batch would wait for the step that is under way
            self.accelerator.dataloader_config.non_blocking = True
        self.args.logging_nan_inf_filter = False  # it hides a nan, and waits for every microbatch
        self.load = RouterLoad(self.model)
        self.add_callback(MetricsFile(self.args.output_dir or ".", self.load))
        self._record = StepRecord()
        self._ahead = _Ahead(iter(()))
        self.tokens: torch.Tensor | int = 0  # of this rank since `train` began, without padding
        self._logged_tokens = 0.0  # of them, at the last record
        self._since: float | None = None  # start of the count of tokens, plus all pauses since

    def get_train_dataloader(self):
        """As in transformers, and the batches say which rows of the data they hold."""
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)  # batches are shared out later
        self._base = None if streamed else fused_base(self.model)
        fixed = self.args.torch_compile or self.args.neftune_noise_alpha is not None  # noise depends on a row's length
        lays_out = self._base is not None and not fixed
        self._one_row_pays = lays_out and why_not_auto(self) is None
        rows = one_row if self._one_row_pays or (lays_out and self._records()) else None
        self.data_collator = KeepRows(collator, self._base is not None, rows)
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
        named = [batch if isinstance(batch, MutableMapping) else {} for batch in batches]
        self._record = StepRecord(named, [batch.pop(ROW, None) for batch in named], num_items)
        for batch in named:
            mask, ids = padding_mask(batch), batch.get("input_ids")
            # no .item() here: the sum stays on the device until the next record is logged
            self.tokens = self.tokens + (mask.sum() if mask is not None else 0 if ids is None else ids.numel())
        return batches, num_items

    def train(self, *args: Any, **kwargs: Any):
        self._plan = None  # arguments may have changed
        self.tokens = self._logged_tokens = 0
        if self.gradient_release is not None:
            refuse_to_release(self)
        try:
            done = super().train(*args, **kwargs)
            if self.cuda_graph is True and self._graphed is not None and not self._graphed.replayed:
                backends.logger().warning("cuda_graph=True replayed no step: too few batches had the same shape.")
            return done
        finally:
            for each in (self._graphed, self._release):
                if each is not None:
                    each.close()
            self._graphed = self._since = self._release = None

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any):
        with self._waiting("the count of labels"):
            return super()._get_num_items_in_batch(*args, **kwargs)

    def _waiting(self, place: str) -> AbstractContextManager[None]:
        """Within, collectives of a sharded model have the timeout of a step, not the longer one of loading."""
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
            # a step without a label counts as not finite, which what is divided by zero is
            release.check(loss if num_items_in_batch is None else loss.detach() / (num_items_in_batch > 0))
            backward(loss, **options)

        self.accelerator.backward = checked
        try:
            return release.run(lambda: self._plain_step(model, copy.copy(inputs), num_items_in_batch))
        finally:
            del self.accelerator.backward

    def _as_one_row(self, inputs: Any, row: dict[str, Any] | None) -> Any:
        """The batch as one row of documents where that saves the base model a synchronization, else unchanged."""
        if row is None or not self._one_row_pays or _is_full(inputs, row):
            return inputs
        return row if self._base.takes_documents(row["input_ids"].shape[1]) else inputs

    def why_not_recorded(self) -> str | None:
        """Why steps cannot be recorded as CUDA graphs, as this trainer is set up, and what to change; or None."""
        return why_not(self)

    def _records(self) -> bool:
        """Whether steps are to be recorded."""
        if self._plan is None:
            why = self.why_not_recorded() if self.cuda_graph else None
            if why and self.cuda_graph is True:
                raise ValueError(f"Steps cannot be recorded with cuda_graph=True: {why}, or set cuda_graph=False.")
            if why:
                self._say(why)
            self._plan = bool(self.cuda_graph) and why is None
        return self._plan and not (self._graphed is not None and self._graphed.gave_up)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            backends.logger().info(f"Steps are not recorded as CUDA graphs: {why}.")

    def _begins_recorded(self, model) -> bool:
        """Whether this step is to be recorded. At the first, all ranks ask whether that may be."""
        if self._records() and self._graphed is None:
            strict = self.cuda_graph is True
            why = None if strict else why_not_auto(self)
            self._plan = not any(*gather_on_hosts(BEGINNING, why is not None))
            if self._plan:
                self._graphed = GraphedStep(model, lambda n, weight, **batch: self._plain_step(model, batch, n), strict)
            else:
                self._say(why or "another rank does not")
        return self._records()

    def _graphed_step(self, model, inputs, row, num_items_in_batch):
        model.train()  # a replay calls neither
        self.optimizer.train()
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=self.args.device)
        batch, few = self._into_bucket(inputs, row)
        weight = getattr(self.accelerator.unwrap_model(model), "mtp_loss_weight", None)  # Python, which may change
        step = self._graphed if few else self._graphed.eager
        return step(n=num_items_in_batch, weight=weight, **self._prepare_inputs(batch))

    def _into_bucket(self, inputs: Mapping[str, Any], row: dict[str, Any] | None) -> tuple[Mapping[str, Any], bool]:
        """The batch of the step, and whether its tokens are few enough to record it. A bucket is that of all ranks."""
        ids: Any = inputs.get("input_ids")
        full = row is not None and _is_full(inputs, row)
        self._usual = ids.shape if full and self._usual is None else self._usual
        stays = CANNOT if row is None else EITHER if full and ids.shape == self._usual else BUCKET
        own = sizes(row) if row is not None else (0 if ids is None else ids.numel(), 0, 0)
        ways, *needs = gather_on_hosts(BEGINNING, stays, *own)
        tokens, documents, longest = map(max, needs)
        if self.cuda_graph == "auto" and tokens > MOST_TOKENS:
            self._say(f"a batch has more than {MOST_TOKENS:,} tokens per GPU, with which the CPU is no limit")
            return self._as_one_row(inputs, row), False
        if row is not None and BUCKET in ways and CANNOT not in ways:
            bucket = bucket_for((tokens, documents, longest), self._buckets)
            if self._base.takes_documents(bucket[0]):
                return pad_to_bucket(row, bucket), True
        return inputs, True

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in transformers, with our AdamW for PyTorch's, which DeepSpeed knows by its class. `optim_args` may say
        its `states` and `offload`; with "matrices=muon" it is our Muon, made of the model.
        """
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        given = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
        ours: dict[str, Any] = {key: given[key] for key in ("states", "offload", "matrices") if key in given}
        if cls is not torch.optim.AdamW or args.deepspeed_plugin or args.device.type not in ("cuda", "cpu"):
            for key in ours:
                raise ValueError(f"optim_args: {key}= is of expertmesh's AdamW, not of {cls.__name__}: remove it.")
            return cls, options
        if "offload" in ours:
            ours["offload"] = ours["offload"].lower() == "true"
        if (matrices := ours.pop("matrices", None)) not in (None, "muon"):
            raise ValueError(f"optim_args: matrices= is muon or left out, not {matrices!r}.")
        own = Muon if matrices else AdamW
        backends.logger().info("optim=%s: expertmesh's %s, which clips as it steps.", args.optim.value, own.__name__)
        if matrices:  # a factory, in transformers' terms
            return (lambda: Muon), options | ours | {"weight_decay": args.weight_decay}
        return AdamW, options | ours

    def _clip_grad_norm(self, model, max_norm: float | None = None) -> Any:
        """The gradients' norm before they are clipped, here or in our optimizer's step; None: transformers' to do."""
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
        """Our optimizer, where it clips the gradients and refuses a step by itself."""
        optimizer = self._torch_optimizer
        return optimizer if isinstance(optimizer, AdamW) and not (self._has_other_format or self._scales_loss) else None

    @property
    def _scales_loss(self) -> bool:
        """Whether float16's loss scaler is on, to which transformers' clipping belongs."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled()

    def _get_grad_norm(self, model, grad_norm=None):
        """The last thing that transformers calls before the optimizer, at every step, clipped or not."""
        if grad_norm is None:
            grad_norm = self._clip_grad_norm(model, math.inf)
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with float16 an infinite gradient is how the loss scaler finds its scale: it skips the step by itself
        watched = 0.0 if self._scales_loss else grad_norm
        refused, optimizer = self._record.start_check(watched), self._own_adamw

        def check(*_: Any) -> None:
            """Raise if the step that is under way had to be refused."""
            if optimizer is not None:
                asking.remove()
                del optimizer.found_inf
            self._ahead.fetch()  # while the device still computes what is checked
            self._record.check(self, watched)

        if optimizer is None:
            check()
        else:
            optimizer.found_inf = refused  # it then changes no weight; the host reads the result while it runs
            asking = optimizer.register_step_post_hook(check)
        return grad_norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        pause = self.control.should_evaluate or self.control.should_save
        if (pause or self.control.should_log) and self.is_distributed_loading_by_transformers:
            gather_on_hosts(f"the end of step {self.state.global_step}")  # what follows may take long
        began = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pause and self._since is not None:  # neither is training
            self._since += time.perf_counter() - max(began, self._since)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a record of training, not of evaluation
            logs |= self.load.window()
            tokens = float(self.tokens)  # the device has been waited for: so the time is that of the work
            now = time.perf_counter()
            seconds = 0.0 if self._since is None else now - self._since
            logs["tokens_per_second"] = round((tokens - self._logged_tokens) / max(seconds, 1e-9), 1)
            self._logged_tokens, self._since = tokens, now
        super().log(logs, start_time)


class _Ahead(Iterator[Any]):
    """Yields what `source` does. After `fetch` the next item is there, or the error in its place, which `next` raises.

    A step waits for the device once; what the next step learns from is collated before, while the device works.
    """

    def __init__(self, source: Iterator[Any]):
        self.source = source
        self._fetched: list[Future[Any]] = []

    def fetch(self) -> None:
        """Get the next item, unless it is there."""
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
    """Whether the rows of a batch hold one document each, and no padding."""
    return sizes(row)[:2] == (inputs["input_ids"].numel(), len(inputs["input_ids"]))


def _numbered(dataset: Any) -> Any:
    """A datasets.Dataset with its row numbers as a column; anything else as it is, and its rows stay unknown."""
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__") or ROW in dataset.column_names:
        return dataset
    return dataset.add_column(ROW, list(range(len(dataset))))
