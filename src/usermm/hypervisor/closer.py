"""Closing sockets that others could fill: what is in a socket is closed with it, and that takes as long as they like.

A domain can let its own end of a port accept descriptors, and have a TCP socket with SO_LINGER sent there: whoever has
the last copy of the end sleeps for its linger time.
"""

from __future__ import annotations

import array
import collections
import fcntl
import socket
import termios
import threading

MOST_BURDENS = 64
"""Ends of one user's that are being closed, before it gets no new ones."""

_MUCH_BYTES = 4096
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


class Closer:
    """Closes at once what has only events in it. A thread closes the rest, and ends when it has nothing to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[socket.socket, int]] = collections.deque()
        self._burdens: collections.Counter[int] = collections.Counter()
        self._is_running = False

    def close(self, end: socket.socket, uid: int) -> None:
        """Of a domain of the user `uid`. Never waits."""
        if not _may_take_long(end):
            end.close()
            return
        with self._lock:
            self._waiting.append((end, uid))
            self._burdens[uid] += 1
            starts = not self._is_running
            self._is_running = True
        if starts:
            threading.Thread(target=self._run, name="usermm closer", daemon=True).start()

    def burdens(self, uid: int) -> int:
        """How many ends of the user are not closed yet."""
        return self._burdens[uid]

    def forget(self) -> None:
        """In a forked child: no copy of these is the last one."""
        for end, _ in self._waiting:
            end.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                end, uid = self._waiting.popleft()
            end.close()
            with self._lock:
                self._burdens[uid] -= 1


def _may_take_long(end: socket.socket) -> bool:
    """Whether there is a descriptor among its bytes, or too many of them to tell."""
    unread = array.array("i", [0])
    fcntl.ioctl(end, termios.FIONREAD, unread)
    if not unread[0]:
        return False
    try:
        _, _, flags, _ = end.recvmsg(_MUCH_BYTES, 0, _PEEK)
    except OSError:
        return True  # out-of-band bytes in front
    return unread[0] > _MUCH_BYTES or bool(flags & socket.MSG_CTRUNC)
