"""What the kernel counts of this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from support.processes import in_child
from usermm.uapi import procfs

PAGE = mmap.PAGESIZE
NOBODY = 65534


class Memory:
    """Private anonymous pages and their address."""

    def __init__(self, length: int = PAGE, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self.map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection)
        self.length = length
        view = (ctypes.c_char * length).from_buffer(self.map) if protection & mmap.PROT_WRITE else None
        self.address = ctypes.addressof(view) if view else 0


def status_bytes(field: str) -> int:
    """VmPin or VmLck of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="surrogateescape") as file:
        return int(procfs.status(file.read())[field].split()[0]) * 1024


def settles_at(field: str, wanted: int, timeout_s: float = 5) -> bool:
    """Whether the field comes to the value; closing a ring unpins in a kernel thread, a little later."""
    until = time.monotonic() + timeout_s
    while status_bytes(field) != wanted and time.monotonic() < until:
        time.sleep(0.002)
    return status_bytes(field) == wanted


def unprivileged(function: Callable[[], Any], memlock_bytes: int) -> Any:
    """What `function` returns in a forked child without root's rights, whose RLIMIT_MEMLOCK is `memlock_bytes`."""

    def child() -> Any:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_bytes, memlock_bytes))
        with contextlib.suppress(PermissionError):  # not root to begin with: the limit binds anyway
            os.setresuid(NOBODY, NOBODY, NOBODY)
        return function()

    return in_child(child)
