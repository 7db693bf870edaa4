"""Which hypervisor this is, of those that have had this socket: a number of 12 bits that references begin with.

A reference that an earlier hypervisor gave out names nothing of a later one. The number is counted in a file beside the
socket, which is locked as long as the hypervisor lives: a second one on the same socket finds it so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from types import TracebackType
from typing import Final, Self

from usermm.errors import UsermmError

BITS: Final = 12
SUFFIX: Final = ".lock"

_COUNT = 1 << BITS
_CONTENT = "{tag:04d} {pid:010d}\n"
_PATTERN = re.compile(rb"(\d{4}) (\d{10})\n")
_OWNER_ONLY = 0o600


class Incarnation:
    """Claims the socket's name. Raises `UsermmError` when a living hypervisor has it.

    `tag` is one more than that of the hypervisor before, and random for the first one. Where the directory cannot be
    written it is random as well, and `locked` is False: whether another hypervisor lives is not known then.
    """

    def __init__(self, socket_path: str) -> None:
        self.tag = secrets.randbelow(_COUNT)
        self._descriptor = -1
        try:
            self._descriptor = os.open(
                socket_path + SUFFIX, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _OWNER_ONLY
            )
        except OSError:
            return
        try:
            self._lock(socket_path)
            self._count()
        except BaseException:
            self.close()
            raise

    @property
    def locked(self) -> bool:
        """Whether no other hypervisor can claim this name while this one lives."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Lets the next one have the name. The file stays: who removes a lock's file takes it from its next holder."""
        if self._descriptor >= 0:
            # Not only closed: a child that was forked meanwhile has the same open file.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def forget(self) -> None:
        """In a forked child: the name stays the parent's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self, socket_path: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise UsermmError(f"hypervisor({socket_path}): {error.strerror}: give another socket") from None
            _, pid = self._read()
            os.close(self._descriptor)
            self._descriptor = -1
            who = f"process {pid}" if pid else "another process"
            reason = f"the hypervisor of {who} has this socket: end it, or give another socket"
            raise UsermmError(f"hypervisor({socket_path}): {reason}") from None

    def _count(self) -> None:
        """Of one length and written in one piece: there is no moment at which the file has half of it."""
        before, _ = self._read()
        if before is not None:
            self.tag = (before + 1) % _COUNT
        try:
            os.pwrite(self._descriptor, _CONTENT.format(tag=self.tag, pid=os.getpid()).encode(), 0)
        except OSError:
            self.tag = secrets.randbelow(_COUNT)  # a full disk: counted on is only what was written

    def _read(self) -> tuple[int | None, int]:
        found = _PATTERN.match(os.pread(self._descriptor, 64, 0))
        return (int(found[1]), int(found[2])) if found else (None, 0)
