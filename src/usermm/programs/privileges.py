"""Whether the kernel starts a file in secure-execution mode, in which the loader ignores LD_PRELOAD (ld.so(8)).

The rules are those of execve(2) and capabilities(7): what counts is whether the effective ids will differ from the
real ones, so a set-user-ID file of root's that root runs is an ordinary file.
"""

from __future__ import annotations

import os
import stat
from typing import Final

_CAPABILITY: Final = "security.capability"


def gained(path: str) -> str:
    """In words, what makes the kernel start `path` in secure mode for this process, or ""."""
    status = os.stat(path)
    if os.geteuid() != os.getuid() or os.getegid() != os.getgid():
        return "this process itself runs with another effective user or group"
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return ""  # neither bits nor capabilities count on such a mount
    if not _no_new_privileges():
        if status.st_mode & stat.S_ISUID and status.st_uid != os.getuid():
            return f"the file is set-user-ID {status.st_uid}"
        # Without the group's x bit, S_ISGID once meant mandatory locking.
        group_bits = stat.S_ISGID | stat.S_IXGRP
        if status.st_mode & group_bits == group_bits and status.st_gid != os.getgid():
            return f"the file is set-group-ID {status.st_gid}"
    if os.getuid() != 0 and _has_capabilities(path):
        return "the file has capabilities"
    return ""


def _has_capabilities(path: str) -> bool:
    try:
        return bool(os.getxattr(path, _CAPABILITY))
    except OSError:  # none, or a file system without them
        return False


def _no_new_privileges() -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return any(line.split() == ["NoNewPrivs:", "1"] for line in file)
    except OSError:
        return False
