"""Noticing at once that somebody else in this process unmapped, moved or mapped over a grant.

The hypervisor learns of it by the lock of the mapping's open file, a fraction of a millisecond later. What this process
itself has to know, before it does the next thing at that address, the notifications of `Ummunotify` tell.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Protocol

from usermm import _core
from usermm.errors import DeviceError, ForkedError
from usermm.ummunotify.device import Ummunotify
from usermm.ummunotify.events import Invalidation


class Watched(Protocol):
    """What is told."""

    def hit(self) -> None:
        """Some of it was unmapped, moved or mapped over."""


class Watching:
    """One device for all mappings of a domain; none where this process may not have one."""

    def __init__(self) -> None:
        self._device: Ummunotify | None = None
        self._seen = 0
        self._lock = threading.RLock()  # a finalizer can come in between
        self._watched: dict[int, weakref.ref[Watched]] = {}
        with contextlib.suppress(DeviceError):
            self._device = Ummunotify(monitor="userfaultfd")

    def add(self, memory: Watched, address: int, length: int) -> int | None:
        """Watches it; returns the cookie, None where that is not possible."""
        device = self._device
        if device is None:
            return None
        try:
            cookie = device.watch(address, address + length, None, _core.REFUSE_HOLES)
        except DeviceError:
            return None
        self._watched[cookie] = weakref.ref(memory)
        return cookie

    def forget(self, cookie: int, *, still_mapped: bool) -> None:
        """Before its munmap, which then costs no event; or after somebody else's."""
        self._watched.pop(cookie, None)
        device = self._device
        if device is None:
            return
        try:
            if still_mapped:
                device.retire(cookie)
            else:
                device.unregister(cookie)
        except DeviceError:
            return  # the monitor failed, is closed or is the parent's: then there is no event either

    def settle(self) -> None:
        """Tells every mapping whose memory was hit since the last call."""
        device = self._device
        if device is None:
            return
        try:
            generation = device.generation
            if generation == self._seen:
                return
        except DeviceError as error:
            if isinstance(error, ForkedError):
                return  # the parent's: here is nothing to be told
            generation = -1
        with self._lock:  # whoever finds `seen` up to date finds every mapping told
            self._tell(device)
            self._seen = generation

    def _tell(self, device: Ummunotify) -> None:
        try:
            hit = {event.cookie for event in device.read(0) if isinstance(event, Invalidation)}
        except DeviceError:
            self._device = None  # it failed closed: this once, look at all
            hit = set(self._watched)
        for cookie in hit:
            memory = self._watched.get(cookie, lambda: None)()
            if memory is not None:
                memory.hit()

    def close(self) -> None:
        """Watches nothing any more."""
        if self._device is not None:
            self._device.close()
