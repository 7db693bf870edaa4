"""A hypervisor whose system calls fail on demand: `python -m support.faulty_hypervisor SOCKET DESCRIPTORS`.

Lines on its standard input: "fail CALL N ERRNO" makes the N-th call from now on fail, once; "count CALL" tells how many
there were since the last "fail", and lets all succeed. DESCRIPTORS, if not 0, is its limit of open files.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

from usermm.hypervisor import closings, memfds
from usermm.hypervisor.embedded import Hypervisor


class Fault:
    """What is to fail, and how many calls of that name there were."""

    def __init__(self) -> None:
        self.call, self.at, self.errno, self.count = "", 0, 0, 0

    def set(self, call: str, at: int, number: int) -> None:
        """From now on."""
        self.call, self.at, self.errno, self.count = call, at, number, 0

    def strikes(self, call: str) -> bool:
        """Whether this one is it."""
        if call != self.call:
            return False
        self.count += 1
        return self.count == self.at


fault = Fault()


def failing(call: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """As Python's wrappers of system calls fail."""

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if fault.strikes(call):
            raise OSError(fault.errno, os.strerror(fault.errno))
        return function(*arguments, **options)

    return wrapper


class FailingLibrary:
    """As ctypes' functions do: -1, and errno."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def wrapper(*arguments: Any) -> Any:
            if fault.strikes(name):
                ctypes.set_errno(fault.errno)
                return -1
            return function(*arguments)

        return wrapper


def patch() -> None:
    """All that the path of a grant, a port or a watch calls."""
    for module, names in (
        (os, ("memfd_create", "ftruncate", "fchmod", "open", "dup", "pread", "pwrite", "write")),
        (fcntl, ("fcntl",)),
        (socket, ("socketpair",)),
        (socket.socket, ("sendmsg", "send", "setsockopt")),
    ):
        for name in names:
            setattr(module, name, failing(name, getattr(module, name)))
    for part in (closings, memfds):
        part._libc = FailingLibrary(part._libc)  # type: ignore[attr-defined]


def main() -> None:
    """Serves until its standard input ends."""
    if int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    with Hypervisor(sys.argv[1]):
        patch()
        print("listening", flush=True)
        for line in sys.stdin:
            order, call, *numbers = line.split()
            if order == "fail":
                fault.set(call, *map(int, numbers))
                print("ready", flush=True)
            else:
                count, fault.call = fault.count, ""
                print(count, flush=True)


if __name__ == "__main__":
    main()
