"""A device that does nothing, and the cache that is often written by hand over object identity."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from usermm.measurement.regions import address_of
from usermm.registrars.base import Traits


class NoDevice:
    """A registrar for the price of the cache alone: handles are numbers."""

    traits = Traits()

    def __init__(self) -> None:
        self._handles = itertools.count(1)

    def register(self, address: int, length: int) -> int:  # noqa: ARG002
        """The next number."""
        return next(self._handles)

    def deregister(self, handle: int) -> None:
        """Nothing."""


class FinalizeCache:
    """Handles by the object that was registered, given back when that object dies (`weakref.finalize`).

    Right as long as memory lives exactly as long as its object: it learns of no munmap, mremap or madvise, and each
    view of the same memory is registered once more.
    """

    def __init__(self, device: NoDevice) -> None:
        self._device = device
        self._handles: dict[int, int] = {}

    def get(self, buffer: Any) -> int:
        """The handle of this very object."""
        handle = self._handles.get(id(buffer))
        return self._register(buffer) if handle is None else handle

    def _register(self, buffer: Any) -> int:
        handle = self._device.register(address_of(buffer), buffer.nbytes)
        self._handles[id(buffer)] = handle
        weakref.finalize(buffer, self._forget, id(buffer)).atexit = False
        return handle

    def _forget(self, identity: int) -> None:
        self._device.deregister(self._handles.pop(identity))
