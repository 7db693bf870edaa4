"""The lines of a trace as typed values: one class a call.

Times are CLOCK_MONOTONIC in nanoseconds, addresses and lengths are bytes, ends are exclusive. `result` is what the
system call returned, or -errno. `site` is "object+0xoffset (symbol)", the place of the call, or "".
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


def error_name(result: int) -> str:
    """The name of the errno in a negative result. Of the two names of 95 the one in docs/abi.md."""
    return "EOPNOTSUPP" if -result == errno.EOPNOTSUPP else errno.errorcode.get(-result, f"errno {-result}")


@dataclass(frozen=True, slots=True)
class Record:
    """What every line has; `line` is its number in the file, from 1, and `device` counts a process's opens, from 1."""

    line: int
    time_ns: int
    process: int
    thread: int
    device: int
    site: str


@dataclass(frozen=True, slots=True)
class Open(Record):
    """One that was refused has device 0 and descriptor -1."""

    path: str
    abi: int
    flags: int
    descriptor: int
    result: int


@dataclass(frozen=True, slots=True)
class Register(Record):
    start: int
    end: int
    cookie: int
    result: int


@dataclass(frozen=True, slots=True)
class Unregister(Record):
    cookie: int
    result: int


@dataclass(frozen=True, slots=True)
class Exchange(Record):
    result: int


@dataclass(frozen=True, slots=True)
class Ioctl(Record):
    """A request that the device does not have, or whose argument could not be read."""

    request: int
    result: int


@dataclass(frozen=True, slots=True)
class Hit:
    """An INVAL event; with `hint` its range is exactly what went."""

    cookie: int
    start: int
    end: int
    hint: bool


@dataclass(frozen=True, slots=True)
class Read(Record):
    """`last` is the generation of the LAST event that ended the read, or None."""

    size: int
    result: int
    hits: tuple[Hit, ...]
    last: int | None


@dataclass(frozen=True, slots=True)
class Mmap(Record):
    length: int
    address: int
    result: int


@dataclass(frozen=True, slots=True)
class Close(Record):
    """The last descriptor of the device went."""

    result: int


@dataclass(frozen=True, slots=True)
class Notify(Record):
    """Memory changed; `thread` is the monitor's. The device's generation is `generation` from here on."""

    start: int
    end: int
    cause: str
    generation: int
