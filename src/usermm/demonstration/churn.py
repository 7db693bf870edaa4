"""The loop that tells the caches apart: buffers come and go, and each read is compared with the file."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from usermm.demonstration.caches import Cache
from usermm.demonstration.record import Outcome
from usermm.demonstration.workbench import FILE_BYTES, SECTOR_BYTES, Buffer, KnownFile, pinned_bytes
from usermm.errors import DeviceError

ALIVE = 8  # buffers at any time
SIZES = 8  # eighths of the largest one
RENEWAL = 0.3  # how often a buffer is unmapped, and one of another size mapped, before a read


@dataclass(frozen=True)
class Step:
    """Read the file from `sector` on into buffer `place`: first renewed, unless `renewed_bytes` is 0."""

    place: int
    renewed_bytes: int
    sector: int


def steps(seed: int, reads: int, largest_bytes: int) -> Iterator[Step]:
    """The same random sequence for the same arguments. A sector comes again after all others only."""
    dice = random.Random(seed)
    sectors: list[int] = []
    for _ in range(reads):
        if not sectors:
            sectors = list(range((FILE_BYTES - largest_bytes) // SECTOR_BYTES + 1))
            dice.shuffle(sectors)
        renew = dice.random() < RENEWAL
        place = dice.randrange(ALIVE)
        length = largest_bytes // SIZES * dice.randint(1, SIZES)
        yield Step(place, length if renew else 0, sectors.pop())


def churn(
    cache: Cache,
    file: KnownFile,
    sequence: Iterator[Step],
    largest_bytes: int,
    progress: Callable[[Outcome], None],
) -> Outcome:
    """Play `sequence` with `cache`; call `progress` after each read; return what was counted."""
    outcome = Outcome()
    buffers = [Buffer(largest_bytes // SIZES * (1 + place % SIZES)) for place in range(ALIVE)]
    try:
        for step in sequence:
            if step.renewed_bytes:
                buffers[step.place].close()
                buffers[step.place] = Buffer(step.renewed_bytes)
            read_into(cache, file, buffers[step.place], step.sector, outcome)
            progress(outcome)
    finally:
        for buffer in buffers:
            buffer.close()
    return outcome


def read_into(cache: Cache, file: KnownFile, buffer: Buffer, sector: int, outcome: Outcome) -> None:
    """One read through the cache. The ring reports success; only the comparison tells the truth."""
    offset = sector * SECTOR_BYTES
    with cache.held(buffer) as slot:
        count = cache.ring.read_fixed(file.fileno(), slot, buffer.address, buffer.length, offset)
    if count != buffer.length:
        raise DeviceError(
            errno.EIO, f"io_uring READ_FIXED: {count} of {buffer.length} bytes; was the file cut short?"
        )
    outcome.reads += 1
    outcome.wrong_reads += not file.matches(buffer, sector)
    outcome.hits = cache.hits
    if cache.registrations != outcome.registrations:  # only a registration can pin more than before
        outcome.registrations = cache.registrations
        outcome.pinned_bytes_max = max(outcome.pinned_bytes_max, pinned_bytes())
