"""The sizes of data, expert and tensor parallelism.

`DistributedSetup` checks the sizes against the number of ranks and converts to Transformers' `DistributedConfig`, from
which Transformers makes the meshes, shards the model and loads each rank's shard. Expert parallelism uses the ranks of
data parallelism: 8 GPUs can have dp_size=8 and ep_size=8.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
from transformers.distributed.utils import _ensure_torch_distributed

from expertmesh import timeouts
from expertmesh.kernels.packed import Packed
from expertmesh.kernels.recompute import POLICIES, Policy, is_policy
from expertmesh.moe.experts import TRANSPORTS, is_experts
from expertmesh.parallel.layout import prepare_for_training
from expertmesh.parallel.ranks import check_same_on_all_ranks

STRATEGY = "fsdp2"
AUTO = "auto"
NEAR = 8  # the largest ep_size for which dispatch="auto" takes "gather"
WHOLE = (True, "full")  # policies of activation checkpointing that Transformers implements


@dataclass(frozen=True)
class DistributedSetup:
    """The layout of a model over the ranks.

    ep_size: expert-parallel ranks; each holds 1/ep_size of every layer's experts. It does not reduce data parallelism.
    tp_size: ranks that share one batch and split attention and dense layers.
    dp_size: ranks with different batches; by default world_size / tp_size.
    dp_replicate_size: replicas of the model (HSDP); each is sharded over dp_size / dp_replicate_size ranks.
    activation_checkpointing: what layers recompute in the backward; True, or a policy of kernels/recompute.py.
    reshard_experts: free the gathered expert weights after a layer's forward and gather them again in its backward.
        It has an effect only if FSDP shards experts, that is if ep_size is smaller than the ranks of a replica.
    dispatch: "all_to_all" sends a token once to each rank that needs it; the host waits once per layer for the counts.
        "gather" sends tokens to all ranks of the expert-parallel group, without that wait. "auto" is "gather" if each
        group is on GPUs of one node and ep_size is at most 8, else "all_to_all".
    timeout_minutes: how long a rank waits for another in a step before it raises an error that names the layer.
    strategy: "fsdp2", the only one.
    world_size: number of ranks; by default that of torch.distributed, else the variable WORLD_SIZE, else 1.

    Raises ValueError if the sizes do not fit each other or the number of ranks.
    """

    ep_size: int = 1
    tp_size: int = 1
    dp_size: int | None = None
    dp_replicate_size: int = 1
    activation_checkpointing: Policy = False
    reshard_experts: bool = True
    dispatch: str = AUTO
    timeout_minutes: float = 5.0
    strategy: str = STRATEGY
    world_size: int = field(default_factory=lambda: current_world_size())

    def __post_init__(self) -> None:
        for name, (fits, allowed) in _VALUES.items():
            value = getattr(self, name)
            if not fits(value) and not (name == "dp_size" and value is None):
                raise ValueError(f"{name} must be {allowed}, not {value!r}.")
        world, tp, replicas = self.world_size, self.tp_size, self.dp_replicate_size
        if world % tp:
            raise ValueError(f"tp_size={tp} does not divide the {world} ranks. Set tp_size to {_divisors(world)}.")
        dp = world // tp if self.dp_size is None else self.dp_size
        object.__setattr__(self, "dp_size", dp)
        if dp * tp != world:
            raise ValueError(
                f"dp_size={dp} x tp_size={tp} is {dp * tp}, but there are {world} ranks. "
                f"Leave dp_size out (it then is {world // tp}), or start {dp * tp} ranks."
            )
        if dp % replicas:
            raise ValueError(
                f"dp_replicate_size={replicas} does not divide dp_size={dp}. Set dp_replicate_size to {_divisors(dp)}."
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
        """The number of ranks over which FSDP shards the dense parameters of a replica."""
        assert self.dp_size is not None
        return self.dp_size // self.dp_replicate_size

    def to_transformers(self, ep_implementation: str | None = None) -> DistributedConfig:
        """Convert to Transformers' `DistributedConfig`. Raises ValueError if the number of ranks has changed."""
        ranks = current_world_size()
        if ranks != self.world_size:
            raise ValueError(
                f"This DistributedSetup is for {self.world_size} ranks, but {ranks} are running. Start "
                f"{self.world_size} (torchrun --nproc-per-node {self.world_size}), or make the setup for {ranks}."
            )
        dispatch = self.dispatch
        if dispatch == AUTO:  # expert-parallel groups are consecutive ranks
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
            near = torch.cuda.is_available() and per_node % self.ep_size == 0 and self.ep_size <= NEAR
            dispatch = "gather" if near else "all_to_all"
        return DistributedConfig(
            fsdp_size=self.fsdp_size,
            dp_replicate_size=self.dp_replicate_size,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            ep_implementation=ep_implementation or TRANSPORTS[dispatch].ep_implementation,
        )

    def join(self) -> None:
        """Initialize torch.distributed if it is not yet. Raises RanksError if the ranks have different setups."""
        if current_world_size() > 1:
            _ensure_torch_distributed()
            check_same_on_all_ranks("distributed_setup", asdict(self))

    def apply_to(self, model: Any) -> None:
        """Apply activation checkpointing, resharding of experts and the timeout to a model that is sharded already."""
        recompute(model, self.activation_checkpointing)
        if current_world_size() > 1:
            timeouts.step_limit = timedelta(minutes=self.timeout_minutes)
            prepare_for_training(model, self.reshard_experts)

    def __str__(self) -> str:
        """The mesh as a table: one column per rank with the indices of its batch, replica and shards."""
        world, tp, ep, per_replica = self.world_size, self.tp_size, self.ep_size, self.fsdp_size * self.tp_size
        rows = {
            "rank": range(world),
            "batch": [r // tp for r in range(world)],
            "replica": [r // per_replica for r in range(world)],
            "tp part": [r % tp for r in range(world)],
            "experts": [r % ep for r in range(world)],
            "shard of them": [r % per_replica // ep if ep > 1 else 0 for r in range(world)],
        }
        text = f"{world} rank{'s' * (world > 1)}: dp_size={self.dp_size} (dp_replicate_size={self.dp_replicate_size} x "
        text += f"fsdp {self.fsdp_size}), tp_size={tp}, ep_size={ep}"
        for first in range(0, world, 16):
            for name, values in rows.items():
                if name in ("rank", "batch") or any(values):
                    numbers = " ".join(f"{value:>{len(str(world - 1))}}" for value in values[first : first + 16])
                    text += f"\n{name:>13}  {numbers}"
        return text


def recompute(model: Any, policy: Policy) -> None:
    """Enable activation checkpointing with this policy. Raises ValueError for a policy that needs a fused model."""
    if policy in WHOLE:
        model.activation_checkpointing_enable()
    elif policy:
        if not hasattr(model, "fusion_report"):
            raise ValueError(f"activation_checkpointing={policy!r} needs a fused model: set it to true for this one.")
        model.activation_checkpointing_enable({"recompute": policy})


def current_world_size() -> int:
    """Return the number of ranks of this run, also before torch.distributed is initialized."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def _divisors(n: int) -> str:
    return _or([d for d in range(1, n + 1) if n % d == 0])


def _or(numbers: Iterable[int]) -> str:
    *first, last = sorted(set(numbers))
    return f"{', '.join(map(str, first))} or {last}" if first else str(last)


_COUNT = (lambda x: type(x) is int and 1 <= x <= 10**6, "a whole number from 1 to 1,000,000")
# {field of `DistributedSetup`: (function that accepts a value, description of accepted values)}
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys("world_size ep_size tp_size dp_size dp_replicate_size".split(), _COUNT),
    "activation_checkpointing": (is_policy, POLICIES),
    "reshard_experts": (lambda x: type(x) is bool, "true or false (a section says moe.reshard_after_forward)"),
    "timeout_minutes": (lambda x: type(x) in (int, float) and 0 < x <= 10**6, "a number of minutes above 0"),
    "dispatch": (lambda x: type(x) is str and x in (AUTO, *TRANSPORTS), f"one of {', '.join((AUTO, *TRANSPORTS))}"),
    "strategy": (
        lambda x: type(x) is str and x == STRATEGY,
        f"{STRATEGY!r} (with dp_replicate_size each rank has a copy, as in DDP)",
    ),
}

_MOE = "moe.reshard_after_forward"
_OURS = ["strategy", "dp_size", "dp_replicate_size", "tp_size", "ep_size", "timeout_minutes", "dispatch",
         "activation_checkpointing", _MOE]  # fmt: skip
# NeMo's other keys, each with the values that are accepted because they are the behavior here
_THEIRS: dict[str, tuple[Any, ...]] = {
    "pp_size": (1,), "cp_size": (1,), "fsdp2_forward_prefetch_depth": (1,), "fsdp2_backward_prefetch_depth": (2,),
    "sequence_parallel": (False,), "enable_async_tensor_parallel": (False,), "enable_compile": (False,),
    "enable_fsdp2_prefetch": (False,), "patch_is_packed_sequence": (False, True), "defer_fsdp_grad_sync": (True,),
    "reshard_after_forward": (True,), "moe.ignore_router_for_ac": (True,), "moe.wrap_outer_model": (True,),
    "activation_checkpointing_scope": ("all",),
}  # fmt: skip


def create_distributed_setup_from_config(
    config: dict[str, Any] | None = None, world_size: int | None = None, **keys: Any
) -> DistributedSetup:
    """Make a `DistributedSetup` from a `distributed` section with NeMo AutoModel's keys, as a dict or keywords.

    Keys are the fields of `DistributedSetup`, but reshard_experts is moe: {reshard_after_forward: bool}. None counts as
    absent. NeMo's other keys may only have values that change nothing here. Raises ValueError for all else.
    """
    given = _settings({} if config is None else config) | _settings(keys)
    for key, value in given.items():
        if key not in (*_OURS, *_THEIRS):
            near = "".join(f" Did you mean {name!r}?" for name in get_close_matches(key, (*_OURS, *_THEIRS), 1))
            raise ValueError(f"There is no distributed setting {key!r}.{near} Settings: {', '.join(_OURS)}.")
        if key in _THEIRS and repr(value) not in map(repr, _THEIRS[key]):  # by repr, as True == 1
            raise ValueError(f"{key}={value!r} is NeMo AutoModel's and not supported here: leave it out.")
    section = {key.replace(_MOE, "reshard_experts"): value for key, value in given.items() if key in _OURS}
    return DistributedSetup(**section | ({} if world_size is None else {"world_size": world_size}))


def _settings(section: Any, path: str = "") -> dict[str, Any]:
    """Return the settings that are not None, keyed by their dotted path."""
    if not isinstance(section, dict):
        raise ValueError(f"{path.rstrip('.') or 'The section'} must be a dict of settings, not {section!r}.")
    settings = {f"{path}{key}": value for key, value in section.items() if value is not None}
    return settings | _settings(settings.pop("moe"), "moe.") if "moe" in settings else settings


def refuse_unfit_shards(model: PreTrainedModel, layout: Any) -> None:
    """Raise ValueError on every rank, before anything is loaded, if heads or experts do not fit `layout`.

    tp_size must divide the key-value heads, and ep_size the experts. If a checkpoint has one tensor per expert, every
    rank must get one: Transformers' loader crashes on a rank without (it stacks an empty list) while the others wait.
    Other empty shards work. Tensor parallelism is refused for 4-bit experts, whose blocks it would split.
    """
    packed = any(isinstance(weight, Packed) for weight in model.parameters())
    if packed and layout.tp_size > 1:
        raise ValueError(
            f"Experts in 4 bits cannot be split by tp_size={layout.tp_size}: set it to 1. ep_size spreads them."
        )
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", None) or 1
    if get_kv_heads_per_rank(model.tp_plan, heads, layout.tp_size) is None:
        raise ValueError(
            f"tp_size={layout.tp_size} does not divide the {heads} key-value heads of {type(model).__name__}. "
            f"Set tp_size to {_divisors(heads if isinstance(heads, int) else math.gcd(*heads))}."
        )
    operations = [op for entry in get_model_conversion_mapping(model) for op in getattr(entry, "operations", ())]
    tensor_per_expert = any(isinstance(operation, MergeModulelist) for operation in operations)
    replica = layout.fsdp_size * layout.tp_size

    def fits(num_experts: int, ep_size: int) -> bool:
        sharding = replica // ep_size if ep_size > 1 else layout.fsdp_size
        held, rest = divmod(num_experts, ep_size)
        covered = -(-held // sharding) * (sharding - 1)  # rows of all shards but the last, which gets the rest
        return rest == 0 and (packed or not tensor_per_expert or covered < held)  # FSDP leaves packed experts whole

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
