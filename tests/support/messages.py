"""Python objects over a stream between a test and a process of its own."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("=Q")


def send(stream: socket.socket, message: object) -> None:
    data = pickle.dumps(message)
    stream.sendall(_LENGTH.pack(len(data)) + data)


def receive(stream: socket.socket) -> Any:
    """Raises EOFError when the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return pickle.loads(_exactly(stream, length))


def _exactly(stream: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = stream.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
