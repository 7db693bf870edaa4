"""The single case, step by step: register, read, unmap, map again at the same address, read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from usermm.demonstration.caches import ByHandCache
from usermm.demonstration.record import Happening, Moment
from usermm.demonstration.workbench import LABEL_BYTES, SECTOR_BYTES, Buffer, KnownFile, label, pinned_bytes

OLD_BYTES = b"my own old bytes"
_FIRST_SECTOR = 1000
_SECOND_SECTOR = 2000
_TRIES = 32  # mappings until the kernel gives the address again; the first one nearly always has it


def play(cache: ByHandCache, file: KnownFile, length: int) -> Iterator[Moment]:
    """Let it happen with `cache`; each moment is real and just over when it is yielded."""
    with contextlib.ExitStack() as stack:
        buffer = Buffer(length)
        stack.callback(buffer.close)
        address = buffer.address
        yield Moment(Happening.MAPPED, address, length, pinned_bytes())
        yield _look_up(cache, buffer)
        yield _read(cache, file, buffer, _FIRST_SECTOR)
        buffer.close()
        yield Moment(Happening.UNMAPPED, address, length, pinned_bytes())
        forgotten = cache.forget_what_went()
        told = Happening.NOTIFIED if forgotten else Happening.NOT_NOTIFIED
        yield Moment(told, address, length, pinned_bytes(), forgotten=forgotten)
        for _ in range(_TRIES):
            buffer = Buffer(length)
            stack.callback(buffer.close)
            if buffer.address == address:
                break
        buffer.memory[: len(OLD_BYTES)] = OLD_BYTES
        yield Moment(
            Happening.MAPPED_AGAIN, buffer.address, length, pinned_bytes(), buffer=OLD_BYTES.decode()
        )
        yield _look_up(cache, buffer)
        yield _read(cache, file, buffer, _SECOND_SECTOR)


def _look_up(cache: ByHandCache, buffer: Buffer) -> Moment:
    hits = cache.hits
    slot = cache.slot_for(buffer.address, buffer.length)
    found = Happening.HIT if cache.hits > hits else Happening.REGISTERED
    return Moment(found, buffer.address, buffer.length, pinned_bytes(), slot=slot)


def _read(cache: ByHandCache, file: KnownFile, buffer: Buffer, sector: int) -> Moment:
    slot = cache.slots[buffer.address, buffer.length]
    count = cache.ring.read_fixed(file.fileno(), slot, buffer.address, buffer.length, sector * SECTOR_BYTES)
    start = buffer.memory[:LABEL_BYTES].decode("ascii", "replace")
    expected = label(sector).decode()
    pinned = pinned_bytes()
    return Moment(
        Happening.READ,
        buffer.address,
        buffer.length,
        pinned,
        slot,
        transferred=count,
        buffer=start,
        expected=expected,
    )
