"""What an address space reports, and the two sources that usermm knows: an MMU notifier and a userfaultfd."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple


class Flavour(enum.Enum):
    """Who reports the changes.

    `MMU_NOTIFIER` is what the kernel device of 2010 stood on: every change of every mapping is reported, also mprotect
    and fork, which invalidate no registration. `USERFAULTFD` is what usermm stands on by default: only memory that was
    mapped when somebody watched it, and only what takes memory away.
    """

    MMU_NOTIFIER = "mmu notifier"
    USERFAULTFD = "userfaultfd"


class Cause(enum.Enum):
    """The operation behind a notification; the devices do not tell it, tests like to know."""

    UNMAP = "unmap"
    REMAP = "remap"
    DISCARD = "discard"
    PROTECT = "protect"
    FORK = "fork"


class Notification(NamedTuple):
    """Addresses [start, end) in bytes, in whole pages, as the caller gave them: not clipped to any watch."""

    start: int
    end: int
    cause: Cause


Listener = Callable[[Notification], None]
