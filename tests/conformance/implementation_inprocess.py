"""`usermm.Ummunotify`: the device inside this process, over a real userfaultfd and real memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import pytest
from conformance.implementations import PAGE, Child, Implementation, listed
from support.arena import Arena, move_break

import usermm

WAIT_S = 10.0
_F_SETSIG = 10


@listed
class InProcess(Implementation):
    name = "in-process"
    monitor: ClassVar[Literal["userfaultfd", "kernel"]] = "userfaultfd"
    cannot: ClassVar = {
        "mprotect and fork are reported": "userfaultfd reports neither, and neither invalidates a registration",
        "a child reads the device": "the device is the parent's: a forked child gets ForkedError and opens its own",
    }

    def __init__(self) -> None:
        self._arena = Arena()
        self._next = self._arena.start + PAGE
        self._heap_end = 0

    @classmethod
    def unavailable(cls) -> str | None:
        try:
            usermm.Ummunotify(monitor="userfaultfd").close()
        except usermm.UnavailableError as error:
            return str(error)
        return None

    def open(self, abi: int, flags: int) -> usermm.Ummunotify:
        return usermm.Ummunotify(abi, flags=flags, monitor=self.monitor)

    def generation(self, device: usermm.Ummunotify) -> int:
        return device.generation

    def poll(self, device: usermm.Ummunotify, how: str) -> set[str]:
        # poll(2) itself does not wait for a message that the reader is applying; asking for the generation does.
        assert device.generation >= 0
        return super().poll(device, how)

    @contextlib.contextmanager
    def signals(self, device: usermm.Ummunotify, number: int) -> Iterator[Callable[[int], int]]:
        received: list[int] = []

        def count(expected: int) -> int:
            deadline = time.monotonic() + WAIT_S
            while len(received) < expected and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)  # one too many would come about now
            return len(received)

        fd = device.fileno()
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        before = signal.signal(number or signal.SIGIO, lambda got, _frame: received.append(got))
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, _F_SETSIG, number)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)
        try:
            yield count
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            signal.signal(number or signal.SIGIO, before)

    def reserve(self, pages: int) -> int:
        address = self._next
        self._next += (pages + 1) * PAGE
        return address

    def map_at(self, address: int, pages: int, *, shared: bool = False) -> None:
        self._arena.mmap(address, pages * PAGE, shared=shared)

    def unmap(self, address: int, pages: int) -> None:
        self._arena.munmap(address, pages * PAGE)

    def remap(self, address: int, pages: int, new_pages: int, flags: int = 0, new_address: int = 0) -> int:
        return self._arena.mremap(address, pages * PAGE, new_pages * PAGE, flags, new_address)

    def advise(self, address: int, pages: int, advice: int) -> None:
        self._arena.madvise(address, pages * PAGE, advice)

    def protect(self, address: int, pages: int, prot: int) -> None:
        self._arena.mprotect(address, pages * PAGE, prot)

    def grow_heap(self, pages: int) -> int:
        start = -(-move_break(0) // PAGE) * PAGE
        move_break(start - move_break(0) + pages * PAGE)
        self._heap_end = move_break(0)
        return start

    def shrink_heap(self, pages: int) -> None:
        if move_break(0) != self._heap_end:
            pytest.skip("malloc moved the break meanwhile; run the test alone")
        move_break(-pages * PAGE)
        self._heap_end = move_break(0)

    @property
    def bad_address(self) -> int:
        return self._arena.start  # never mapped: reserve() leaves it out

    def in_child(self, action: Child) -> int:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, action(self).to_bytes(8, "little"))
            finally:
                os._exit(0)
        os.close(writing)
        try:
            answered = select.select([reading], [], [], WAIT_S)[0]
            answer = os.read(reading, 8) if answered else b""
            if not answered:
                os.kill(child, signal.SIGKILL)
        finally:
            os.close(reading)
            os.waitpid(child, 0)
        assert len(answer) == 8, "the child failed or hung"
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        self._arena.close()
