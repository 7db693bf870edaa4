"""A stream of bytes over a console, which other programs and the kernel write to as well: lines of text, marked."""

from __future__ import annotations

import base64
import binascii
import os
import select
import time
import tty

_MARK = b"@usermm "
_CHUNK_BYTES = 65536


class ConsoleStream:
    """What `support.messages` needs of a socket, over the terminal at `path`."""

    def __init__(self, path: str, patience_s: float) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        self._patience_s = patience_s
        self._text = b""
        self._data = b""
        tty.setraw(self._descriptor)

    def sendall(self, data: bytes) -> None:
        """As one line."""
        line = _MARK + base64.b64encode(data) + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def recv(self, most: int) -> bytes:
        """TimeoutError: nothing came while one was patient."""
        deadline = time.monotonic() + self._patience_s
        while not self._data:
            if not select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"console: nothing within {self._patience_s} s, but {self._text[-200:]!r}")
            self._text += os.read(self._descriptor, _CHUNK_BYTES)
            *lines, self._text = self._text.split(b"\n")
            self._data += b"".join(map(_decoded, lines))
        data, self._data = self._data[:most], self._data[most:]
        return data

    def close(self) -> None:
        os.close(self._descriptor)


def _decoded(line: bytes) -> bytes:
    _, mark, text = line.partition(_MARK)
    try:
        return base64.b64decode(text.strip(), validate=True) if mark else b""
    except binascii.Error:
        return b""
