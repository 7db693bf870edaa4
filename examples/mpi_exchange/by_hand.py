"""A registration cache as libraries write it by hand: a dictionary by address and length, told of nothing."""

from __future__ import annotations

from dataclasses import dataclass

from pattern import Bytes

from usermm.registrars import MpiWindow
from usermm.registrars.mpi import Attachment


@dataclass(frozen=True)
class ByHandRegistration:
    address: int
    length: int
    handle: Attachment

    def release(self) -> None:
        """Nothing: it stays in the cache for good."""


class ByHandCache:
    """Has what this program uses of usermm.RegistrationCache."""

    def __init__(self, registrar: MpiWindow) -> None:
        self.registrar = registrar
        self.known: dict[tuple[int, int], ByHandRegistration] = {}

    def get(self, array: Bytes) -> ByHandRegistration:
        """What is known by this address and length, or a new one. OverlapError: the window refused."""
        key = array.ctypes.data, array.nbytes
        if key not in self.known:
            self.known[key] = ByHandRegistration(*key, self.registrar.register(*key))
        return self.known[key]

    def evict(self, array: Bytes) -> int:
        """Forget and detach what overlaps `array`."""
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        gone = [key for key in self.known if key[0] < end and start < sum(key)]
        for key in gone:
            self.registrar.deregister(self.known.pop(key).handle)
        return len(gone)

    def close(self) -> None:
        for registration in self.known.values():
            self.registrar.deregister(registration.handle)
        self.known.clear()
