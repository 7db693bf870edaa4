"""The preload library for long: a million loads in each setting, a thousand short clients, the clients' patterns.

Runs with USERMM_STRESS=1. USERMM_TRIALS sets how many loads, and five times how many look-ups for each client.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
from support import compiled
from support.preload import needs_preload, run, run_well

STRESS = os.environ.get("USERMM_STRESS") == "1"
TRIALS = int(os.environ.get("USERMM_TRIALS", "1000000"))
SHORT_RUNS = 1000
OPENS = 100_000
LIMIT_S = 3600

pytestmark = [
    needs_preload,
    pytest.mark.timeout(LIMIT_S),
    pytest.mark.skipif(not STRESS, reason="runs for many minutes: USERMM_STRESS=1 runs it"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.mark.parametrize("way", ["libc", "raw"])
@pytest.mark.parametrize("threads", [1, 8])
def test_no_load_is_late(folder: Path, threads: int, way: str) -> None:
    program = compiled.program("late_loads", folder)
    done = run_well([program, TRIALS, threads, way], timeout_s=LIMIT_S)
    print(f"{threads} threads, {way}: {done}")
    assert done.split()[1:] == ["late", "0", "early", "0"]


@pytest.mark.parametrize("protection", ["GATE"])
def test_loads_are_late_without(protection: str, folder: Path) -> None:
    program = compiled.program("late_loads", folder)
    library = compiled.preload_without(protection, folder)
    for threads, way in [(1, "libc"), (1, "raw"), (8, "libc"), (8, "raw")]:
        done = run([program, TRIALS // 10, threads, way], library=library, timeout_s=LIMIT_S)
        print(f"without {protection}, {threads} threads, {way}: {done.stdout}")
        assert done.returncode == 1, "the trials do not reach the race"


@pytest.mark.parametrize("way", ["mmap", "raw", "malloc"])
def test_reuse_of_an_address(folder: Path, way: str) -> None:
    program = compiled.program("reuse_loads", folder)
    taken, _, stale = run_well([program, TRIALS // 4, way], timeout_s=LIMIT_S).split()
    print(f"address reuse, {way}: {stale} stale of {taken}")
    assert way != "mmap" or int(stale) == 0


@pytest.mark.parametrize("handing", ["none", "mmap"])
@pytest.mark.parametrize("client", ["mpi", "spin", "eagain"])
@pytest.mark.parametrize("threads", [2, 8, 16])
def test_clients(folder: Path, client: str, threads: int, handing: str) -> None:
    program = compiled.program(f"clients/{client}", folder)
    words = run_well([program, TRIALS // 5, threads, handing], timeout_s=LIMIT_S).split()
    print(f"{client}, {threads} threads, handing {handing}: {' '.join(words)}")
    assert words[4] == words[8] == "0"


def test_short_client(folder: Path) -> None:
    client = compiled.program("short_client", folder)
    times_ms = []
    for _ in range(SHORT_RUNS):
        start_s = time.monotonic()
        assert run_well([client], timeout_s=20) == "ok\n"
        times_ms.append((time.monotonic() - start_s) * 1000)
    quantiles = statistics.quantiles(times_ms, n=100)
    print(f"a short client: median {quantiles[49]:.1f} ms, p99 {quantiles[98]:.1f} ms, at most {max(times_ms):.1f} ms")


def test_many_opens_at_once(folder: Path) -> None:
    """As many as there are descriptors for, RLIMIT_NOFILE; then EMFILE, and all of them still work."""
    program = compiled.program("preload/descriptors", folder)
    print(run_well([program, "many_opens"], USERMM_OPENS=str(OPENS), timeout_s=LIMIT_S))
