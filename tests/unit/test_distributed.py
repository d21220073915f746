"""What processes exchange over gloo is what the played ranks of the other tests exchange."""

import json
import subprocess
import sys
from pathlib import Path

from ray_vlm.distributed import DistributedContext
from tests.support.ranks import PlayedRank, on_ranks

SIZE = 3
PROCESSES = """
import json, multiprocessing, sys
import torch.distributed
from ray_vlm.distributed import DistributedContext
from tests.unit.test_distributed import SIZE, exchange

def run(rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=SIZE)
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(exchange(DistributedContext(rank, SIZE)), file)

workers = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(SIZE)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
"""


def exchange(context: DistributedContext) -> list[object]:
    """Return what a rank gets from each operation."""
    rank = context.rank
    return [
        context.broadcast({"rank": rank}),
        context.gather("x" * (1 + 10 * rank)),
        context.gather([rank]),
        context.scatter([["of", other] for other in range(context.world_size)] if rank == 0 else []),
        context.max([rank, -rank, 5]),
        context.any_rank(rank == 1, False),
        context.sum([0.5, float(rank)]),
    ]


def test_processes_and_played_ranks_exchange_the_same(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path)], check=True, timeout=120)
    exchanged = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SIZE)]
    assert exchanged[0] == [
        *[{"rank": 0}, ["x", "x" * 11, "x" * 21], [[0], [1], [2]], ["of", 0]],
        *[[2, 0, 5], [True, False], [1.5, 3.0]],
    ]
    assert exchanged[1] == [{"rank": 0}, [], [], ["of", 1], [2, 0, 5], [True, False], [1.5, 3.0]]

    def play(store: object, context: PlayedRank) -> list[object]:
        return exchange(context)

    stores: list = [None] * SIZE
    assert on_ranks(stores, play) == exchanged


def test_a_rank_alone_gets_its_own() -> None:
    assert exchange(DistributedContext()) == [
        *[{"rank": 0}, ["x"], [[0]], ["of", 0]],
        *[[0, 0, 5], [False, False], [0.5, 0.0]],
    ]
