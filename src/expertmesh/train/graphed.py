"""Record forward and backward as one CUDA graph, for steps whose kernels run faster than the CPU launches them.

`GraphedStep` records the kernels once for each batch shape and then replays them with a single launch. Hooks, prints
and other Python code run only during recording. A Python number that a kernel gets keeps the value it had then.

Recording a step that synchronizes with the GPU breaks the CUDA context. Therefore the step before is a rehearsal: it
runs in PyTorch's sync debug mode, which warns at every synchronization.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from expertmesh import backends
from expertmesh.memory.offload import Offload
from expertmesh.moe import gather as links
from expertmesh.moe.gather import Gather
from expertmesh.parallel import ranks
from expertmesh.timeouts import gather_on_hosts
from expertmesh.train.guard import whole_steps_only

WARM_UP = 3  # eager steps per shape, which compile kernels and create buffers and streams; the last is the rehearsal
MAX_GRAPHS = 4  # shapes that are recorded; all share the memory of the largest
MANY_SHAPES = 16  # with more shapes, recording ends if fewer than half of the steps were replays
ACCUMULATING = -1  # sent instead of a shape's hash, which is never -1
BEGINNING = "the beginning of a step"

CANNOT = (
    "This training step cannot be recorded as a CUDA graph: {why}. Something in it waits for the GPU, or depends on "
    "the values in a batch: padding or documents that only position_ids mark, or a model or loss that reads "
    "values. Leave that out, or switch recording off (cuda_graph=False)."
)
_SYNC_WARNING = "called a synchronizing CUDA operation"  # PyTorch's text
_broken: list[Any] = []  # graphs whose recording failed: they stay alive, as the allocator may still refer to them


class GraphedStep:
    """`step(**batch)` runs `loss = model(**batch).loss; loss.backward()` and returns the detached loss.

    run: replaces that forward and backward. Everything in a batch that changes from step to step must be a tensor. The
    first `WARM_UP` batches of a shape run eagerly, the next is recorded and later ones are replayed, for up to
    `MAX_GRAPHS` shapes. All ranks must call it together: a shape comprises the batches of all ranks. If any rank has
    gradients to accumulate into, all ranks run eagerly. The next replay, of any shape, overwrites the gradients.

    Call `close()` before `destroy_process_group`, which waits for graphs with NCCL collectives. A step that cannot be
    recorded raises RuntimeError, after `close()`. With `strict=False` it logs a warning instead and later steps run
    eagerly; so do shapes whose graph would leave no memory for another step.
    """

    def __init__(self, model: Any, run: Callable[..., torch.Tensor] | None = None, strict: bool = True) -> None:
        def forward_backward(**batch: Any) -> torch.Tensor:
            loss = model(**batch).loss
            loss.backward()
            return loss

        self.model, self.run, self.strict = model, run or forward_backward, strict
        self.replayed = 0  # steps
        self.gave_up = False
        self._max_graphs = MAX_GRAPHS
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __call__(self, **batch: Any) -> torch.Tensor:
        for module in self._sharded:  # evaluation leaves weights unsharded; a replay would neither use nor update them
            module.reshard()
        no_grads = all(parameter.grad is None for parameter in self.model.parameters())
        modes = self.model.training, *(parameter.requires_grad for parameter in self.model.parameters())
        (shapes,) = gather_on_hosts(BEGINNING, _shape_of(modes, batch) if no_grads else ACCUMULATING)
        if ACCUMULATING in shapes or self.gave_up:
            return self.eager(**batch)
        self._counts[shapes] += 1
        if not self.strict and len(self._counts) > MANY_SHAPES and 2 * self.replayed < self._counts.total():
            self._end(f"batches come in too many shapes, {len(self._counts)} so far", strict=False)
        if self.gave_up or (shapes not in self._recorded and len(self._recorded) >= self._max_graphs):
            return self.eager(**batch)
        if shapes not in self._recorded and self._counts[shapes] <= WARM_UP:
            return self.eager(**batch) if self._counts[shapes] < WARM_UP else self._rehearse(batch)
        if shapes in self._recorded and self._recorded[shapes].mailboxes != links.mailboxes():
            self.close()  # larger mailboxes were allocated, at other addresses
        if shapes not in self._recorded and not self._record(shapes, batch):
            return self.eager(**batch)
        self.replayed += 1
        return self._recorded[shapes].replay(batch)

    def close(self) -> None:
        """Free all graphs. Later calls start over with the warm-up."""
        for recorded in self._recorded.values():
            recorded.close()
        self._recorded.clear()

    def eager(self, **batch: Any) -> torch.Tensor:
        """Run the step eagerly, on the capture stream: autograd ties a parameter's AccumulateGrad to its stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.run(**batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss.detach()

    def _rehearse(self, batch: dict[str, Any]) -> torch.Tensor:
        """Run the step eagerly and detect what would make its recording fail."""
        with _detect_syncs() as waits:
            loss = self.eager(**batch)
        if any(*gather_on_hosts(BEGINNING, len(waits))):
            self._end(f"it waits for the GPU in {waits[0]}" if waits else "another rank waits for its GPU", self.strict)
        elif not self.strict and any(*gather_on_hosts(BEGINNING, not _has_room())):
            self._max_graphs = len(self._recorded)
            if not self._max_graphs:
                self._end("there is no memory left for a second step's tensors", strict=False)
        return loss

    def _record(self, shapes: tuple[int, ...], batch: dict[str, Any]) -> bool:
        """Record the step and return whether that succeeded."""
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            self._recorded[shapes] = _Recorded(self, batch)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture does not restore it
            first = error
            while isinstance(first.__context__, RuntimeError):  # ending a failed capture raises another error
                first = first.__context__
            self.model.zero_grad()  # these gradients are uninitialized: only a replay fills them
            if self.strict and isinstance(first, torch.OutOfMemoryError):
                self.close()
                raise first from None
            # an eager retry is unsafe: other ranks may be ahead, and weights gathered during capture were never filled
            can_continue = not self._sharded and ranks.world_size() == 1
            self._end(str(first).strip().split("\n")[0].rstrip("."), self.strict or not can_continue, error)
        return shapes in self._recorded

    def _end(self, why: str, strict: bool, error: RuntimeError | None = None) -> None:
        self.close()
        if strict:
            raise RuntimeError(CANNOT.format(why=why)) from error
        self.gave_up = True
        backends.logger().warning(f"CUDA graphs are switched off, and steps run eagerly: {why}.")


