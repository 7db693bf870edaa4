"""The single case, step by step: register, read, unmap, map again at the same address, read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from usermm.demonstration.caches import Cache, ExactCache
from usermm.demonstration.record import Happening, Moment
from usermm.demonstration.workbench import LABEL_BYTES, SECTOR_BYTES, Buffer, KnownFile, label, pinned_bytes

OLD_BYTES = b"my own old bytes"
_FIRST_SECTOR = 1000
_SECOND_SECTOR = 2000
_TRIES = 32  # mappings until the kernel gives the address again; the first one nearly always has it


def play(cache: Cache, file: KnownFile, length: int) -> Iterator[Moment]:
    """Let it happen with `cache`. A moment was measured when it happened, however long the caller looks at it."""
    with contextlib.ExitStack() as stack:
        before = cache.forgotten
        first = _Act(cache, file, Buffer(length))
        stack.callback(first.buffer.close)
        yield first.mapped(Happening.MAPPED)
        yield from first.look_up_and_read(_FIRST_SECTOR, before)
        # At once, as in a program: the cache's own thread would use a pause to give the old memory up.
        moments = list(first.unmap())
        second = _Act(cache, file, _map_again(first.buffer, stack))
        second.buffer.memory[: len(OLD_BYTES)] = OLD_BYTES
        again = second.buffer.address == first.buffer.address
        moments.append(second.mapped(Happening.MAPPED_AGAIN if again else Happening.MAPPED_ELSEWHERE))
        moments.extend(second.look_up_and_read(_SECOND_SECTOR, before))
        yield from moments


def _map_again(closed: Buffer, stack: contextlib.ExitStack) -> Buffer:
    """Another buffer of that length, at the same address if the kernel will."""
    for _ in range(_TRIES):
        buffer = Buffer(closed.length)
        stack.callback(buffer.close)
        if buffer.address == closed.address:
            break
    return buffer


class _Act:
    """What is done with one buffer."""

    def __init__(self, cache: Cache, file: KnownFile, buffer: Buffer) -> None:
        self.cache, self.file, self.buffer = cache, file, buffer

    def _moment(self, happening: Happening, **measured: Any) -> Moment:
        return Moment(happening, self.buffer.address, self.buffer.length, pinned_bytes(), **measured)

    def mapped(self, happening: Happening) -> Moment:
        return self._moment(happening, buffer=self._start())

    def unmap(self) -> Iterator[Moment]:
        self.buffer.close()
        yield self._moment(Happening.UNMAPPED)
        asks = isinstance(self.cache, ExactCache)
        yield self._moment(Happening.NOTED if asks else Happening.NOT_NOTED)

    def look_up_and_read(self, sector: int, forgotten_before: int) -> Iterator[Moment]:
        hits = self.cache.hits
        with self.cache.held(self.buffer) as slot:
            found = Happening.HIT if self.cache.hits > hits else Happening.REGISTERED
            yield self._moment(found, slot=slot, forgotten=self.cache.forgotten - forgotten_before)
            count = self._read(slot, sector)
            expected = label(sector).decode()
            yield self._moment(
                Happening.READ, slot=slot, transferred=count, buffer=self._start(), expected=expected
            )

    def _read(self, slot: int, sector: int) -> int:
        buffer, offset = self.buffer, sector * SECTOR_BYTES
        return self.cache.ring.read_fixed(self.file.fileno(), slot, buffer.address, buffer.length, offset)

    def _start(self) -> str:
        return self.buffer.memory[:LABEL_BYTES].decode("ascii", "replace")
