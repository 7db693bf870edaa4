"""What every device of a domain can do, whichever it is."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, Self, TypeVar

from usermm.grants.files import DeviceFile

File = TypeVar("File", bound=DeviceFile)


class Device(Generic[File]):
    """An open device file; a context manager."""

    def __init__(self, file: File) -> None:
        self._file = file

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """The device's ioctl(2), with its bytes; `argument` is changed in place. DeviceError with its errno."""
        return self._file.ioctl(request, argument)

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
