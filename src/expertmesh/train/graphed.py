"""Forward and backward as one CUDA graph, for steps that the GPU runs faster than the CPU can issue them.

A training step is thousands of launches, most of them of the same kernels on the same addresses as in the step before.
`GraphedStep` records them once for each shape of a batch and then replays them with a single launch. Hooks, prints and
other Python run while recording only; a number that Python passes keeps its value of that time.

Recording a step that synchronizes with the GPU breaks the CUDA context, so the step before is a rehearsal: it runs in
PyTorch's sync debug mode, which warns of every synchronization.
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

WARM_UP = 3  # eager calls of a shape, which compile kernels and make buffers and streams; the last is the rehearsal
MOST = 4  # shapes that are recorded; all share the memory of the largest
MANY = 16  # shapes after which recording ends if fewer than half of the steps were replays
ACCUMULATING = -1  # in place of a shape, as no hash is -1
BEGINNING = "the beginning of a step"

CANNOT = (
    "This training step cannot be recorded as a CUDA graph: {why}. Something in it waits for the GPU, or depends on "
    "what a batch holds: padding or documents that only position_ids tell of, or a model or loss that looks at "
    "values. Leave that out, or switch recording off (cuda_graph=False)."
)
_WAITS = "called a synchronizing CUDA operation"  # PyTorch's words
_broken: list[Any] = []  # graphs whose recording failed: the allocator may still ask them


class GraphedStep:
    """`step(**batch)` does `loss = model(**batch).loss; loss.backward()` and returns the loss, without its graph.

    run: does the whole step on a batch instead. Whatever in a batch changes from step to step must be a tensor. The
    first `WARM_UP` batches of a shape run eagerly, the next is recorded, and later ones are replayed, for up to `MOST`
    shapes. All ranks must call it at the same time: a shape is that of all ranks' batches together, and if any rank
    accumulates into gradients, all ranks run the step eagerly. The next replay, of any shape, overwrites gradients.

    Call `close()` before `destroy_process_group`, which waits for graphs that hold NCCL collectives. Raises
    RuntimeError for a step that cannot be recorded, after closing itself. If not `strict`, it logs a warning instead,
    and later steps run eagerly; so does a shape whose recording would leave no memory for another step.
    """

    def __init__(self, model: Any, run: Callable[..., torch.Tensor] | None = None, strict: bool = True) -> None:
        def forward_backward(**batch: Any) -> torch.Tensor:
            loss = model(**batch).loss
            loss.backward()
            return loss

        self.model, self.run, self.strict = model, run or forward_backward, strict
        self.replayed = 0  # steps
        self.gave_up = False
        self._most = MOST
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __call__(self, **batch: Any) -> torch.Tensor:
        for module in self._sharded:  # an evaluation leaves weights gathered: a replay would neither see nor renew them
            module.reshard()
        fresh = all(parameter.grad is None for parameter in self.model.parameters())
        modes = self.model.training, *(parameter.requires_grad for parameter in self.model.parameters())
        (shapes,) = gather_on_hosts(BEGINNING, _shape_of(modes, batch) if fresh else ACCUMULATING)
        if ACCUMULATING in shapes or self.gave_up:
            return self.eager(**batch)
        self._seen[shapes] += 1
        if not self.strict and len(self._seen) > MANY and 2 * self.replayed < self._seen.total():
            self._end(f"batches come in too many shapes, {len(self._seen)} so far", strict=False)
        if self.gave_up or (shapes not in self._recorded and len(self._recorded) >= self._most):
            return self.eager(**batch)
        if shapes not in self._recorded and self._seen[shapes] <= WARM_UP:
            return self.eager(**batch) if self._seen[shapes] < WARM_UP else self._rehearse(batch)
        if shapes in self._recorded and self._recorded[shapes].mailboxes != links.mailboxes():
            self.close()  # larger ones were made, at another place
        if shapes not in self._recorded and not self._record(shapes, batch):
            return self.eager(**batch)
        self.replayed += 1
        return self._recorded[shapes].replay(batch)

    def close(self) -> None:
        """Drop all recordings. Later calls begin anew."""
        for recorded in self._recorded.values():
            recorded.close()
        self._recorded.clear()

    def eager(self, **batch: Any) -> torch.Tensor:
        """The step, run eagerly. On the recording's stream: autograd ties a parameter's AccumulateGrad to a stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.run(**batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss.detach()

    def _rehearse(self, batch: dict[str, Any]) -> torch.Tensor:
        """The step, run eagerly, while looking for what would make its recording fail."""
        with _watching() as waits:
            loss = self.eager(**batch)
        if any(*gather_on_hosts(BEGINNING, len(waits))):
            self._end(f"it waits for the GPU in {waits[0]}" if waits else "another rank waits for its GPU", self.strict)
        elif not self.strict and any(*gather_on_hosts(BEGINNING, not _has_room())):
            self._most = len(self._recorded)
            if not self._most:
                self._end("there is not the memory of a step to spare", strict=False)
        return loss

    def _record(self, shapes: tuple[int, ...], batch: dict[str, Any]) -> bool:
        """Record the step, unless that fails."""
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            self._recorded[shapes] = _Recorded(self, batch)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # which ending a recording that failed does not
            first = error
            while isinstance(first.__context__, RuntimeError):  # ending it raises an error of its own
                first = first.__context__
            self.model.zero_grad()  # what was to be filled by replays
            if self.strict and isinstance(first, torch.OutOfMemoryError):
                self.close()
                raise first from None
            # other ranks may have gone on, and what FSDP gathered while recording was never filled
            alone = not self._sharded and ranks.world_size() == 1
            self._end(str(first).strip().split("\n")[0].rstrip("."), self.strict or not alone, error)
        return shapes in self._recorded

    def _end(self, why: str, strict: bool, error: RuntimeError | None = None) -> None:
        self.close()
        if strict:
            raise RuntimeError(CANNOT.format(why=why)) from error
        self.gave_up = True
        backends.logger().warning(f"Steps are no more recorded as CUDA graphs, and run as always: {why}.")


class _Recorded:
    def __init__(self, step: GraphedStep, batch: dict[str, Any]) -> None:
        device = next(step.model.parameters()).device  # a graph would keep the value of a count that lies on the CPU
        self.batch = tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), batch)
        self.mailboxes = links.mailboxes()
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        _broken.append(self.graph)
        # other threads look after collectives meanwhile
        with torch.cuda.graph(self.graph, step._pool, step._stream, capture_error_mode="thread_local"):
            links.mailbox_barrier()  # a replay always begins with the same mailbox, whichever was the last
            self.loss = step.run(**self.batch).detach()
            links.mailbox_barrier()
        _broken.remove(self.graph)
        self.gradients = [(p, _not_owned(p.grad)) for p in step.model.parameters() if p.grad is not None]

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        for mine, x in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            if isinstance(x, torch.Tensor):
                mine.copy_(x)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()

    def close(self) -> None:
        for parameter, gradient in self.gradients:
            if parameter.grad is gradient:  # its memory goes with the graph
                parameter.grad = gradient.clone()
        self.graph.reset()


