"""What can be found in a trace: for each kind what it leads to and what to do instead."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

MOST_LINES: Final = 5
"""Of a finding that repeats, the lines of so many occurrences are kept."""


class Kind(enum.StrEnum):
    """The mistakes of a client."""

    LAST_NOT_REACHED = "last-not-reached"
    NOT_DRAINED = "not-drained"
    COOKIE_LEAKED = "cookie-leaked"
    NEVER_UNREGISTERED = "never-unregistered"
    COOKIE_IN_USE = "cookie-in-use"
    COOKIE_UNKNOWN = "cookie-unknown"
    EXCHANGE_LATE = "exchange-late"
    EMPTY_REGION = "empty-region"
    SHORT_READ = "short-read"
    BAD_POINTER = "bad-pointer"
    BAD_BUFFER = "bad-buffer"
    WRONG_REQUEST = "wrong-request"
    INTERFACE_VERSION = "interface-version"
    OPEN_FOR_WRITING = "open-for-writing"
    MMAP_REFUSED = "mmap-refused"
    PARENTS_DEVICE = "parents-device"


WARNINGS: Final = frozenset({Kind.EMPTY_REGION})
"""The device accepts these and some programs do them on purpose; the others are wrong in every program."""

LEADS_TO: Final = {
    Kind.LAST_NOT_REACHED: "events stay queued, and the generation they belong to is never known",
    Kind.NOT_DRAINED: "registrations of memory that is gone are believed to be valid",
    Kind.COOKIE_LEAKED: "the cookie stays in use, and registering it again fails with EINVAL",
    Kind.NEVER_UNREGISTERED: "what was pinned or registered for it stays so",
    Kind.COOKIE_IN_USE: "the new range is not watched",
    Kind.COOKIE_UNKNOWN: "nothing was unregistered, and had the cookie been used again, another's region would be",
    Kind.EXCHANGE_LATE: "no feature was agreed on",
    Kind.EMPTY_REGION: "only a change that begins before it and ends after it is reported",
    Kind.SHORT_READ: "it gives 0 bytes and leaves the events queued, for ever",
    Kind.BAD_POINTER: "nothing was done",
    Kind.BAD_BUFFER: "the events of that read are lost",
    Kind.WRONG_REQUEST: "nothing was done",
    Kind.INTERFACE_VERSION: "the range is not watched",
    Kind.OPEN_FOR_WRITING: "there is no device",
    Kind.MMAP_REFUSED: "there is no generation to load",
    Kind.PARENTS_DEVICE: "the memory of this process is not watched",
}
INSTEAD: Final = {
    Kind.LAST_NOT_REACHED: "read until LAST, or EAGAIN",
    Kind.NOT_DRAINED: "when the loaded generation is not that of the newest LAST, read until LAST",
    Kind.COOKIE_LEAKED: "UNREGISTER a cookie after its INVAL: a region stays registered",
    Kind.NEVER_UNREGISTERED: "UNREGISTER each cookie before close or exit",
    Kind.COOKIE_IN_USE: "UNREGISTER the cookie first, or use another",
    Kind.COOKIE_UNKNOWN: "UNREGISTER once for each REGISTER that answered 0",
    Kind.EXCHANGE_LATE: "call EXCHANGE_FEATURES once, right after open",
    Kind.EMPTY_REGION: "the end is exclusive: pass start + length",
    Kind.SHORT_READ: "read at least 32 bytes, the size of one event",
    Kind.BAD_POINTER: "pass the address of mapped memory",
    Kind.BAD_BUFFER: "read into memory that is mapped and writable",
    Kind.WRONG_REQUEST: "use the requests of the version that was opened",
    Kind.INTERFACE_VERSION: "set intf_version to 1 and use a cookie that is not registered",
    Kind.OPEN_FOR_WRITING: "open it O_RDONLY",
    Kind.MMAP_REFUSED: "map offset 0, 1 to 4096 bytes, PROT_READ",
    Kind.PARENTS_DEVICE: "open a device in each process after fork",
}


@dataclass(slots=True)
class Finding:
    """One mistake at one place of the program, `count` times; `what`, `advice` and `lines` are of the first ones."""

    kind: Kind
    process: int
    device: int
    site: str
    what: str
    lines: list[int]
    advice: str
    count: int = 1

    @property
    def is_warning(self) -> bool:
        return self.kind in WARNINGS

    @property
    def leads_to(self) -> str:
        return LEADS_TO[self.kind]


class Findings:
    """Gathers them: a mistake that a loop makes a million times is one finding."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, int, int, str], Finding] = {}

    def add(
        self, kind: Kind, place: tuple[int, int, str], lines: list[int], what: str, advice: str | None = None
    ) -> None:
        """`place` is process, device and site; `lines` prove it."""
        key = (kind, *place)
        known = self._found.get(key)
        if known is None:
            self._found[key] = Finding(kind, *place, what, lines, advice or INSTEAD[kind])
            return
        known.count += 1
        if len(known.lines) < MOST_LINES:
            known.lines = sorted({*known.lines, *lines})

    def in_order(self) -> list[Finding]:
        """By where the first is seen in the file."""
        return sorted(self._found.values(), key=lambda finding: finding.lines[0])
