"""What a device file is to the classes above it: the four calls of a driver, on a real Xen or in this process."""

from __future__ import annotations

from typing import Any, Protocol

from usermm._core import Memory

PAGE_BYTES = 4096
"""The page of the devices' ABI on x86-64 and of Xen's grant tables."""


class DeviceFile(Protocol):
    """An open device file. Every call raises DeviceError with the errno that the device would have set."""

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """The device's ioctl; `argument` is read, and changed in place. ENOTTY, of evtchn ENOSYS: no such request."""

    def mmap(self, length: int, prot: int, flags: int, offset: int, kind: Any = Memory) -> Any:
        """Maps `length` bytes of the device at `offset` (both in whole pages), as an object of the class `kind`."""

    def fileno(self) -> int:
        """A descriptor to poll; a device that has nothing to say raises ArgumentError."""

    def close(self) -> None:
        """What is mapped stays mapped until it is unmapped, as after close(2). May be called again."""

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
