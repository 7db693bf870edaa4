"""What the tests of the registration cache share: memory that can be taken away in use, caches that leave nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import usermm
from usermm.monitors import calls
from usermm.testing import ScriptedRegistrar

PAGE = calls.PAGE


class Block:
    """Private anonymous pages behind data_ptr() and nbytes: no exported buffer keeps them from being unmapped."""

    def __init__(self, length: int = PAGE) -> None:
        self.nbytes = length
        self.address = calls.map_memory(length)
        self.mapped = True

    def data_ptr(self) -> int:
        return self.address

    def unmap(self) -> None:
        self.mapped = False
        calls.unmap(self.address, self.nbytes)

    def map_again(self) -> None:
        """Other memory at the same address."""
        assert calls.map_free(self.address, self.nbytes), "somebody else was given the address"
        self.mapped = True

    def discard(self) -> None:
        calls.advise(self.address, self.nbytes, calls.MADV_DONTNEED)

    def part(self, offset: int, length: int) -> Part:
        return Part(self, offset, length)

    def __del__(self) -> None:
        if self.mapped and not sys.is_finalizing():
            self.unmap()


class Part:
    """Some bytes of a block, by address and size."""

    def __init__(self, block: Block, offset: int, length: int) -> None:
        self.block = block
        self.address = block.address + offset
        self.size = length


@contextlib.contextmanager
def cache_over(registrar: ScriptedRegistrar, **options: Any) -> Iterator[usermm.RegistrationCache[object]]:
    """Open while the block runs; after it the registrar must have nothing left and no complaint."""
    with usermm.RegistrationCache(registrar, **options) as cache:
        yield cache
    registrar.check(empty=True)


def eventually(condition: Callable[[], object], timeout_s: float = 10) -> bool:
    """Whether it comes true."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def descriptor_of(link: str) -> int:
    """The number that is open on `link`, as /proc/self/fd shows it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}") == link:
                return int(name)
    raise AssertionError(f"nothing is open on {link}")
