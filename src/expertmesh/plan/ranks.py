"""Act as one rank of many in one process, by PyTorch's fake process group: the real layout code runs on any machine."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from expertmesh import backends, timeouts
from expertmesh.parallel.setup import DistributedSetup


@contextmanager
def rank_of(world_size: int, rank: int = 0) -> Iterator[None]:
    """Context manager that makes this process that rank. Raise ValueError if a process group is initialized."""
    if dist.is_initialized():
        raise ValueError("torch.distributed is initialized: plan this layout by `expertmesh plan`, on its own.")
    numbers = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in numbers.items()}),
        mock.patch.object(timeouts, "_backends", lambda _: []),  # a fake group has no timeouts
        mock.patch.object(sys.modules["expertmesh.fuse"], "check_same_on_all_ranks", lambda *_: None),
    ):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def lay_out(model: Any, setup: DistributedSetup, memory: int) -> Any:
    """Lay out a meta-device model with the real code, on a rank whose GPU has `memory` bytes. Call within `rank_of`.
    Raise ValueError if the setup does not fit the model.
    """
    layout, _, meshes = PreTrainedModel.prepare_distribute_model(setup.to_transformers())
    with mock.patch.object(backends, "watching", (lambda *_, **__: None, memory)):
        return model.maybe_distribute_model(model, layout, meshes)
