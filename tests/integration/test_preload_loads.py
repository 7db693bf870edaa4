"""A plain load of the mapped generation is exact: nothing but the memory-changing call comes before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import compiled
from support.preload import needs_preload, run, run_well

TRIALS = 20_000
ATTEMPTS = 10

pytestmark = needs_preload


@pytest.fixture(scope="module")
def late_loads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program("late_loads", tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def reuse_loads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program("reuse_loads", tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("way", ["libc", "raw"])
@pytest.mark.parametrize("threads", [1, 8])
def test_no_load_is_late(late_loads: Path, threads: int, way: str) -> None:
    """munmap, MAP_FIXED, mremap, madvise, brk; each moves the generation by what it is, one or two, and no more."""
    assert run_well([late_loads, TRIALS, threads, way]).split() == [str(TRIALS), "late", "0", "early", "0"]


def test_loads_are_late_without_the_gate(late_loads: Path, tmp_path: Path) -> None:
    """The same trials fail with a library that leaves the page readable while a change is being counted."""
    library = compiled.preload_without("GATE", tmp_path)
    for _ in range(ATTEMPTS):
        done = run([late_loads, TRIALS, 8, "raw"], library=library)
        if done.returncode == 1:
            assert int(done.stdout.split()[2]) > 0
            return
    pytest.fail("no load was late: the trials do not reach the race")


def test_an_address_from_mmap_is_exact_though_another_thread_is_still_unmapping(reuse_loads: Path) -> None:
    """By a load alone, since mmap of libc waits until what freed the address has been counted."""
    taken, _, stale = run_well([reuse_loads, TRIALS, "mmap"]).split()
    assert (int(taken), int(stale)) == (TRIALS, 0)


def test_a_mapping_made_past_libc_is_not_covered(reuse_loads: Path) -> None:
    """The same trials by a system call of the program's own: stale, or the trials would not reach the race."""
    for _ in range(ATTEMPTS):
        _, _, stale = run_well([reuse_loads, TRIALS // 10, "raw"]).split()
        if int(stale):
            return
    pytest.fail("no load was stale: the trials do not reach the race")


def test_a_large_block_of_malloc_goes_on(reuse_loads: Path) -> None:
    """Not covered either, since malloc maps by itself: counted in docs/exactness.md, and nothing hangs."""
    taken, _, stale = run_well([reuse_loads, TRIALS // 10, "malloc"]).split()
    assert int(stale) <= int(taken)
