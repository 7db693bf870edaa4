"""What a conformance test needs of an implementation, and the list of those there are.

A new implementation is a new file `implementation_NAME.py` here that subclasses `Implementation` and decorates the
class with `@listed`; no test changes. Memory calls are those of the process that owns the device, in pages and bytes.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import os
import pathlib
import select
from collections.abc import Callable, Iterator
from typing import Any

from conformance.subject import Subject

from usermm.uapi import ummunotify

PAGE = 4096

Child = Callable[["Implementation"], int]


class Implementation(Subject):
    """One process with its memory and the device to test. Devices are opened by `open` and closed by the tests."""

    # The device

    @abc.abstractmethod
    def open(self, abi: int, flags: int) -> Any:
        """An object with ioctl, read_bytes, readinto, mmap and close as `usermm.Ummunotify` has them."""

    @abc.abstractmethod
    def generation(self, device: Any) -> int:
        """The generation as a program learns it right after its own call returned."""

    def load(self, page: Any) -> int:
        """The generation by a plain load of what device.mmap() gave."""
        return int(ummunotify.GENERATION.unpack_from(page)[0])

    def poll(self, device: Any, how: str) -> set[str]:
        """What poll, select or epoll (`how`) says at once: some of "readable", "writable", "other"."""
        return _POLLS[how](device.fileno())

    def write(self, device: Any) -> int:
        return os.write(device.fileno(), b"x")

    @abc.abstractmethod
    def signals(self, device: Any, number: int) -> contextlib.AbstractContextManager[Callable[[int], int]]:
        """Asks for signals (F_SETOWN, O_ASYNC; F_SETSIG if `number`). Gives a function that waits until at least so
        many came, then says how many did."""

    # The memory

    @abc.abstractmethod
    def reserve(self, pages: int) -> int:
        """An address with so many unmapped pages, which stay so, and an unmapped page before and after."""

    def map(self, pages: int, *, shared: bool = False) -> int:
        address = self.reserve(pages)
        self.map_at(address, pages, shared=shared)
        return address

    @abc.abstractmethod
    def map_at(self, address: int, pages: int, *, shared: bool = False) -> None:
        """MAP_FIXED."""

    @abc.abstractmethod
    def unmap(self, address: int, pages: int) -> None: ...

    def unmap_and_load(self, address: int, pages: int, page: Any) -> int:
        """unmap(), then at once load(page)."""
        self.unmap(address, pages)
        return self.load(page)

    @abc.abstractmethod
    def remap(self, address: int, pages: int, new_pages: int, flags: int = 0, new_address: int = 0) -> int: ...

    @abc.abstractmethod
    def advise(self, address: int, pages: int, advice: int) -> None: ...

    def advise_and_load(self, address: int, pages: int, advice: int, page: Any) -> int:
        """advise(), then at once load(page)."""
        self.advise(address, pages, advice)
        return self.load(page)

    @abc.abstractmethod
    def protect(self, address: int, pages: int, prot: int) -> None: ...

    @abc.abstractmethod
    def grow_heap(self, pages: int) -> int:
        """Moves the break up; the first address of the new whole pages."""

    @abc.abstractmethod
    def shrink_heap(self, pages: int) -> None:
        """Undoes grow_heap."""

    @property
    @abc.abstractmethod
    def bad_address(self) -> int:
        """An address that faults."""

    @abc.abstractmethod
    def in_child(self, action: Child) -> int:
        """Forks, runs `action` in the child with the child's implementation, gives back its u64 result."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives all memory back."""


def _poll(fd: int) -> set[str]:
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLOUT | select.POLLPRI)
    return {word for _, mask in poller.poll(0) for word in _words(mask)}


def _epoll(fd: int) -> set[str]:
    with select.epoll() as poller:
        poller.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI)
        return {word for _, mask in poller.poll(0) for word in _words(mask)}


def _select(fd: int) -> set[str]:
    words = ("readable", "writable", "other")
    return {word for word, ready in zip(words, select.select([fd], [fd], [fd], 0), strict=True) if ready}


def _words(mask: int) -> set[str]:
    known = {select.POLLIN: "readable", select.POLLOUT: "writable"}
    rest = mask & ~(select.POLLIN | select.POLLOUT)
    return {word for bit, word in known.items() if mask & bit} | ({"other"} if rest else set())


_POLLS: dict[str, Callable[[int], set[str]]] = {"poll": _poll, "select": _select, "epoll": _epoll}

_listed: dict[str, type[Implementation]] = {}


def listed(implementation: type[Implementation]) -> type[Implementation]:
    _listed[implementation.name] = implementation
    return implementation


def all_implementations() -> dict[str, type[Implementation]]:
    """By name, every class that a file implementation_*.py of this folder lists."""
    for path in sorted(pathlib.Path(__file__).parent.glob("implementation_*.py")):
        importlib.import_module(f"conformance.{path.stem}")
    return dict(_listed)


@contextlib.contextmanager
def closing_all(implementation: Implementation) -> Iterator[Implementation]:
    try:
        yield implementation
    finally:
        implementation.close()
