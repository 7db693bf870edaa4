"""Programs in the manner of the known clients, with threads that change memory at random: never stale, never stuck."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from support import compiled
from support.preload import needs_preload, run, run_well

LOOKS = 20_000
THREADS = 4
CLIENTS = ["mpi", "spin", "eagain"]

pytestmark = needs_preload


@dataclass(frozen=True)
class Seen:
    """What a client counted; the last two where memory was handed over by a thread that still was in munmap."""

    looks: int
    hits: int
    stale: int
    given: int
    given_stale: int


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program(f"clients/{request.param}", tmp_path_factory.mktemp("clients"))


def seen(client: Path, handing: str) -> Seen:
    words = run_well([client, LOOKS, THREADS, handing]).split()
    found = Seen(*map(int, words[::2]))
    print(client.name, handing, found)
    return found


def test_memory_that_changed_is_never_taken_for_the_old(client: Path) -> None:
    """Each compares with a record that whoever changes a block keeps under the block's lock."""
    found = seen(client, "none")
    assert found.stale == 0
    assert LOOKS // 20 < found.hits < found.looks


def test_memory_handed_over_by_another_thread(client: Path) -> None:
    """mmap of libc returns when the change that freed the address has been counted; so a load is enough."""
    found = seen(client, "mmap")
    assert (found.stale, found.given_stale) == (0, 0)
    assert found.given > LOOKS // 50


@pytest.mark.parametrize("client", ["mpi"], indirect=True)
def test_without_the_gate_it_would_be_stale(client: Path, tmp_path: Path) -> None:
    """The same trials, and a library that lets loads through while a change is being counted."""
    library = compiled.preload_without("GATE", tmp_path)
    for _ in range(10):
        done = run([client, 10 * LOOKS, 2, "none"], library=library)
        if done.returncode == 1:
            return
    pytest.fail("no look-up was stale: the trials do not reach the race")