def _not_owned(x: torch.Tensor) -> torch.Tensor:
    """The same memory, which the allocator of recordings may hand out again: to the recordings of other shapes.

    No eager step gets memory of that allocator, and only one shape is replayed at a time.
    """
    if isinstance(x, DTensor):
        local, placed = _not_owned(x.to_local()), (x.device_mesh, x.placements)
        return DTensor.from_local(local, *placed, run_check=False, shape=x.shape, stride=x.stride())
    owner = x.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(owner.data_ptr(), x.device, owner.nbytes())
    return x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())


KNOWN = {"expertmesh", "torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "liger_kernel"}


def why_not_auto(trainer: Any) -> str | None:
    """Why steps that could be recorded should not be unless asked for: user code that may have to run at every step."""
    own = {"compute_loss_func": trainer.compute_loss_func} if trainer.compute_loss_func is not None else {}
    code = own | {name: getattr(type(trainer), name) for name in ("compute_loss", "training_step")}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in trainer.model.named_modules():
        code |= {f"a hook on {name}": hook for kind in kinds for hook in getattr(module, kind).values()}
    for name, parameter in trainer.model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"the gradient of {name} is used within the backward. Set cuda_graph=True if that can be recorded"
        code |= {f"a hook on {name}": hook for hook in (parameter._backward_hooks or {}).values()}
    for name, function in code.items():
        function = getattr(function, "func", function)  # of a functools.partial
        if (getattr(function, "__module__", None) or "").partition(".")[0] not in KNOWN:
            why = f"{name} is your code, and its Python would run while recording only"
            return f"{why}. If that does, set cuda_graph=True"
    return None


@contextmanager
def _watching() -> Iterator[list[str]]:
    """Yields a list that is filled at the end: the places where the CPU waited for the GPU. Code that asks whether a
    stream is capturing, as Transformers' masks do, is told yes."""
    before, asked, waits = torch.cuda.get_sync_debug_mode(), torch.cuda.is_current_stream_capturing, list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_current_stream_capturing = lambda: True
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.is_current_stream_capturing = asked
    for warning in caught:
        if _WAITS in str(warning.message):
            waits.append(f"{warning.filename}, line {warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def why_not(trainer: Any) -> str | None:
    """Why steps of a transformers.Trainer cannot be recorded, as it is set up, and what to change; or None."""
    args, model = trainer.args, trainer.model
    layout = getattr(getattr(model, "config", None), "distributed_config", None)
    waits = layout is not None and (layout.ep_size or 1) > 1 and layout.ep_implementation != Gather.ep_implementation
    asked = args.activation_checkpointing_kwargs or {}
    again = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    repeats = [asked, *(getattr(function, "keywords", {}) for function in again)]
    offloads = asked.get("offload") or "offload" in str(asked.get("recompute"))
    offloads = offloads or any(isinstance(function, Offload) for function in again)
    reasons = {
        f"it needs an NVIDIA GPU, and this run is on {args.device}. Start it on one": args.device.type != "cuda",
        "weights are updated within backward, and a replay is of gradients alone. Leave gradient_release out": (
            trainer.gradient_release is not None
        ),
        "layers are recomputed inside of another backward. Set activation_checkpointing_kwargs={'use_reentrant': "
        "False}": any(options.get("use_reentrant") for options in repeats),
        "inputs of layers go to host memory. Recompute them without offloading": offloads,
        "torch_empty_cache_steps frees memory. Leave it unset": args.torch_empty_cache_steps is not None,
        "the CPU waits for what this dispatch sends. Load the model with dispatch='gather' (GPUs of a node)": waits,
    }
    return next((reason for reason, holds in (reasons | whole_steps_only(trainer)).items() if holds), None)


def _has_room() -> bool:
    """Whether there is memory for a step beside those recorded: for other shapes, and evaluation."""
    free, _ = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    spare = free + torch.cuda.memory_reserved() - allocated
    return spare >= 2 * (torch.cuda.max_memory_allocated() - allocated)


def _shape_of(modes: tuple[bool, ...], batch: dict[str, Any]) -> int:
    """The same number for batches that differ in the values of tensors only."""
    leaves, tree = tree_flatten(dict(sorted(batch.items())))
    return hash((modes, str(tree), *((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)))
