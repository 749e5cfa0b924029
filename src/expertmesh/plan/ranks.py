"""One process that is a rank of many, of which the others do not exist: PyTorch's fake process group exchanges nothing.

So the real code lays a model out for any number of ranks, on any machine.
"""

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
    """Within: this process is that rank. Raises ValueError where it is a rank of others already."""
    if dist.is_initialized():
        raise ValueError("Ranks run here already: plan this layout where none do, by `expertmesh plan`.")
    numbers = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in numbers.items()}),
        mock.patch.object(timeouts, "_backends", lambda _: []),  # nobody is waited for
        mock.patch.object(sys.modules["expertmesh.fuse"], "check_same_on_all_ranks", lambda *_: None),
    ):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def lay_out(model: Any, setup: DistributedSetup, memory: int) -> Any:
    """A model on the meta device as the real code lays it out on a rank whose GPU has so many bytes; within `rank_of`.

    Raises ValueError if the setup does not fit the model.
    """
    layout, _, meshes = PreTrainedModel.prepare_distribute_model(setup.to_transformers())
    with mock.patch.object(backends, "watching", (lambda *_, **__: None, memory)):
        return model.maybe_distribute_model(model, layout, meshes)
