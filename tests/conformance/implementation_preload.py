"""The preload library under a C program: its own calls, and its memory's, by libc or by the instruction itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from conformance.driver import Call, Driver, Reply
from conformance.implementations import PAGE, Child, Implementation, listed
from support.preload import LIBRARY, MISSING

_WINDOW = 0x0EAD_0000_0000  # the kernel gives out nothing there by itself
_MAP_SHARED, _PROT_READ = 1, 1
_WORDS = {1: "readable", 2: "writable", 4: "other"}


class Page:
    """A mapping of the device in the driver, or in the child that the calling thread speaks to."""

    def __init__(self, driver: Driver, address: int, length: int) -> None:
        self._driver, self.address, self._length = driver, address, length

    def __getitem__(self, key: int | slice) -> int | bytes:
        return self._driver.call(Call.PEEK, self.address, self._length).data[key]

    @property
    def readonly(self) -> bool:
        maps = Path(f"/proc/{self._driver.pid}/maps").read_text()
        found = re.search(rf"^{self.address:08x}-\S+ (\S+)", maps, re.MULTILINE)
        assert found, "it is not mapped"
        return found[1].startswith("r--")


class PreloadedDevice:
    """A descriptor of the driver's."""

    def __init__(self, driver: Driver, abi: int, flags: int) -> None:
        self._driver = driver
        self.fd = driver.call(Call.OPEN, abi, flags).result
        self.page = self.mmap(8)
        self._open = True

    def ioctl(self, request: int, argument: int | bytes | bytearray) -> int:
        if isinstance(argument, int):
            return self._driver.call(Call.IOCTL_ADDRESS, self.fd, request, argument).result
        done = self._driver.call(Call.IOCTL_BUFFER, self.fd, request, data=bytes(argument))
        if isinstance(argument, bytearray):
            argument[:] = done.data
        return done.result

    def read_bytes(self, count: int = 4096) -> bytes:
        return self._driver.call(Call.READ, self.fd, count).data

    def readinto(self, address: int, count: int) -> int:
        return self._driver.call(Call.READ_TO, self.fd, address, count).result

    def mmap(self, length: int = 4096, prot: int = _PROT_READ, flags: int = _MAP_SHARED, offset: int = 0) -> Page:
        address = self._driver.call(Call.MAP_DEVICE, self.fd, length, prot, flags, offset).result
        return Page(self._driver, address, length)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._driver.call(Call.CLOSE, self.fd)


class _Preload(Implementation):
    how: ClassVar[str]
    cannot: ClassVar = {
        "mprotect and fork are reported": "userfaultfd reports neither, and neither invalidates a registration",
        "a child reads the device": "the device is the parent's: a forked child gets ECHILD and opens its own",
    }

    def __init__(self, library: Path = LIBRARY) -> None:
        self._driver = Driver(library, self.how)
        self._next = _WINDOW + PAGE
        self._heap_end = 0

    @classmethod
    def unavailable(cls) -> str | None:
        return MISSING or None

    def open(self, abi: int, flags: int) -> PreloadedDevice:
        return PreloadedDevice(self._driver, abi, flags)

    def generation(self, device: PreloadedDevice) -> int:
        return self.load(device.page)

    def load(self, page: Page) -> int:
        return self._driver.call(Call.NOTHING, page=page.address).loaded

    def poll(self, device: PreloadedDevice, how: str) -> set[str]:
        # poll(2) itself does not wait for a message that is being applied; a load of the page does.
        self.load(device.page)
        mask = self._driver.call(Call[how.upper()], device.fd).result
        return {word for bit, word in _WORDS.items() if mask & bit}

    def write(self, device: PreloadedDevice) -> int:
        return self._driver.call(Call.WRITE, device.fd).result

    @contextlib.contextmanager
    def signals(self, device: PreloadedDevice, number: int) -> Iterator[Callable[[int], int]]:
        self._driver.call(Call.SIGNALS_ON, device.fd, number)
        yield lambda expected: self._driver.call(Call.SIGNALS_COUNT, expected).result
        self._driver.call(Call.SIGNALS_OFF, device.fd)

    def reserve(self, pages: int) -> int:
        address = self._next
        self._next += (pages + 1) * PAGE
        return address

    def map_at(self, address: int, pages: int, *, shared: bool = False) -> None:
        self._driver.call(Call.MMAP, address, pages * PAGE, shared)

    def _unmap(self, address: int, pages: int, page: int = 0) -> Reply:
        return self._driver.call(Call.MUNMAP, address, pages * PAGE, page=page)

    def unmap(self, address: int, pages: int) -> None:
        self._unmap(address, pages)

    def unmap_and_load(self, address: int, pages: int, page: Page) -> int:
        return self._unmap(address, pages, page.address).loaded

    def remap(self, address: int, pages: int, new_pages: int, flags: int = 0, new_address: int = 0) -> int:
        return self._driver.call(Call.MREMAP, address, pages * PAGE, new_pages * PAGE, flags, new_address).result

    def advise(self, address: int, pages: int, advice: int) -> None:
        self._driver.call(Call.MADVISE, address, pages * PAGE, advice)

    def advise_and_load(self, address: int, pages: int, advice: int, page: Page) -> int:
        return self._driver.call(Call.MADVISE, address, pages * PAGE, advice, page=page.address).loaded

    def protect(self, address: int, pages: int, prot: int) -> None:
        self._driver.call(Call.MPROTECT, address, pages * PAGE, prot)

    def _move_break(self, delta: int) -> int:
        return self._driver.call(Call.MOVE_BREAK, delta).result

    def grow_heap(self, pages: int) -> int:
        before = self._move_break(0)
        start = -(-before // PAGE) * PAGE
        self._move_break(start - before + pages * PAGE)
        self._heap_end = self._move_break(0)
        return start

    def shrink_heap(self, pages: int) -> None:
        if self._move_break(0) != self._heap_end:
            pytest.skip("malloc moved the break meanwhile; run the test alone")
        self._move_break(-pages * PAGE)
        self._heap_end = self._move_break(0)

    @property
    def bad_address(self) -> int:
        return _WINDOW  # reserve() leaves it out

    def in_child(self, action: Child) -> int:
        with self._driver.forked():
            return action(self)

    def close(self) -> None:
        self._driver.close()


@listed
class PreloadByLibc(_Preload):
    name = "preload-c"
    how = "libc"


@listed
class PreloadBySystemCalls(_Preload):
    name = "preload-c-raw"
    how = "raw"
