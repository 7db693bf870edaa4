"""`usermm.Ummunotify` over a node: the kernel's driver, or the preload library that stands in for it.

Listed only where there are nodes; test_conformance_preloaded.py runs the list where there are.
"""

from __future__ import annotations

import os
import stat
from typing import ClassVar

from conformance.implementation_inprocess import InProcess
from conformance.implementations import listed

import usermm
from usermm.uapi import ummunot, ummunotify

NAME = "kernel-device"


class KernelDevice(InProcess):
    name = NAME
    monitor = "kernel"
    cannot: ClassVar = {}

    @classmethod
    def unavailable(cls) -> str | None:
        with usermm.Ummunotify(monitor="kernel") as device:
            preloaded = stat.S_ISFIFO(os.fstat(device.fileno()).st_mode)
        if preloaded:
            cls.cannot = InProcess.cannot  # there is a userfaultfd behind it, too
        return None


if all(os.path.exists(path) for path in (ummunotify.DEVICE_PATH, ummunot.DEVICE_PATH)):
    listed(KernelDevice)
