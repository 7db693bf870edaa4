"""mpiexec -n 4 python examples/mpi_exchange [--no-invalidation]: ranks read and write each other's arrays.

Ends with status 1 if a byte was wrong or a stale attachment was handed out, 2 if a rank failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from typing import Any

from blocks import BLOCKS
from by_hand import ByHandCache
from exchange import Rank
from mpi4py import MPI
from witness import WitnessedWindow

import usermm


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpi_exchange", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-invalidation", action="store_true", help="use a cache that is told of nothing")
    return parser.parse_args()


def main(wish: argparse.Namespace) -> int:
    comm = MPI.COMM_WORLD
    if not 2 <= comm.size <= BLOCKS:
        step = f"run 2 to {BLOCKS}: mpiexec -n 4 python examples/mpi_exchange"
        print(f"mpi_exchange: {comm.size} ranks are too few or too many: {step}", file=sys.stderr)
        return 2
    window = WitnessedWindow(comm)
    cache: Any = ByHandCache(window) if wish.no_invalidation else usermm.RegistrationCache(window, max_count=32)
    rank = Rank(comm, window, cache, wish.seed)
    rank.play(wish.rounds)
    cache.close()
    left = len(window.attached)
    window.close()
    facts = {name: comm.reduce(value) for name, value in own_facts(rank, left).items()}
    verdict = None
    if comm.rank == 0:
        facts["hosts"] = len(set(rank.hosts))
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        verdict = bool(facts["wrong bytes"] or facts["stale attachments handed out"] or facts["attached at the end"])
    return int(comm.bcast(verdict))


def own_facts(rank: Rank, left: int) -> dict[str, int]:
    """What this rank counted, in words; the numbers can be added up over ranks."""
    counts = {name.replace("_", " "): value for name, value in dataclasses.asdict(rank.counts).items()}
    return {
        "ranks": 1,
        **counts,
        "attachments": rank.window.attachments,
        "attachments that went stale": rank.window.stale_ever,
        "stale attachments handed out": rank.window.stale_handed_out,
        "attached at the end": left,
    }


if __name__ == "__main__":
    wish = arguments()
    try:
        status = main(wish)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(2)  # or the others would wait for this rank for ever
        raise
    sys.exit(status)
