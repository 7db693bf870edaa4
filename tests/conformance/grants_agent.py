"""A domain of usermm that does what it is told: in this process, or as a program of its own, by messages."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import socket
import sys
from typing import Any

from support.messages import Stream, receive, send
from support.processes import in_child

import usermm
from usermm.grants import user_memory
from usermm.grants.evtchn import Evtchn
from usermm.grants.gntalloc import Gntalloc
from usermm.grants.gntdev import Gntdev
from usermm.grants.local_gntalloc import GrantedPages

PAGE = 4096
_PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


class Agent:
    """The domain, its files by number, its mappings by address."""

    def __init__(self, path: str, domid: int | None, backend: str) -> None:
        self.domain = usermm.Domain(path or None, domid=domid, backend=backend)  # type: ignore[arg-type]
        self.domid = self.domain.domid
        self._files: list[Any] = []
        self._mappings: dict[int, Any] = {}
        self._placed: list[tuple[int, int]] = []

    def open(self, device: str, personality: str) -> int:
        opened: Gntalloc | Gntdev | Evtchn
        if device == "gntdev":
            opened = self.domain.open_gntdev(personality)  # type: ignore[arg-type]
        else:
            opened = self.domain.open_gntalloc() if device == "gntalloc" else self.domain.open_evtchn()
        self._files.append(opened._file)
        return len(self._files) - 1

    def ioctl(self, file: int, request: int, argument: bytes) -> tuple[int, bytes]:
        changed = bytearray(argument)
        return self._files[file].ioctl(request, changed), bytes(changed)

    def mmap(self, file: int, length: int, prot: int, flags: int, offset: int) -> int:
        memory = self._files[file].mmap(length, prot, flags, offset)
        self._mappings[memory.address] = memory
        return int(memory.address)

    def munmap(self, address: int) -> None:
        self._mappings.pop(address).close()

    def close_file(self, file: int) -> None:
        self._files[file].close()

    def read(self, file: int, size: int) -> bytes:
        return bytes(self._files[file].read(size))

    def write(self, file: int, data: bytes) -> int:
        return int(self._files[file].write(data))

    def readable(self, file: int, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._files[file].fileno(), select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def place(self, data: bytes, at_end: bool) -> int:
        """Anonymous pages, and one after them that nobody can read."""
        length = max(1, -(-len(data) // PAGE)) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, length + PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        _libc.mprotect(ctypes.c_void_p(start + length), ctypes.c_size_t(PAGE), _PROT_NONE)
        self._placed.append((start, length + PAGE))
        address = start + length - len(data) if at_end else start
        ctypes.memmove(address, data, len(data))
        return int(address)

    def peek(self, address: int, length: int) -> bytes:
        return user_memory.read(address, length, "peek")

    def poke(self, address: int, data: bytes) -> None:
        user_memory.write(address, data, "poke")

    def peek_in_child(self, address: int, length: int) -> bytes:
        return _answer_of(lambda: user_memory.read(address, length, "peek"))

    def ioctl_in_child(self, file: int, request: int, argument: bytes) -> bytes:
        return _answer_of(lambda: self.ioctl(file, request, argument)[1])

    def revoke(self, file: int, reference: int) -> None:
        """Of a page that is mapped here."""
        granted = [each for each in self._mappings.values() if isinstance(each, GrantedPages)]
        for memory in granted:
            page = 0
            for allocated, first, pages in memory._parts:
                at = reference - allocated.first_reference - first
                if 0 <= at < pages:
                    self._files[file].revoke(reference, 1, memory, page + at)
                    return
                page += pages
        raise OSError(errno.EINVAL, "revoke: not mapped here")

    def settle(self) -> None:
        """What this domain told the hypervisor is done."""
        self.domain.is_isolated_from(self.domid)

    def has_ended(self, domid: int) -> bool:
        try:
            self.domain.is_isolated_from(domid)
        except OSError as error:
            return error.errno == errno.ENOENT
        return False

    def end(self) -> None:
        """As much of a crash as can be had without ending the process."""
        for memory in self._mappings.values():
            memory.close()
        self._mappings.clear()
        self.domain.close()
        for file in self._files:
            file.close()
        for start, length in self._placed:
            _libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(length))
        self._placed.clear()


def _answer_of(action: Any) -> bytes:
    """What a forked child gets from `action`, or its OSError."""

    def attempt() -> tuple[int, bytes]:
        try:
            return 0, action()
        except OSError as error:
            return error.errno or errno.EIO, b""

    number, data = in_child(attempt)
    if number:
        raise OSError(number, "in the child")
    return bytes(data)


def serve(channel: Stream) -> None:
    """A message "start" has an agent's arguments, each one after that a method's name and arguments.

    "crash" ends the process and has no answer.
    """
    agent: Agent | None = None
    while True:
        try:
            name, *arguments = receive(channel)
        except (EOFError, ConnectionError):
            return
        if name == "crash":
            os._exit(0)
        try:
            if name == "start" or agent is None:
                agent = Agent(*arguments)
                answer: object = agent.domid
            else:
                answer = getattr(agent, name)(*arguments)
            send(channel, (0, answer))
        except OSError as error:
            send(channel, (error.errno or errno.EIO, str(error)))
        except Exception as error:
            send(channel, (-1, repr(error)))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)
    os._exit(0)  # nothing is closed: what there is goes with the process
