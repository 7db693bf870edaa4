"""Who still has an open file: a lock that lives exactly as long as the open file does.

Every descriptor that leaves the hypervisor is an open file of its own with a read lock on a byte of its own (an open
file description lock, fcntl(2)). The kernel drops the lock when the last descriptor and the last mapping of that open
file are gone, however its holder ended. A query from another open file of the same inode tells whether it is there.
"""

from __future__ import annotations

import fcntl
import os
import struct

from usermm.hypervisor import memfds

_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks)."""


def open_held(memfd: int, byte: int, *, writable: bool) -> int:
    """A new open file of the inode behind `memfd`, with the lock on `byte`. Raises OSError (EMFILE, ENOMEM)."""
    descriptor = memfds.reopened(memfd, writable=writable)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_held(memfd: int, byte: int) -> bool:
    """Whether some descriptor or mapping of the open file with the lock on `byte` is left."""
    answer = fcntl.fcntl(memfd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
