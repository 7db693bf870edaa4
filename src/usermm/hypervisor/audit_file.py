"""A file of lines that is kept private and small: at its limit it becomes FILE.1, and a new one begins."""

from __future__ import annotations

import os
import stat

from usermm.errors import UsermmError

_OWNER_ONLY = 0o600


class AuditFile:
    """Appends. Raises `UsermmError` where it cannot be opened at first."""

    def __init__(self, path: str, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._descriptor = -1
        self._size_bytes = 0
        self._regular = True
        self._torn = False
        try:
            self._open()
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsermmError(f"audit({path}): {reason}: give a file that can be written") from None

    def append(self, lines: bytes) -> None:
        """Writes whole lines, or raises OSError. What a failed write left behind is ended before the next."""
        if self._descriptor < 0:
            self._open()
        if self._torn:
            lines = b"\n" + lines
        if self._regular and self._size_bytes and self._size_bytes + len(lines) > self._limit_bytes:
            self._rotate()
            lines = lines.lstrip(b"\n")
        rest = memoryview(lines)
        while rest:
            self._torn = self._torn or len(rest) < len(lines)
            written = os.write(self._descriptor, rest)
            self._size_bytes += written
            rest = rest[written:]
        self._torn = False

    def reopen(self) -> None:
        """Begins the file anew where somebody moved it away. Raises OSError; the next append tries again."""
        self.close()
        self._open()

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, _OWNER_ONLY)
        try:
            status = os.fstat(descriptor)
            self._regular = stat.S_ISREG(status.st_mode)
            if self._regular and stat.S_IMODE(status.st_mode) != _OWNER_ONLY:
                os.fchmod(descriptor, _OWNER_ONLY)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._size_bytes, self._torn = descriptor, status.st_size, False

    def _rotate(self) -> None:
        os.rename(self._path, f"{self._path}.1")
        self.reopen()
