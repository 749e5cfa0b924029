"""A `distributed` section in NeMo AutoModel's words, as a `DistributedSetup`."""

from difflib import get_close_matches
from typing import Any

from expertmesh.parallel.setup import DistributedSetup, is_one_of

_OURS = (
    "strategy dp_size dp_replicate_size tp_size ep_size timeout_minutes dispatch activation_checkpointing moe".split()
)
# NeMo's other keys, each with the values, beside None, that ask for what happens anyway
_NEMO_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys("pp_size cp_size fsdp2_forward_prefetch_depth".split(), (1,)),
    **dict.fromkeys(
        "sequence_parallel enable_async_tensor_parallel enable_compile enable_fsdp2_prefetch".split(), (False,)
    ),
    **dict.fromkeys("defer_fsdp_grad_sync reshard_after_forward".split(), (True,)),
    **dict.fromkeys("pipeline tp_plan mp_policy offload_policy autocast_dtype multimodal ranks".split(), ()),
    "fsdp2_backward_prefetch_depth": (2,),
    "activation_checkpointing_scope": ("all",),
    "patch_is_packed_sequence": (False, True),
}
_MOE_KEYS = {"ignore_router_for_ac": (True,), "wrap_outer_model": (True,), "lm_head_precision": (), "mp_policy": ()}


def create_distributed_setup_from_config(
    config: dict[str, Any] | None = None, world_size: int | None = None, **keys: Any
) -> DistributedSetup:
    """The `DistributedSetup` of a `distributed` section with NeMo AutoModel's keys, as a dict or keywords.

    Keys are a `DistributedSetup`'s, but moe: {reshard_after_forward: bool} for reshard_experts. None leaves a key out.
    NeMo's other keys are accepted at values that ask for what happens anyway. Raises ValueError for any other value of
    them, and for a key that nobody knows.
    """
    section = _ours_of({} if config is None else config) | _ours_of(keys)
    section |= {} if world_size is None else {"world_size": world_size}
    moe = _ours_of(section.pop("moe", {}), "moe.", ["reshard_after_forward"], _MOE_KEYS)
    reshard = moe.get("reshard_after_forward", True)
    if type(reshard) is not bool:
        raise ValueError(f"moe.reshard_after_forward must be true or false, not {reshard!r}.")
    return DistributedSetup(**section, reshard_experts=reshard)


def as_setup(setup: DistributedSetup | dict[str, Any]) -> DistributedSetup:
    """A `DistributedSetup`, or the section that describes one. Raises TypeError for anything else."""
    if isinstance(setup, dict):
        return create_distributed_setup_from_config(setup)
    if not isinstance(setup, DistributedSetup):
        raise TypeError(f"distributed_setup must be a DistributedSetup or a dict, not {type(setup).__name__}.")
    return setup


def _ours_of(section: Any, path: str = "", ours: list[str] = _OURS, theirs: dict[str, tuple] = _NEMO_KEYS) -> dict:
    """The keys of a section that are ours and have a value. Raises ValueError for what is not supported."""
    if not isinstance(section, dict):
        raise ValueError(f"{path.rstrip('.') or 'The section'} must be a dict of settings, not {section!r}.")
    for key, value in section.items():
        if key not in ours and key not in theirs:
            near = get_close_matches(str(key), [*ours, *theirs], 1, 0)[0]
            raise ValueError(
                f"There is no distributed setting {f'{path}{key}'!r}; did you mean {path + near!r}? "
                f"Settings: {', '.join(path + name for name in ours)}."
            )
        if key in theirs and not is_one_of(value, (None, *theirs[key])):
            raise ValueError(f"{path}{key}={value!r} is NeMo AutoModel's and not supported here: leave it out.")
    return {key: value for key, value in section.items() if key in ours and value is not None}
