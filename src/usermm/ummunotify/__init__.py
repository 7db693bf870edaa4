"""The notification device.

What a device needs is imported with the package and not when the first one is opened: by then a process may have no
free descriptor, or another thread may fork, and the child would wait for ever for a module that nobody imports.
"""

import os

from usermm.uapi import ummunot, ummunotify
from usermm.ummunotify import userfaultfd_device

__all__ = ["userfaultfd_device"]

if os.path.exists(ummunotify.DEVICE_PATH) or os.path.exists(ummunot.DEVICE_PATH):
    from usermm.ummunotify import kernel_device  # noqa: F401 - where there is no node its ctypes would cost 2 ms
