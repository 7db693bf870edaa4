"""What every device of a domain can do, whichever it is."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from usermm.errors import grant_refused
from usermm.grants.arguments import ioctl_bytes, unsigned
from usermm.grants.files import DeviceFile
from usermm.uapi import xen_gntalloc, xen_gntdev

_WRITING: Final = frozenset({xen_gntalloc.ALLOC_GREF, xen_gntdev.MAP_GRANT_REF, xen_gntdev.GET_OFFSET_FOR_VADDR})
File = TypeVar("File", bound=DeviceFile)


class Device(Generic[File]):
    """An open device file; a context manager."""

    def __init__(self, file: File) -> None:
        self._file = file

    def ioctl(self, request: int, argument: bytes | bytearray | memoryview) -> int:
        """The device's ioctl(2), with its bytes; `argument` is changed in place. DeviceError with its errno.

        EFAULT: the request writes to it, and it is read-only; ArgumentTypeError: it is no buffer.
        """
        number = unsigned(request, 32, "ioctl: request")
        view = ioctl_bytes(argument, f"ioctl({number:#x})")
        if not view.readonly:
            return self._file.ioctl(number, view)
        if number in _WRITING:
            raise grant_refused(errno.EFAULT, f"ioctl({number:#x}): its answer goes to the buffer: pass a bytearray")
        return self._file.ioctl(number, bytearray(view))

    def fileno(self) -> int:
        """A descriptor to poll; ArgumentError where there is none."""
        return self._file.fileno()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._file.closed

    def close(self) -> None:
        """What is mapped stays until it is unmapped. May be called again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
