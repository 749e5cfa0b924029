"""Time the communication of expert parallelism alone, between the GPUs of a node.

    torchrun --nproc-per-node 2 benchmarks/exchanges.py --out benchmarks/results/h200_x2_exchanges.json

Each rank has 16,384 tokens of 2,048 bfloat16 values, with random top-8 of 128 experts. GB/s are for one direction and
count each row once per rank that needs it. The time includes barriers.

gather           send all tokens to all ranks and copy them out of the mailbox, as in the forward
gather in place  the same without the copy, as in the backward
scatter          reduce-scatter of the sums
combine          the same, fused with the sum over the experts' rows; `this GPU alone` is only that sum
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from gpus import RanksResult, begin
from shared import medians_ms, parser

from expertmesh.kernels.grouping import combine, group_by_expert
from expertmesh.moe.gather import Collectives, link_of


def exchanges(device: torch.device, tokens: int, width: int, experts: int = 128, top_k: int = 8) -> tuple[dict, int]:
    """Return ({(link, name): exchange}, bytes of the rows that other ranks need)."""
    world: Any = dist.group.WORLD
    ranks, rank, mailboxes = dist.get_world_size(), dist.get_rank(), link_of(world, "a benchmark")
    x = torch.randn(tokens, width, device=device).bfloat16()
    xs = torch.randn(ranks * tokens, width, device=device).bfloat16()
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
    collectives = Collectives(world)
    needed = sum((ids // (experts // ranks) == other).any(-1).sum() for other in range(ranks) if other != rank)
    (ids,) = collectives.all_gather([ids])
    weights = torch.rand(ids.shape, device=device)
    position = group_by_expert(ids - rank * experts // ranks, experts // ranks, weights).position_TK
    y = torch.randn(int(position.max()) + 1, width, device=device).bfloat16()
    runs = {
        ("c10d", "all-to-all"): lambda: dist.all_to_all_single(torch.empty_like(xs), xs),
        ("NCCL", "gather"): partial(collectives.all_gather, [x]),
        ("NCCL", "scatter"): partial(collectives.reduce_scatter, [xs]),
        ("this GPU alone", "combine"): lambda: combine(y, position, weights),
    }
    if not isinstance(mailboxes, Collectives):  # this machine's GPUs map each other's memory
        runs |= {
            ("mailboxes", "gather"): partial(mailboxes.all_gather, [x]),
            ("mailboxes", "scatter"): partial(mailboxes.reduce_scatter, [xs]),
            ("mailboxes", "gather in place"): partial(mailboxes.all_gather, [x], copy=False),
            ("mailboxes", "combine"): partial(mailboxes.combine, y, position, weights, None),
        }
    return runs, int(needed) * width * x.element_size()


def main() -> None:
    options = parser(__doc__, repeats=6).parse_args()
    device = begin()
    result = RanksResult(options)
    runs, sent = exchanges(device, *((16, 8, 4, 2) if options.tiny else (16384, 2048)))
    for (link, name), exchange in runs.items():
        us = medians_ms(exchange, options.repeats, queued=1 if options.tiny else 40)[0] * 1e3
        rate = {} if "alone" in link else {"gb_per_second": round(sent / us / 1e3)}
        result.add({"link": link, "exchange": name, "us": round(us, 1), **rate}, key="exchanges")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
