"""Where every rank stands: data, expert and tensor parallelism from a few sizes.

`DistributedSetup` holds the sizes, checks them against the number of ranks and turns into Transformers'
`DistributedConfig`, which makes the meshes, shards the model and loads each rank's slice of it. Experts are spread over
the ranks that already share the data: 8 GPUs are dp_size=8 and ep_size=8 at once.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
from transformers.distributed.utils import _ensure_torch_distributed

from expertmesh import waiting as limits
from expertmesh.moe import all_to_all, gather
from expertmesh.moe.experts import is_experts
from expertmesh.parallel.ranks import refuse_differences
from expertmesh.waiting import meet, waiting

STRATEGY = "fsdp2"
# how tokens reach experts on other ranks: name -> Transformers' `ep_implementation`
DISPATCH = {"all_to_all": all_to_all.NAME, "gather": gather.NAME}
AUTO = "auto"
_RECOMPUTE = "activation_checkpointing"
_AVERAGED = "_replicated_grad_hook_registered"  # Transformers' name for it
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
    timeout_minutes: how long a rank waits for another in a step; then it ends with an error that names the layer.
        Loading, saving and what else ranks do together may take hours.
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
    timeout_minutes: float = 5.0
    strategy: str = STRATEGY
    world_size: int | None = None

    def __post_init__(self) -> None:
        if self.world_size is None:
            object.__setattr__(self, "world_size", current_world_size())
        for name, (fits, allowed) in _VALUES.items():
            value = getattr(self, name)
            if not fits(value) and not (name == "dp_size" and value is None):
                raise ValueError(f"{name} must be {allowed}, not {value!r}.")
        world, tp, replicas = self.world_size, self.tp_size, self.dp_replicate_size
        assert world is not None
        if world % tp:
            raise ValueError(f"tp_size={tp} does not divide the {world} ranks. Set tp_size to {_divisors(world)}.")
        if self.dp_size is None:
            object.__setattr__(self, "dp_size", world // tp)
        assert self.dp_size is not None
        if self.dp_size * tp != world:
            raise ValueError(
                f"dp_size={self.dp_size} x tp_size={tp} is {self.dp_size * tp}, but there are {world} ranks. "
                f"Leave dp_size out (it then is {world // tp}), or start {self.dp_size * tp} ranks."
            )
        if self.dp_size % replicas:
            raise ValueError(
                f"dp_replicate_size={replicas} does not divide dp_size={self.dp_size} (world_size={world} / "
                f"tp_size={tp}). Set dp_replicate_size to {_divisors(self.dp_size)}."
            )
        ranks = self.fsdp_size * tp
        if self.ep_size > 1 and (ranks % self.ep_size or self.ep_size % tp):
            fitting = [n for n in range(tp, ranks + 1, tp) if ranks % n == 0]
            raise ValueError(
                f"ep_size={self.ep_size} does not fit: experts are spread over the {ranks} ranks of a replica "
                f"(world_size={world} / dp_replicate_size={replicas}), so ep_size must divide "
                f"{ranks} and be a multiple of tp_size={tp}. Set ep_size to {_or([1, *fitting])}."
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

    def join(self) -> None:
        """Start torch.distributed, if nobody has, among as many ranks. Raises RanksError if their setups differ."""
        if current_world_size() > 1:
            _ensure_torch_distributed()
            refuse_differences("distributed_setup", asdict(self))

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
        if current_world_size() == 1:
            return
        limits.patience = timedelta(minutes=self.timeout_minutes)
        for name, module in model.named_modules():
            if not isinstance(module, FSDPModule):
                continue
            if getattr(module, "_is_expert_parallel", False):
                module.set_reshard_after_forward(self.reshard_experts)
            state = vars(module._get_fsdp_state())  # torch 2.11 has one unit there, or None
            for unit in filter(None, state.get("_fsdp_param_groups", [state.get("_fsdp_param_group")])):
                _let_wait(unit, f"the weights of {name or type(model).__name__}")
        model.base_model.register_forward_pre_hook(partial(_before_training, model, set(model.modules())))

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


def _let_wait(unit: Any, place: str) -> None:
    """Make the exchanges of one of FSDP's units `waiting`; one of several modules comes by several times."""
    groups = [getattr(unit.mesh_info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
    for name in ("unshard", "wait_for_unshard", "post_backward"):
        if name not in vars(unit):
            setattr(unit, name, waiting(place, *filter(None, groups))(getattr(unit, name)))


@torch.compiler.disable
def _before_training(model: Any, laid_out: set[torch.nn.Module], base: torch.nn.Module, _: Any) -> None:
    """Before each training forward of a model that is laid out: the ranks meet, and adapters become alike on all.

    PEFT adds these after the layout. FSDP knows nothing of them, so each rank would draw and train its own. They become
    rank 0's, and their gradients are averaged, as by Transformers' Trainer, with whom a mark tells who came first.
    """
    if not (base.training and torch.is_grad_enabled()):
        return
    meet("the beginning of a forward")
    world: Any = dist.group.WORLD
    for place, module in model.named_modules():
        if module in laid_out:
            continue
        if getattr(getattr(module, "base_layer", None), "_is_expert_parallel", False):
            raise ValueError(
                f"{place}: adapters on experts do not work with ep_size > 1, which spreads experts over ranks. Set "
                f"ep_size to 1, or leave target_parameters out and adapt attention by target_modules."
            )
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or hasattr(parameter, _AVERAGED):
                continue
            if not isinstance(parameter, DTensor):
                with waiting(place, world):
                    dist.broadcast(parameter.data, 0)
                parameter.register_post_accumulate_grad_hook(waiting(place, world)(_average))
            elif parameter.device_mesh.size() < world.size():
                raise ValueError(
                    f"{place}: nobody averages adapters that tp_size splits over dp_size. Set tp_size to 1."
                )
            setattr(parameter, _AVERAGED, True)


def _average(parameter: torch.Tensor) -> None:
    dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)


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


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """By type and value: True is not 1, and nothing is asked of tensors."""
    return any(value is one or (type(value) is type(one) and value == one) for one in allowed)


_COUNT = (lambda x: type(x) is int and 1 <= x <= 10**6, "a whole number from 1 to 1,000,000")
# field of a `DistributedSetup` -> (whether a value fits, what fits in words)
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys("world_size ep_size tp_size dp_size dp_replicate_size".split(), _COUNT),
    **dict.fromkeys((_RECOMPUTE, "reshard_experts"), (lambda x: type(x) is bool, "true or false")),
    "timeout_minutes": (lambda x: type(x) in (int, float) and 0 < x <= 10**6, "a number of minutes above 0"),
    "dispatch": (lambda x: _is_one_of(x, (AUTO, *DISPATCH)), f"one of {', '.join((AUTO, *DISPATCH))}"),
    "strategy": (lambda x: x == STRATEGY, f"{STRATEGY!r} (with dp_replicate_size each rank has a copy, as in DDP)"),
}
_OURS = (*"strategy dp_size dp_replicate_size tp_size ep_size timeout_minutes dispatch".split(), _RECOMPUTE, "moe")
# NeMo AutoModel's other keys, with the values that ask for nothing or for what happens anyway
_NEMO_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys("pp_size cp_size fsdp2_forward_prefetch_depth".split(), (1, None)),
    **dict.fromkeys(
        "sequence_parallel enable_async_tensor_parallel enable_compile enable_fsdp2_prefetch".split(), (False, None)
    ),
    **dict.fromkeys("defer_fsdp_grad_sync reshard_after_forward".split(), (True, None)),
    **dict.fromkeys("pipeline tp_plan mp_policy offload_policy autocast_dtype multimodal ranks".split(), (None,)),
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

    Keys: strategy, dp_size, dp_replicate_size, tp_size, ep_size, timeout_minutes, activation_checkpointing (bool or
    "full"), moe: {reshard_after_forward: bool}, and dispatch, which NeMo has not. None leaves a key out. NeMo's other
    keys are accepted at values that ask for what happens anyway. Raises ValueError for any other value of them, and for
    a key that nobody knows.
    """
    section = _keys({} if config is None else config, "", _OURS, _NEMO_KEYS) | _keys(keys, "", _OURS, _NEMO_KEYS)
    moe = _keys(section.pop("moe", {}), "moe.", ("reshard_after_forward",), _NEMO_MOE_KEYS)
    if section.get(_RECOMPUTE) == "full":
        section[_RECOMPUTE] = True
    reshard = moe.get("reshard_after_forward", True)
    if type(reshard) is not bool:
        raise ValueError(f"moe.reshard_after_forward must be true or false, not {reshard!r}.")
    return DistributedSetup(**section, reshard_experts=reshard, world_size=world_size)


def _keys(section: Any, path: str, ours: tuple[str, ...], theirs: dict[str, tuple]) -> dict[str, Any]:
    """Of a section what is ours and not None."""
    if not isinstance(section, dict):
        raise ValueError(f"{path.rstrip('.') or 'The section'} must be a dict of settings, not {section!r}.")
    for key, value in section.items():
        if key in ours:
            continue
        if key not in theirs:
            near = get_close_matches(str(key), [*ours, *theirs], 1, 0)[0]
            raise ValueError(
                f"There is no distributed setting {f'{path}{key}'!r}; did you mean {path + near!r}? "
                f"Settings: {', '.join(path + name for name in ours)}."
            )
        if not _is_one_of(value, theirs[key]):
            raise ValueError(
                f"{path}{key}={value!r} is NeMo AutoModel's and not supported here: leave it out, or set it to "
                f"{' or '.join(map(repr, theirs[key]))}."
            )
    return {key: value for key, value in section.items() if key in ours and value is not None}


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
        if not is_experts(experts):
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