class _Recorded:
    def __init__(self, step: GraphedStep, batch: dict[str, Any]) -> None:
        device = next(step.model.parameters()).device  # move everything there: a graph would freeze values on the CPU
        self.batch = tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), batch)
        self.mailboxes = links.mailboxes()
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        _broken.append(self.graph)
        # thread_local: NCCL's watchdog threads make CUDA calls during the capture
        with torch.cuda.graph(self.graph, step._pool, step._stream, capture_error_mode="thread_local"):
            links.mailbox_barrier()  # a replay always begins with the same mailbox, no matter which was used last
            self.loss = step.run(**self.batch).detach()
            links.mailbox_barrier()
        _broken.remove(self.graph)
        self.gradients = [(p, _not_owned(p.grad)) for p in step.model.parameters() if p.grad is not None]

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        for static, x in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            if isinstance(x, torch.Tensor):
                static.copy_(x)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()

    def close(self) -> None:
        for parameter, gradient in self.gradients:
            if parameter.grad is gradient:  # its memory is freed with the graph
                parameter.grad = gradient.clone()
        self.graph.reset()


def _not_owned(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the same memory that does not own it, so that graphs of other shapes can reuse the memory.

    This is safe because eager steps never allocate from the graphs' pool and only one graph is replayed at a time.
    """
    if isinstance(x, DTensor):
        local, layout = _not_owned(x.to_local()), (x.device_mesh, x.placements)
        return DTensor.from_local(local, *layout, run_check=False, shape=x.shape, stride=x.stride())
    original = x.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(original.data_ptr(), x.device, original.nbytes())
    return x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())


SAFE_PACKAGES = {"expertmesh", "torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "liger_kernel"}


def why_not_auto(trainer: Any) -> str | None:
    """Return why cuda_graph="auto" does not record: user code that may have to run at every step. None if it may."""
    loss_func = {"compute_loss_func": trainer.compute_loss_func} if trainer.compute_loss_func is not None else {}
    code = loss_func | {name: getattr(type(trainer), name) for name in ("compute_loss", "training_step")}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in trainer.model.named_modules():
        code |= {f"a hook on {name}": hook for kind in kinds for hook in getattr(module, kind).values()}
    for name, parameter in trainer.model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"the gradient of {name} is used within the backward. Set cuda_graph=True if that can be recorded"
        code |= {f"a hook on {name}": hook for hook in (parameter._backward_hooks or {}).values()}
    for name, function in code.items():
        function = getattr(function, "func", function)  # unwrap functools.partial
        if (getattr(function, "__module__", None) or "").partition(".")[0] not in SAFE_PACKAGES:
            why = f"{name} is your code, and its Python would run only during recording"
            return f"{why}. If that is enough, set cuda_graph=True"
    return None


@contextmanager
def _detect_syncs() -> Iterator[list[str]]:
    """Yield a list that, on exit, has the source lines where the CPU waited for the GPU. Code inside sees
    `is_current_stream_capturing()` as True, so that Transformers' masks take the same branch as in a capture."""
    before, original, waits = torch.cuda.get_sync_debug_mode(), torch.cuda.is_current_stream_capturing, list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_current_stream_capturing = lambda: True
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.is_current_stream_capturing = original
    for warning in caught:
        if _SYNC_WARNING in str(warning.message):
            waits.append(f"{warning.filename}, line {warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def why_not(trainer: Any) -> str | None:
    """Return why steps of a transformers.Trainer cannot be recorded in this setup, and what to change; else None."""
    args, model = trainer.args, trainer.model
    layout = getattr(getattr(model, "config", None), "distributed_config", None)
    waits = layout is not None and (layout.ep_size or 1) > 1 and layout.ep_implementation != Gather.ep_implementation
    checkpointing = args.activation_checkpointing_kwargs or {}
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    options_of_all = [checkpointing, *(getattr(function, "keywords", {}) for function in functions)]
    offloads = checkpointing.get("offload") or "offload" in str(checkpointing.get("recompute"))
    offloads = offloads or any(isinstance(function, Offload) for function in functions)
    reasons = {
        f"it needs an NVIDIA GPU, and this run is on {args.device}. Start it on one": args.device.type != "cuda",
        "weights are updated in the backward, and a graph only computes gradients. Leave gradient_release out": (
            trainer.gradient_release is not None
        ),
        "reentrant checkpointing is nested backward. Set activation_checkpointing_kwargs={'use_reentrant': False}": any(
            options.get("use_reentrant") for options in options_of_all
        ),
        "inputs of layers are offloaded to host memory. Recompute them without offloading": offloads,
        "torch_empty_cache_steps frees memory. Leave it unset": args.torch_empty_cache_steps is not None,
        "the CPU waits for the sizes of the all-to-all. Load the model with dispatch='gather' (GPUs of a node)": waits,
    }
    return next((reason for reason, holds in (reasons | whole_steps_only(trainer)).items() if holds), None)


def _has_room() -> bool:
    """Whether an eager step, of another shape or of evaluation, still fits in memory next to the graphs."""
    free, _ = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    available = free + torch.cuda.memory_reserved() - allocated
    return available >= 2 * (torch.cuda.max_memory_allocated() - allocated)


def _shape_of(modes: tuple[bool, ...], batch: dict[str, Any]) -> int:
    """Return a hash that is the same for batches that differ only in the values of their tensors."""
    leaves, tree = tree_flatten(dict(sorted(batch.items())))
    return hash((modes, str(tree), *((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)))
