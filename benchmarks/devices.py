"""What several benchmarks do with a device."""

from __future__ import annotations

import ctypes
import mmap

from usermm import Ummunotify

PAGE_BYTES = mmap.PAGESIZE
ABOVE_SMALL_INTEGERS = 300  # CPython keeps the integers up to 256; a device that lived a while is beyond them


def address_of(memory: mmap.mmap) -> int:
    """Of a writable mapping. It must stay alive; it can be closed all the same."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def advance(device: Ummunotify, notifications: int) -> None:
    """Moves the generation by discarding a watched page so many times."""
    with mmap.mmap(-1, PAGE_BYTES) as memory:
        cookie = device.register(memory)
        for _ in range(notifications):
            memory.madvise(mmap.MADV_DONTNEED)
        device.unregister(cookie)
