"""Every public method of a device with arguments that suit it, so that no test forgets one.

`test_leaks.py` fails when a method of the device is in neither list.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

import usermm
from usermm.uapi import ummunotify as abi

PAGE_BYTES: Final = mmap.PAGESIZE
COOKIE: Final = 7

memory: Final = mmap.mmap(-1, 4 * PAGE_BYTES)
"""Anonymous pages that stay mapped as long as the tests run."""
ADDRESS: Final = ctypes.addressof(ctypes.c_char.from_buffer(memory))

Call = Callable[[usermm.Ummunotify], Any]


def register_argument(start: int = ADDRESS, length_bytes: int = PAGE_BYTES, cookie: int = COOKIE) -> bytearray:
    """struct ummunotify_register_ioctl."""
    return bytearray(abi.REGISTER.pack(start, start + length_bytes, cookie, 0, 0))


CALLS: Final[dict[str, Call]] = {
    "register": lambda device: device.register(memory, COOKIE),
    "register_range": lambda device: device.register_range(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE),
    "watch": lambda device: device.watch(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE, 0),
    "unregister": lambda device: device.unregister(COOKIE),
    "retire": lambda device: device.retire(COOKIE),
    "generation": lambda device: device.generation,
    "check": lambda device: device.check(0),
    "check without probe": lambda device: device.check(0, probe=False),
    "read": lambda device: device.read(),
    "read at once": lambda device: device.read(timeout=0),
    "read_within": lambda device: device.read_within(None, 4096),
    "read_bytes": lambda device: device.read_bytes(),
    "readinto": lambda device: device.readinto(ADDRESS, 32),
    "ioctl": lambda device: device.ioctl(abi.REGISTER_REGION, register_argument()),
    "ioctl at an address": lambda device: device.ioctl(abi.UNREGISTER_REGION, ADDRESS),
    "mmap": lambda device: device.mmap(),
    "map_page": lambda device: device.map_page(8, mmap.PROT_READ, mmap.MAP_SHARED, 0),
    "fileno": lambda device: device.fileno(),
}
"""What a device that cannot be used refuses; the first word of a key is the method's name."""

ALWAYS_ANSWERED: Final = {"close", "closed", "flags", "monitor"}
"""What every device answers, whatever became of it. __aiter__ ends at once instead."""


def refused_line(call: Callable[[], Any], kind: type[usermm.UsermmError], number: int | None = None) -> str:
    """The message with which `call` is refused, by exactly this class and errno; it must be one line."""
    try:
        answer = call()
    except usermm.UsermmError as error:
        line = str(error)
        assert type(error) is kind, f"{type(error).__name__}: {line}"
        assert number is None or getattr(error, "errno", None) == number, line
    except BaseException as error:
        raise AssertionError(f"not of usermm's tree: {error!r}") from error
    else:
        raise AssertionError(f"accepted: {answer!r}")
    assert line, "no message"
    assert "\n" not in line, line
    assert len(line) < 400, line
    return line
