"""The loops of c/calls.c, in this process: its threads and its table of files are part of a system call's price."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from benchmarks.programs import Programs


class Calls:
    """Each method returns a subject that gives ns for a call, in a loop in C of `number` calls."""

    def __init__(self, programs: Programs) -> None:
        self._library = ctypes.CDLL(str(programs.path("calls")))
        self._library.calls_start()

    def ioctl(self, number: int) -> Callable[[], float]:
        """The quiescence probe alone, on a userfaultfd that watches a page."""
        return self._subject("calls_ioctl", number)

    def check(self, number: int) -> Callable[[], float]:
        """usermm_check with the probe."""
        return self._subject("calls_check", number)

    def check_without_probe(self, number: int) -> Callable[[], float]:
        """usermm_check without it."""
        return self._subject("calls_check_without_probe", number)

    def generation(self, number: int) -> Callable[[], float]:
        """usermm_generation."""
        return self._subject("calls_generation", number)

    def _subject(self, name: str, number: int) -> Callable[[], float]:
        function = self._library[name]
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_ulong]

        def measure() -> float:
            return float(function(number))

        return measure
