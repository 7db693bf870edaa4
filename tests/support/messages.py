"""Python objects over a stream between a test and a process of its own."""

from __future__ import annotations

import pickle
import struct
from typing import Any, Protocol

_LENGTH = struct.Struct("=Q")


class Stream(Protocol):
    """A socket, or something that does the same."""

    def sendall(self, data: bytes, /) -> None: ...

    def recv(self, most: int, /) -> bytes: ...


def send(stream: Stream, message: object) -> None:
    data = pickle.dumps(message)
    stream.sendall(_LENGTH.pack(len(data)) + data)


def receive(stream: Stream) -> Any:
    """Raises EOFError when the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return pickle.loads(_exactly(stream, length))


def _exactly(stream: Stream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = stream.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
