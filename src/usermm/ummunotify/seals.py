"""Which seals hold the file behind a mapping: see fcntl(2), "File Sealing", and memfd_create(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from usermm.uapi.procfs import Mapping

F_SEAL_FUTURE_WRITE: Final = 0x10
"""No new writable mapping, no write(2), no PUNCH_HOLE; mappings that exist keep their rights (Linux 5.1)."""

NO_TRUNCATE: Final = fcntl.F_SEAL_SHRINK
NO_PUNCH: Final = fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
"""Either of the two bits stops fallocate(PUNCH_HOLE), and with it madvise(MADV_REMOVE) through any
mapping."""


def sealed_for_good(seals: int | None) -> bool:
    """True when nobody can take pages out of the file any more; seals cannot be lifted."""
    return seals is not None and bool(seals & NO_TRUNCATE) and bool(seals & NO_PUNCH)


def seals_of(mapping: Mapping) -> int | None:
    """The F_SEAL_* bits of the mapped file; None: it cannot have any, or no descriptor of it was found."""
    with _map_file(mapping) as descriptor:
        if descriptor is not None:
            return _get_seals(descriptor)
    seals: int | None = None
    for descriptor in _own_descriptors(mapping):
        found = _get_seals(descriptor)
        if found is None:
            return None
        # Inode numbers of memfds can wrap: where two files share one, only what holds for both is believed.
        seals = found if seals is None else seals & found
    return seals


@contextmanager
def _map_file(mapping: Mapping) -> Iterator[int | None]:
    """A descriptor of the very file that is mapped; None without CAP_CHECKPOINT_RESTORE."""
    path = f"/proc/self/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        # Opening a device can have effects: only regular files are opened.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if regular else None
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _own_descriptors(mapping: Mapping) -> Iterator[int]:
    """The descriptors of this process that name the mapped file; other threads may close them at any time."""
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue
        same_device = (os.major(status.st_dev), os.minor(status.st_dev)) == mapping.device
        if same_device and status.st_ino == mapping.inode and stat.S_ISREG(status.st_mode):
            yield int(name)


def _get_seals(descriptor: int) -> int | None:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # no file system for seals; closed meanwhile
            raise
        return None
