"""A real device and its model as one: every call goes to both, and both must answer the same."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

import usermm
from usermm.testing import AddressSpace, ModelDevice
from usermm.uapi import ummunot, ummunotify

# Each gets a device and an address where nothing is mapped.
ODD_CALLS: list[Callable[[Any, int], object]] = [
    lambda device, _nowhere: device.ioctl(ummunotify.EXCHANGE_FEATURES, bytearray(b"\xff" * 4)),
    lambda device, nowhere: device.ioctl(ummunotify.EXCHANGE_FEATURES, nowhere),
    lambda device, nowhere: device.ioctl(ummunotify.REGISTER_REGION, nowhere),
    lambda device, nowhere: device.ioctl(ummunotify.UNREGISTER_REGION, nowhere),
    lambda device, nowhere: device.ioctl(ummunot.REGISTER_REGION, nowhere),
    lambda device, nowhere: device.ioctl(0, nowhere),
    lambda device, nowhere: device.readinto(nowhere, 32),
    lambda device, nowhere: device.readinto(nowhere, 4096),
    lambda device, nowhere: device.readinto(nowhere, 31),
    lambda device, nowhere: device.register_range(nowhere, nowhere + 1, 88),
    lambda device, nowhere: device.register_range(nowhere, nowhere, 1),
    lambda device, nowhere: device.register_range(nowhere, nowhere - 1, 2),
    lambda device, _nowhere: device.unregister(1 << 64),
    lambda device, _nowhere: device.unregister(77),
    lambda device, _nowhere: device.mmap(4096, offset=4096),
]


class Pair:
    """One real device and its model."""

    def __init__(self, space: AddressSpace, abi: int) -> None:
        flags = os.O_RDONLY | os.O_NONBLOCK
        self.abi = abi
        self.both: tuple[Any, Any] = (usermm.Ummunotify(abi, flags=flags), ModelDevice(space, abi, flags=flags))
        self.seen = [0]
        self.cookies: list[int] = []  # registered now

    def agree(self, call: Callable[[Any], object]) -> object:
        real, model = (outcome(call, device) for device in self.both)
        assert real == model, f"real {real}, model {model}"
        return real


def outcome(call: Callable[..., object], *arguments: object) -> object:
    """What a call returned, or the kind of its refusal."""
    try:
        return call(*arguments)
    except OSError as error:
        return f"errno {error.errno}"
    except ValueError:
        return "ValueError"


def readable(device: Any) -> bool:
    if isinstance(device, ModelDevice):
        return device.readable
    poller = select.poll()
    poller.register(device.fileno(), select.POLLIN | select.POLLOUT | select.POLLPRI)
    return [mask for _, mask in poller.poll(0)] == [select.POLLIN]
