"""The device that libusermm makes inside this process, over a userfaultfd."""

from __future__ import annotations

import os
from typing import Any, Final, Self

from usermm import _core
from usermm.ummunotify.device import Ummunotify


class UserfaultfdDevice(_core.Device, Ummunotify):
    """`Ummunotify` where there is no node; the calls of the ABI are C."""

    __slots__ = ("__weakref__",)  # without a dictionary `generation` is found a nanosecond sooner

    monitor: Final = "userfaultfd"

    @classmethod
    def _open(cls, abi: Any, flags: Any) -> Self:
        return _core.Device.__new__(cls, abi, flags=flags)

    def _readiness(self) -> tuple[int, ...]:
        return (os.dup(self.fileno()),)  # close() makes it readable for good
