"""The text of /proc/PID/maps, /proc/PID/smaps and /proc/PID/status: see proc(5), proc_pid_maps(5).

Pure parsing: nothing here opens a file. Whoever does opens it with ``errors="surrogateescape",
newline="\\n"``, because a file name may hold any byte but newline (which the kernel writes as ``\\012``),
also the other characters that Python takes for line ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

_HEADER: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+)(?: +(.*))?\Z",
    re.DOTALL,
)
_DETAIL: Final = re.compile(r"[A-Za-z_]+:")

USERFAULTFD_FLAGS: Final[dict[str, str]] = {"um": "missing", "uw": "write-protect", "ui": "minor"}
"""VmFlags of a mapping that a userfaultfd watches, with the mode of its registration."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping: `start` and `end` (exclusive) in bytes, `device` as (major, minor).

    `path` is what the kernel shows. `vm_flags` holds the two-letter flags of smaps and is empty when the text was
    /proc/PID/maps.
    """

    start: int
    end: int
    permissions: str
    offset_bytes: int
    device: tuple[int, int]
    inode: int
    path: str
    vm_flags: frozenset[str] = frozenset()

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"

    @property
    def userfaultfd_modes(self) -> tuple[str, ...]:
        """How a userfaultfd is registered on it, from smaps: of "missing", "write-protect", "minor"."""
        return tuple(mode for flag, mode in USERFAULTFD_FLAGS.items() if flag in self.vm_flags)


def iterate(lines: Iterable[str]) -> Iterator[Mapping]:
    """The mappings of maps or smaps text, as they come: the caller may stop before the kernel wrote the rest.

    Raises ValueError for a line of neither format.
    """
    pending: Mapping | None = None
    for line in lines:
        text = line.removesuffix("\n")
        header = _HEADER.match(text)
        if header:
            if pending:
                yield pending
            pending = _mapping(header)
        elif pending and text.startswith("VmFlags:"):
            pending = replace(pending, vm_flags=frozenset(text.split()[1:]))
        elif text and not _DETAIL.match(text):
            raise ValueError(f"neither a mapping nor a detail of one: {text!r}")
    if pending:
        yield pending


def _mapping(header: re.Match[str]) -> Mapping:
    start, end, permissions, offset, major, minor, inode, path = header.groups()
    return Mapping(
        int(start, 16),
        int(end, 16),
        permissions,
        int(offset, 16),
        (int(major, 16), int(minor, 16)),
        int(inode),
        (path or "").replace("\\012", "\n"),
    )


def mappings(text: str) -> list[Mapping]:
    """All mappings of the text of maps or smaps, in address order. Raises ValueError like `iterate`."""
    return list(iterate(text.split("\n")))


def overlapping(lines: Iterable[str], start: int, end: int) -> list[Mapping]:
    """The mappings that have a byte in [start, end); reads no further than the first one beyond it."""
    found = []
    for mapping in iterate(lines):
        if mapping.start >= end:
            break
        if mapping.end > start:
            found.append(mapping)
    return found


def status(text: str) -> dict[str, str]:
    """/proc/PID/status as a dictionary from field to value, both stripped."""
    fields = (line.partition(":") for line in text.split("\n") if ":" in line)
    return {name.strip(): value.strip() for name, _, value in fields}
