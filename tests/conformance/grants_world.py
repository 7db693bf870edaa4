"""What a conformance test of the grant devices needs of an implementation: several domains with processes of their own.

A new implementation is a new file `grants_world_NAME.py` here that subclasses `World` and decorates the class with
`@listed`; no test changes. Devices are driven by ioctl bytes, mmap, munmap, read, write and poll, nothing else.
"""

from __future__ import annotations

import abc
import errno
import importlib
import pathlib
import time
from collections.abc import Callable
from typing import ClassVar, Literal

from conformance.subject import Subject

PAGE = 4096
PATIENCE_S = 10.0

Device = Literal["gntdev", "gntalloc", "evtchn"]
Personality = Literal["mainline", "seed2007"]


class FileDriver(abc.ABC):
    """An open device. All calls raise OSError with the device's errno."""

    @abc.abstractmethod
    def ioctl(self, request: int, argument: bytearray) -> int:
        """Changes `argument` in place."""

    @abc.abstractmethod
    def mmap(self, length: int, prot: int, flags: int, offset: int) -> int:
        """The address."""

    @abc.abstractmethod
    def munmap(self, address: int) -> None:
        """Of a whole mapping, by the address that mmap gave."""

    @abc.abstractmethod
    def close(self) -> None:
        """May be called again."""

    @abc.abstractmethod
    def read(self, size: int) -> bytes: ...

    @abc.abstractmethod
    def write(self, data: bytes) -> int: ...

    @abc.abstractmethod
    def readable(self, timeout_s: float = 0) -> bool:
        """What poll says of POLLIN."""


class DomainDriver(abc.ABC):
    """One domain with one process. `bad_address` is never mapped in it."""

    domid: int
    bad_address: ClassVar[int] = PAGE

    @abc.abstractmethod
    def open(self, device: Device, personality: Personality = "mainline") -> FileDriver: ...

    @abc.abstractmethod
    def place(self, data: bytes, *, at_end: bool = False) -> int:
        """The address of `data` in the process's memory; `at_end`: what follows it cannot be read."""

    @abc.abstractmethod
    def peek(self, address: int, length: int = 1) -> bytes:
        """OSError EFAULT: it cannot be read."""

    @abc.abstractmethod
    def poke(self, address: int, data: bytes) -> None:
        """OSError EFAULT: it cannot be written."""

    @abc.abstractmethod
    def peek_in_child(self, address: int, length: int = 1) -> bytes:
        """What a forked child reads there."""

    @abc.abstractmethod
    def ioctl_in_child(self, file: FileDriver, request: int, argument: bytearray) -> bytes:
        """A forked child's call on the file that it inherited; the argument afterwards."""

    @abc.abstractmethod
    def revoke(self, file: FileDriver, reference: int) -> None:
        """Takes one page back that `file`, of gntalloc, granted and that is mapped here once."""

    def settle(self) -> None:  # noqa: B027 - where nothing is under way
        """Returns when what this domain did has been taken notice of everywhere."""

    def has_ended(self, domid: int) -> bool:  # noqa: ARG002
        """Whether the end of that domain has been taken notice of."""
        return True

    @abc.abstractmethod
    def crash(self) -> None:
        """The process ends at once, without closing anything itself."""


class World(Subject):
    """Domains that can grant to each other."""

    @abc.abstractmethod
    def make_domain(self, *, control: bool = False) -> DomainDriver:
        """A domain with a number that no other has. `control`: it may bind virtual interrupts."""

    @property
    @abc.abstractmethod
    def unused_domid(self) -> int:
        """No domain has it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends all."""


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; what follows from another process's end takes a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def errno_of(call: Callable[..., object], *arguments: object) -> str:
    """The name of the errno of the OSError that call(*arguments) raises, or "success"."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "success"


_listed: dict[str, type[World]] = {}


def listed(world: type[World]) -> type[World]:
    _listed[world.name] = world
    return world


def all_worlds() -> dict[str, type[World]]:
    """By name, every class that a file grants_world_*.py of this folder lists."""
    for path in sorted(pathlib.Path(__file__).parent.glob("grants_world_*.py")):
        importlib.import_module(f"conformance.{path.stem}")
    return dict(_listed)
