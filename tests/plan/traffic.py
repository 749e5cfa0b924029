"""What the ranks of a real step send, by the collectives that run."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.tiny import tiny_config
from expertmesh.parallel.setup import DistributedSetup

SEQ = 512
SMALL = {"num_hidden_layers": 2, "mlp_only_layers": []}


class Bytes(TorchDispatchMode):
    """Counts what this rank sends. place: among the ranks of an all-to-all. copies: of shards there are two."""

    def __init__(self, place: int, copies: bool) -> None:
        super().__init__()
        self.place, self.copies, self.sent = place, copies, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.sent["FSDP"] += abs(args[0].nbytes - args[1].nbytes)
        elif name == "allreduce_" and self.copies:  # of two
            self.sent["FSDP"] += args[0][0].nbytes
        elif name == "alltoall_base_" and args[1].dtype != torch.int64:  # those are counts
            rows = sum(args[4]) - args[4][self.place]
            self.sent[""] += rows * args[1][:1].nbytes
        elif name == "all_reduce":  # two ranks: half of it there, and the other half's sum
            self.sent["TP"] += args[0].nbytes
        elif name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            self.sent["TP"] += abs(out.nbytes - args[0].nbytes)
        return out


def sent(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes by what they are for, of a forward and a backward in float32."""
    setup = DistributedSetup(**sizes)
    config = tiny_config("qwen3_moe", **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, distributed_setup=setup).train()
    generator = torch.Generator().manual_seed(rank // setup.tp_size)
    ids = torch.randint(3, config.vocab_size, (1, SEQ), generator=generator)
    with Bytes(dist.get_rank() % setup.ep_size, setup.dp_replicate_size == 2) as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return dict(counted.sent)
