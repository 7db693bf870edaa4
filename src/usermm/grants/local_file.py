"""What the local gntdev and gntalloc files have in common: opening, closing, and finding a request by its number."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import ClassVar

from usermm._core import process
from usermm.errors import ArgumentError, ForkedError, grant_refused
from usermm.uapi._ioctl import ioctl_size

Argument = bytearray | memoryview
Requests = dict[int, Callable[[Argument], None]]


class LocalFile:
    """A device file of this process; a forked child gets ForkedError (ECHILD)."""

    _device: ClassVar[str]

    def __init__(self) -> None:
        self._closed = False
        self._owner = process()
        self._requests = self._make_requests()

    def _make_requests(self) -> Requests:
        raise NotImplementedError

    def ioctl(self, request: int, argument: Argument) -> int:
        """ENOTTY: no such request; EFAULT: `argument` is shorter than the request's."""
        self._check_usable("ioctl")
        call = self._requests.get(request)
        if call is None:
            text = f"{self._device}: ioctl({request:#x}): this device has no such request: see usermm.uapi"
            raise grant_refused(errno.ENOTTY, text)
        size = ioctl_size(request)
        if len(argument) < size:
            text = f"{self._device}: ioctl({request:#x}): {len(argument)} bytes came, its argument has {size}"
            raise grant_refused(errno.EFAULT, text)
        call(argument)
        return 0

    def fileno(self) -> int:
        """There is nothing to poll."""
        text = "a local device is no file of the kernel: there is nothing to poll"
        raise ArgumentError(f"{self._device}: fileno(): {text}")

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def is_inherited(self) -> bool:
        """Whether this is a child of the process that opened it: then its locks may be held by nobody who is here."""
        return process() != self._owner

    def _check_usable(self, call: str) -> None:
        if process() != self._owner:
            text = f"{self._device}: {call}: the file is the parent's: open a domain in this child"
            raise ForkedError(errno.ECHILD, text)
        if self._closed:
            raise grant_refused(errno.EBADF, f"{self._device}: {call}: the file is closed: open a new one")
