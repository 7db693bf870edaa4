"""Speaks to tests/support/native/abi_driver.c: each thread by a channel of its own, each forked child too."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from support import compiled

_REQUEST = struct.Struct("=IIQ5Q")  # what, length of what follows, page to load afterwards, arguments
_REPLY = struct.Struct("=qQII")  # result or -errno, what was loaded, length of what follows, nothing
_U64 = (1 << 64) - 1
_PATIENCE_S = 20.0


class Call(enum.IntEnum):
    """In the order of `calls` in abi_driver.c."""

    NOTHING = 0
    OPEN = enum.auto()
    CLOSE = enum.auto()
    IOCTL_BUFFER = enum.auto()
    IOCTL_ADDRESS = enum.auto()
    READ = enum.auto()
    READ_TO = enum.auto()
    WRITE = enum.auto()
    POLL = enum.auto()
    SELECT = enum.auto()
    EPOLL = enum.auto()
    MAP_DEVICE = enum.auto()
    PEEK = enum.auto()
    MMAP = enum.auto()
    MUNMAP = enum.auto()
    MREMAP = enum.auto()
    MADVISE = enum.auto()
    MPROTECT = enum.auto()
    MOVE_BREAK = enum.auto()
    SIGNALS_ON = enum.auto()
    SIGNALS_COUNT = enum.auto()
    SIGNALS_OFF = enum.auto()
    THREAD = enum.auto()
    FORK = enum.auto()
    REAP = enum.auto()


class Reply:
    """What a call returned, what a plain load of the page gave right after it, and the bytes that came with it."""

    __slots__ = ("data", "loaded", "result")

    def __init__(self, result: int, loaded: int, data: bytes) -> None:
        self.result, self.loaded, self.data = result, loaded, data


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="usermm-conformance-")  # gone when Python ends


@functools.cache
def _program() -> Path:
    return compiled.program("abi_driver", Path(_directory().name))


class Driver:
    """The process, started with `preload` in LD_PRELOAD; how "raw" or "libc". Calls raise OSError."""

    def __init__(self, preload: Path, how: str) -> None:
        self._control, theirs = self._channel()
        self._lock = threading.Lock()
        self._own = threading.local()
        self._channels = [self._control]
        environment = {**os.environ, "LD_PRELOAD": str(preload)}
        with theirs:
            self._process = subprocess.Popen(
                [_program(), how, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    def _channel() -> tuple[socket.socket, socket.socket]:
        mine, theirs = socket.socketpair()
        mine.settimeout(_PATIENCE_S)
        return mine, theirs

    def call(self, what: Call, *arguments: int, page: int = 0, data: bytes = b"") -> Reply:
        """One call in the thread, or in the child, that this thread speaks to."""
        return _ask(self._mine(), what, *arguments, page=page, data=data)

    def _mine(self) -> socket.socket:
        channel: socket.socket | None = getattr(self._own, "channel", None)
        if channel is None:
            channel = self._own.channel = self._new_thread()
        return channel

    def _new_thread(self) -> socket.socket:
        mine, theirs = self._channel()
        with self._lock, theirs:
            self._channels.append(mine)
            _ask(self._control, Call.THREAD, descriptor=theirs.fileno())
        return mine

    @contextlib.contextmanager
    def forked(self) -> Iterator[None]:
        """This thread's calls are made by a child of the driver, which must end well."""
        channel = self._mine()
        mine, theirs = self._channel()
        with mine:
            with theirs:
                child = _ask(channel, Call.FORK, descriptor=theirs.fileno()).result
            self._own.channel = mine
            try:
                yield
            finally:
                self._own.channel = channel
        assert self.call(Call.REAP, child).result == 0, "the child failed"

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        try:
            status = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        assert status == 0, f"the driver ended with status {status}"


def _ask(
    channel: socket.socket, what: Call, *arguments: int, page: int = 0, data: bytes = b"", descriptor: int | None = None
) -> Reply:
    words = [argument & _U64 for argument in arguments] + [0] * (5 - len(arguments))
    request = _REQUEST.pack(what, len(data), page, *words) + data
    if descriptor is None:
        channel.sendall(request)
    else:
        socket.send_fds(channel, [request], [descriptor])
    result, loaded, length, _ = _REPLY.unpack(_receive(channel, _REPLY.size))
    answer = Reply(result, loaded, _receive(channel, length))
    if -4096 < result < 0:
        raise OSError(-result, f"{what.name.lower()}: {os.strerror(-result)}")
    return answer


def _receive(channel: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(length - len(parts))
        assert part, "the driver ended"
        parts += part
    return bytes(parts)
