"""Forward and backward as one CUDA graph, for steps that the GPU runs faster than the CPU can issue them.

A training step is thousands of launches, most of them of the same kernels on the same addresses as in the step before.
`GraphedStep` records them once for each shape of a batch and then replays them with a single launch. With
4,096 tokens per GPU and experts spread over ranks the CPU is the limit otherwise.

What is recorded are launches, not Python. Hooks, printing and lists that grow happen while recording only; a number
that Python passes (`mtp_loss_weight`, say) stays what it was; sums kept in place on the device go on. `Trainer` records
its step with `cuda_graph=True`.
"""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from expertmesh.dispatch import gather, links

WARM_UP = 3  # calls that run as always: kernels are compiled, buffers and streams made
MOST = 4  # shapes that are recorded: each keeps its memory
ACCUMULATING = -1  # in place of a shape; no hash is -1

CANNOT = (
    "This training step cannot be recorded as a CUDA graph: {why}. Something in it waits for the GPU, or depends on "
    "what a batch holds: documents packed into a row (`position_ids`), or a model or loss that looks at values. Leave "
    "that out, or switch recording off (cuda_graph=False)."
)


class GraphedStep:
    """`step(**batch)` does `loss = model(**batch).loss; loss.backward()` and returns the loss, without its graph.

    run: what to do with a batch instead, forward, backward and all, returning the loss; whatever in a batch changes
    from step to step must be a tensor. The first `WARM_UP` batches of a shape run as always, the next is recorded, and
    those after it are replayed, for `MOST` shapes. All ranks must call it at the same time, and shapes are those of all
    ranks' batches together; if on any rank gradients are there already, to be accumulated into, all run it as always.
    Gradients lie at the same addresses in every replay: a copy of one must be made before the next step if it is to be
    kept. The memory of a recorded step stays reserved for it.

    `close()` drops what is recorded. Call it before `destroy_process_group`, which waits for graphs that hold NCCL's
    exchanges: `with contextlib.closing(GraphedStep(model)) as step`. Raises RuntimeError for a step that cannot be
    recorded, and has closed itself then.
    """

    def __init__(self, model: Any, run: Callable[..., torch.Tensor] | None = None) -> None:
        self.model, self.run = model, run or self._forward_backward
        self.replayed = 0  # steps
        self._stream = torch.cuda.Stream()
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __call__(self, **batch: Any) -> torch.Tensor:
        for module in self._sharded:  # an evaluation leaves weights gathered: a replay would neither see nor renew them
            module.reshard()
        fresh = all(parameter.grad is None for parameter in self.model.parameters())
        shapes = _on_all_ranks(_shape_of(self.model.training, batch) if fresh else ACCUMULATING)
        known = shapes in self._recorded or (self._seen[shapes] >= WARM_UP and len(self._recorded) < MOST)
        if not known or ACCUMULATING in shapes:
            self._seen[shapes] += 1
            return self._as_always(batch)
        if shapes in self._recorded and self._recorded[shapes].mailboxes != links.mailboxes():
            self.close()  # larger ones were made, at another place
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(batch)
        self.replayed += 1
        return self._recorded[shapes].replay(batch)

    def close(self) -> None:
        """Drop all recordings. Later calls begin anew."""
        for recorded in self._recorded.values():
            recorded.graph.reset()
        self._recorded.clear()

    def _forward_backward(self, **batch: Any) -> torch.Tensor:
        loss = self.model(**batch).loss
        loss.backward()
        return loss

    def _as_always(self, batch: dict[str, Any]) -> torch.Tensor:
        """On the stream of the recording, as what autograd remembers of parameters belongs to a stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.run(**batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss.detach()

    def _record(self, batch: dict[str, Any]) -> "_Recorded":
        try:
            return _Recorded(self, batch)
        except RuntimeError as error:
            self.close()
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(CANNOT.format(why=str(first).strip().split("\n")[0].rstrip("."))) from error


class _Recorded:
    def __init__(self, step: GraphedStep, batch: dict[str, Any]) -> None:
        self.batch = tree_map_only(torch.Tensor, torch.clone, batch)
        self.mailboxes = links.mailboxes()
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        # other threads look after collectives meanwhile
        with torch.cuda.graph(self.graph, stream=step._stream, capture_error_mode="thread_local"):
            links.settle()  # a replay always begins with the same mailbox, whichever was the last
            self.loss = step.run(**self.batch).detach()
            links.settle()
        self.gradients = [(p, p.grad) for p in step.model.parameters() if p.grad is not None]

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        for mine, x in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            if isinstance(x, torch.Tensor):
                mine.copy_(x)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()


def refuse(trainer: Any) -> None:
    """Raise ValueError if a transformers.Trainer is set up so that its steps cannot be recorded."""
    args, model = trainer.args, trainer.model
    layout = getattr(getattr(model, "config", None), "distributed_config", None)
    dispatch = layout.ep_implementation if layout is not None and (layout.ep_size or 1) > 1 else gather.NAME
    repeats = [getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}) for m in model.modules()]
    repeats.append(args.activation_checkpointing_kwargs or {})
    reasons = {
        f"it needs an NVIDIA GPU, and this run is on {args.device}. Start it on one": args.device.type != "cuda",
        "gradients are accumulated over several microbatches. Set gradient_accumulation_steps=1 and raise "
        "per_device_train_batch_size": args.gradient_accumulation_steps > 1,
        "float16's loss scaler decides by values. Train in bfloat16": trainer.accelerator.scaler is not None,
        "layers are recomputed inside of another backward. Set activation_checkpointing_kwargs={'use_reentrant': "
        "False}": any(options.get("use_reentrant") for options in repeats),
        "torch_empty_cache_steps frees memory. Leave it unset": args.torch_empty_cache_steps is not None,
        "on several GPUs it needs a model that is laid out as it is loaded. Pass distributed_setup= to "
        "from_pretrained": args.n_gpu > 1 or (args.world_size > 1 and not trainer.is_sharded),
        "the CPU waits to hear how many rows this dispatch sends. Load the model with dispatch='gather' (GPUs of a "
        "node)": dispatch != gather.NAME,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"Steps cannot be recorded with cuda_graph=True: {reason}, or set cuda_graph=False.")


def _shape_of(training: bool, batch: dict[str, Any]) -> int:
    """The same number for batches that differ in the values of tensors only."""
    leaves, tree = tree_flatten(dict(sorted(batch.items())))
    return hash(
        (training, str(tree), *((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves))
    )


def _on_all_ranks(number: int) -> tuple[int, ...]:
    """The numbers of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return (number,)
    world: Any = dist.group.WORLD
    answers = [torch.tensor(0) for _ in range(world.size())]
    dist.all_gather(answers, torch.tensor(number), group=links.hosts(world))
    return tuple(map(int, answers))


def _first(error: RuntimeError) -> RuntimeError:
    """What went wrong first: ending a recording that failed raises an error of its own."""
    return _first(error.__context__) if isinstance(error.__context__, RuntimeError) else error
