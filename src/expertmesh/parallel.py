"""Where every rank stands: data, expert and tensor parallelism from a few sizes.

`DistributedSetup` holds the sizes, checks them against the number of ranks and turns into Transformers'
`DistributedConfig`, which makes the meshes, shards the model and loads each rank's slice of it. Experts are spread over
the ranks that already share the data: 8 GPUs are dp_size=8 and ep_size=8 at once.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

from expertmesh.dispatch import all_to_all, gather

STRATEGY = "fsdp2"
# how tokens reach experts on other ranks: name -> Transformers' `ep_implementation`
DISPATCH = {"all_to_all": all_to_all.NAME, "gather": gather.NAME}
AUTO = "auto"
NEAR = 8  # ranks up to which "auto" gathers


@dataclass(frozen=True)
class DistributedSetup:
    """How a model is laid out over the ranks. Sizes that are not given follow from the number of ranks.

    ep_size: ranks that share out the experts; each holds 1/ep_size of every layer's. Costs no data parallelism.
    tp_size: ranks that share one batch and split attention and dense layers.
    dp_size: ranks with a batch of their own; by default all ranks / tp_size.
    dp_replicate_size: copies of the model (HSDP); each is sharded over dp_size / dp_replicate_size ranks.
    activation_checkpointing: recompute every layer in the backward instead of keeping its activations.
    reshard_experts: free the gathered expert weights after a layer's forward and gather them again in its backward;
        has an effect if an expert is sharded, that is if ep_size is smaller than a replica's ranks.
    dispatch: how tokens reach experts on other ranks. "auto": where groups lie on GPUs of one node, "gather" up to an
        ep_size of 8, else "all_to_all". "all_to_all": once to each rank that needs them, any number of ranks; the host
        waits once per layer for the counts. "gather": to all ranks of the expert-parallel group; the host never waits
        for the device.
    strategy: "fsdp2"; there is no other.
    world_size: ranks; by default those of torch.distributed, else WORLD_SIZE, else 1.

    Raises ValueError if the sizes do not fit each other or the number of ranks.
    """

    ep_size: int = 1
    tp_size: int = 1
    dp_size: int | None = None
    dp_replicate_size: int = 1
    activation_checkpointing: bool = False
    reshard_experts: bool = True
    dispatch: str = AUTO
    strategy: str = STRATEGY
    world_size: int | None = None

    def __post_init__(self) -> None:
        if self.strategy != STRATEGY:
            raise ValueError(
                f"There is no strategy {self.strategy!r}; the strategy is {STRATEGY!r}. For a whole copy on each rank, "
                f"as in DDP, set dp_replicate_size to the number of ranks."
            )
        if self.world_size is None:
            object.__setattr__(self, "world_size", current_world_size())
        for name in ("world_size", "ep_size", "tp_size", "dp_size", "dp_replicate_size"):
            size = getattr(self, name)
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}.")
        if self.dispatch not in (AUTO, *DISPATCH):
            raise ValueError(f"dispatch={self.dispatch!r} is unknown. Set it to {', '.join((AUTO, *DISPATCH))}.")
        self._check_dense()
        self._check_experts()

    def _check_dense(self) -> None:
        world, tp, replicas = self.world_size, self.tp_size, self.dp_replicate_size
        assert world is not None
        if world % tp:
            raise ValueError(f"tp_size={tp} does not divide the {world} ranks. Set tp_size to {_divisors(world)}.")
        if self.dp_size is None:
            object.__setattr__(self, "dp_size", world // tp)
        elif self.dp_size * tp != world:
            raise ValueError(
                f"dp_size={self.dp_size} x tp_size={tp} is {self.dp_size * tp}, but there are {world} ranks. "
                f"Leave dp_size out (it then is {world // tp}), or start {self.dp_size * tp} ranks."
            )
        assert self.dp_size is not None
        if self.dp_size % replicas:
            raise ValueError(
                f"dp_replicate_size={replicas} does not divide dp_size={self.dp_size} (world_size={world} / "
                f"tp_size={tp}). Set dp_replicate_size to {_divisors(self.dp_size)}."
            )

    def _check_experts(self) -> None:
        ranks = self.fsdp_size * self.tp_size
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0 and n % self.tp_size == 0]
        if self.ep_size > 1 and self.ep_size not in fitting:
            raise ValueError(
                f"ep_size={self.ep_size} does not fit: experts are spread over the {ranks} ranks of a replica "
                f"(world_size={self.world_size} / dp_replicate_size={self.dp_replicate_size}), so ep_size must divide "
                f"{ranks} and be a multiple of tp_size={self.tp_size}. Set ep_size to {_or([1, *fitting])}."
            )

    @property
    def fsdp_size(self) -> int:
        """Ranks that a replica's dense parameters are sharded over."""
        assert self.dp_size is not None
        return self.dp_size // self.dp_replicate_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that each expert's parameters are sharded over."""
        return self.fsdp_size * self.tp_size // self.ep_size

    def to_transformers(self, ep_implementation: str | None = None) -> DistributedConfig:
        """The same as Transformers' `DistributedConfig`. Raises ValueError if the number of ranks has changed."""
        ranks = current_world_size()
        if ranks != self.world_size:
            raise ValueError(
                f"This DistributedSetup is for {self.world_size} ranks, but {ranks} are running. Start "
                f"{self.world_size} (torchrun --nproc-per-node {self.world_size}), or make the setup for {ranks}."
            )
        return DistributedConfig(
            fsdp_size=self.fsdp_size,
            dp_replicate_size=self.dp_replicate_size,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            ep_implementation=ep_implementation or DISPATCH[self._dispatch()],
        )

    def _dispatch(self) -> str:
        """The dispatch that is asked for, or the one that fits: groups are ranks one behind the other."""
        if self.dispatch != AUTO:
            return self.dispatch
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", current_world_size()))
        near = torch.cuda.is_available() and per_node % self.ep_size == 0 and self.ep_size <= NEAR
        return "gather" if near else "all_to_all"

    def apply_to(self, model: Any) -> None:
        """What the setup asks of a model that is laid out already: checkpointing, and when experts are freed."""
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()
        for module in model.modules():
            if getattr(module, "_is_expert_parallel", False) and isinstance(module, FSDPModule):
                module.set_reshard_after_forward(self.reshard_experts)

    def __str__(self) -> str:
        """The mesh as text: a column for each rank, and which batch, copy and part of the model it holds."""
        world = self.world_size
        assert world is not None
        per_replica = self.fsdp_size * self.tp_size
        rows = {"rank": list(range(world)), "batch": [r // self.tp_size for r in range(world)]}
        if self.dp_replicate_size > 1:
            rows["replica"] = [r // per_replica for r in range(world)]
        if self.tp_size > 1:
            rows["tp part"] = [r % self.tp_size for r in range(world)]
        if self.ep_size > 1:
            rows["experts"] = [r % self.ep_size for r in range(world)]
        if self.ep_size > 1 and self.efsdp_size > 1:
            rows["shard of them"] = [r % per_replica // self.ep_size for r in range(world)]
        width = len(str(world - 1))
        lines = [
            f"{world} rank{'s' * (world > 1)}: dp_size={self.dp_size} (dp_replicate_size={self.dp_replicate_size} x "
            f"fsdp {self.fsdp_size}), tp_size={self.tp_size}, ep_size={self.ep_size}"
        ]
        for first in range(0, world, 16):
            for name, values in rows.items():
                lines.append(f"{name:>13}  " + " ".join(f"{v:>{width}}" for v in values[first : first + 16]))
        return "\n".join(lines)


def current_world_size() -> int:
    """How many ranks this run has."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def _divisors(n: int) -> str:
    return _or([d for d in range(1, n + 1) if n % d == 0])


def _or(numbers: Iterable[int]) -> str:
    *first, last = sorted(set(numbers))
    return f"{', '.join(map(str, first))} or {last}" if first else str(last)


_OURS = tuple("strategy dp_size dp_replicate_size tp_size ep_size activation_checkpointing moe dispatch".split())
# NeMo AutoModel's other keys, with the values that ask for nothing or for what happens anyway
_NEMO_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys("pp_size cp_size fsdp2_forward_prefetch_depth".split(), (1, None)),
    **dict.fromkeys(
        "sequence_parallel enable_async_tensor_parallel enable_compile enable_fsdp2_prefetch".split(), (False, None)
    ),
    **dict.fromkeys("defer_fsdp_grad_sync reshard_after_forward".split(), (True, None)),
    **dict.fromkeys("pipeline tp_plan mp_policy offload_policy autocast_dtype multimodal".split(), (None,)),
    **dict.fromkeys("timeout_minutes ranks".split(), (None,)),
    "fsdp2_backward_prefetch_depth": (2, None),
    "activation_checkpointing_scope": ("all", None),
    "patch_is_packed_sequence": (False, True, None),
}
_NEMO_MOE_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys("ignore_router_for_ac wrap_outer_model".split(), (True, None)),
    **dict.fromkeys("lm_head_precision mp_policy".split(), (None,)),
}


def create_distributed_setup_from_config(
    config: dict[str, Any] | None = None, world_size: int | None = None, **keys: Any
) -> DistributedSetup:
    """The `DistributedSetup` of a `distributed` section with NeMo AutoModel's keys, as a dict or keywords.

    Keys: strategy, dp_size, dp_replicate_size, tp_size, ep_size, activation_checkpointing (bool or "full"),
    moe: {reshard_after_forward: bool}, and dispatch, which NeMo has not. A size of None follows from the others. NeMo's
    other keys are accepted at values that ask for what happens anyway. Raises ValueError for any other value of them,
    and for a key that nobody knows.
    """
    section = {**(config or {}), **keys}
    moe = section.get("moe") or {}
    _refuse_keys(section, "", _OURS, _NEMO_KEYS)
    _refuse_keys(moe, "moe.", ("reshard_after_forward",), _NEMO_MOE_KEYS)
    recompute = section.get("activation_checkpointing") or False
    if recompute not in (True, False, "full"):
        raise ValueError(f"activation_checkpointing={recompute!r} is not supported; it is false, true or 'full'.")
    sizes = {name: section[name] for name in _OURS if name.endswith("_size") and section.get(name) is not None}
    reshard = moe.get("reshard_after_forward")
    return DistributedSetup(
        **sizes,
        activation_checkpointing=bool(recompute),
        reshard_experts=True if reshard is None else reshard,
        dispatch=section.get("dispatch") or AUTO,
        strategy=section.get("strategy") or STRATEGY,
        world_size=world_size,
    )


def _refuse_keys(section: dict[str, Any], path: str, ours: tuple[str, ...], theirs: dict[str, tuple]) -> None:
    for key, value in section.items():
        if key in ours:
            continue
        if key not in theirs:
            known = [*ours, *theirs]
            near = get_close_matches(key, known, 1, 0)[0]
            raise ValueError(
                f"There is no distributed setting {path + key!r}; did you mean {path + near!r}? "
                f"Settings: {', '.join(path + name for name in ours)}."
            )
        if value not in theirs[key]:
            raise ValueError(
                f"{path}{key}={value!r} is NeMo AutoModel's and not supported here: leave it out, or set it to "
                f"{' or '.join(map(repr, theirs[key]))}."
            )


def as_setup(setup: DistributedSetup | dict[str, Any]) -> DistributedSetup:
    """A `DistributedSetup`, or the section that describes one. Raises TypeError for anything else."""
    if isinstance(setup, dict):
        return create_distributed_setup_from_config(setup)
    if not isinstance(setup, DistributedSetup):
        raise TypeError(f"distributed_setup must be a DistributedSetup or a dict, not {type(setup).__name__}.")
    return setup


def refuse_unfit_shards(model: PreTrainedModel, layout: Any) -> None:
    """Raise ValueError, on every rank alike and before anything is loaded, if heads or experts do not fit `layout`.

    tp_size must divide the heads, ep_size the experts. And where a checkpoint keeps one tensor per expert,
    Transformers' loader crashes on a rank that gets none of them (it stacks an empty list) while the others wait; all
    other empty shards work.
    """
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", None) or 1
    if get_kv_heads_per_rank(model.tp_plan, heads, layout.tp_size) is None:
        raise ValueError(
            f"tp_size={layout.tp_size} does not divide the {heads} key-value heads of {type(model).__name__}. "
            f"Set tp_size to {_divisors(heads if isinstance(heads, int) else math.gcd(*heads))}."
        )
    conversions = get_model_conversion_mapping(model)
    operations = [op for c in conversions if isinstance(c, WeightConverter) for op in c.operations]
    one_by_one = any(isinstance(op, MergeModulelist) for op in operations)
    replica = layout.fsdp_size * layout.tp_size

    def fits(num_experts: int, ep_size: int) -> bool:
        sharding = replica // ep_size if ep_size > 1 else layout.fsdp_size
        held, rest = divmod(num_experts, ep_size)
        covered = -(-held // sharding) * (sharding - 1)  # by all shards but the last, which gets what is left
        return rest == 0 and (not one_by_one or covered < held)

    for name, experts in model.named_modules():
        if not hasattr(experts, "is_concatenated"):
            continue
        first, num_experts = next((n, p.shape[0]) for n, p in experts.named_parameters())
        if not fits(num_experts, layout.ep_size):
            sizes = [n for n in range(1, replica + 1) if replica % n == 0 and (n == 1 or n % layout.tp_size == 0)]
            sizes = [n for n in sizes if fits(num_experts, n)]
            raise ValueError(
                f"{num_experts} experts ({name}.{first}) cannot be spread over the {replica} ranks of a replica with "
                f"ep_size={layout.ep_size}: they do not divide evenly, or some rank would get none. "
                + (f"Set ep_size to {_or(sizes)}." if sizes else "Raise dp_replicate_size: replicas get smaller.")
            )


def refuse_replicas(model: torch.nn.Module) -> NoReturn:
    """A fused model's `_replicate_for_data_parallel`, by which nn.DataParallel copies it before its first forward.

    transformers.Trainer wraps a model so when one process sees several GPUs. Raises ValueError.
    """
    gpus = max(2, torch.cuda.device_count())
    raise ValueError(
        f"{type(model).__name__} would be copied to {gpus} GPUs in every forward, as one process sees them all and "
        f"Trainer then wraps models in nn.DataParallel. expertmesh runs one process per GPU. Start them with torchrun "
        f"--nproc-per-node {gpus} script.py, or let one process see one GPU: CUDA_VISIBLE_DEVICES=0 python script.py."
    )
