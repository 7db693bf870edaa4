"""A program of 2010, speaking one version of the ABI to an implementation: the tests' language."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from conformance.implementations import Implementation

from usermm.uapi import ummunot, ummunotify
from usermm.ummunotify.events import Invalidation, Last


class Client:
    """One open device. Arguments go through ioctl as bytes, events come back from read as bytes."""

    def __init__(self, implementation: Implementation, abi: int, flags: int) -> None:
        self.implementation = implementation
        self.abi = abi
        self.device: Any = implementation.open(abi, flags)

    def register(self, start: int, end: int, cookie: int, flags: int = 0) -> None:
        self.device.ioctl(self.register_request, self.register_argument(start, end, cookie, flags))

    def unregister(self, cookie: int) -> None:
        self.device.ioctl(self.unregister_request, ummunotify.COOKIE.pack(cookie))

    def exchange(self, wanted: int = 0) -> int:
        """The features that the device grants."""
        argument = bytearray(ummunotify.FEATURES.pack(wanted))
        self.device.ioctl(ummunotify.EXCHANGE_FEATURES, argument)
        return int(ummunotify.FEATURES.unpack(argument)[0])

    @property
    def register_request(self) -> int:
        return ummunotify.REGISTER_REGION if self.abi == 2 else ummunot.REGISTER_REGION

    @property
    def unregister_request(self) -> int:
        return ummunotify.UNREGISTER_REGION if self.abi == 2 else ummunot.UNREGISTER_REGION

    def register_argument(self, start: int, end: int, cookie: int, flags: int = 0) -> bytes:
        if self.abi == 2:
            return ummunotify.REGISTER.pack(start, end, cookie, flags, flags)
        return ummunot.REGISTER.pack(ummunot.INTERFACE_VERSION, flags, start, end, cookie)

    def read(self, count: int = ummunotify.READ_LIMIT_BYTES) -> list[Invalidation | Last]:
        """One read's events; an OSError (EAGAIN) if there are none."""
        return [_event(*fields) for fields in ummunotify.EVENT.iter_unpack(self.device.read_bytes(count))]

    def drain(self) -> list[Invalidation | Last]:
        """Reads until there is nothing more."""
        events: list[Invalidation | Last] = []
        while True:
            try:
                events += self.read()
            except OSError as error:
                assert error.errno == errno.EAGAIN
                return events

    @property
    def generation(self) -> int:
        return self.implementation.generation(self.device)

    def poll(self, how: str = "poll") -> set[str]:
        return self.implementation.poll(self.device, how)

    def close(self) -> None:
        self.device.close()


def _event(kind: int, flags: int, start: int, end: int, cookie_or_counter: int) -> Invalidation | Last:
    if kind == ummunotify.EVENT_TYPE_LAST:
        return Last(cookie_or_counter)
    assert kind == ummunotify.EVENT_TYPE_INVAL
    assert flags in (0, ummunotify.EVENT_FLAG_HINT)
    return Invalidation(cookie_or_counter, start, end, flags == ummunotify.EVENT_FLAG_HINT)


OpenClient = Callable[..., Client]
"""open_client(abi=2, flags=O_RDONLY | O_NONBLOCK): the fixture that opens further clients."""


def errno_of(call: Callable[..., object], *arguments: object) -> int:
    """The errno of the OSError that call(*arguments) raises."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno or 0
