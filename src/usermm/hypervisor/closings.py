"""Wake-ups when an open file of an extent is closed: inotify(7) on the extents' inodes.

They only say "look": closings coalesce, and some are about descriptors of the hypervisor's own. The locks tell.
"""

from __future__ import annotations

import ctypes
import os
import struct

_IN_CLOSE = 0x8 | 0x10  # IN_CLOSE_WRITE, IN_CLOSE_NOWRITE
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len; no name follows where a file is watched
_READ_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Closings:
    """One inotify descriptor. `ALL` among the answers: some were lost, look everywhere."""

    ALL = -1

    def __init__(self) -> None:
        self._descriptor: int = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """Readable when take() has something."""
        return self._descriptor

    def add(self, memfd: int) -> int:
        """Watches the inode behind `memfd`; returns the watch's number. Raises OSError (ENOSPC: max_user_watches)."""
        return _checked(_libc.inotify_add_watch(self._descriptor, b"/proc/self/fd/%d" % memfd, _IN_CLOSE))

    def remove(self, watch: int) -> None:
        """Ends a watch; what it still had to say is taken for nothing."""
        _libc.inotify_rm_watch(self._descriptor, watch)

    def take(self) -> set[int]:
        """The watches whose inodes had a closing, as many as one read gives."""
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return set()
        found = set()
        for watch, mask, _, _ in _EVENT.iter_unpack(data):
            if mask & _IN_Q_OVERFLOW:
                found.add(self.ALL)
            elif not mask & _IN_IGNORED:
                found.add(watch)
        return found

    def close(self) -> None:
        """Ends all watches."""
        os.close(self._descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
