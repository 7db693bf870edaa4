"""An event loop that can be asked to stand still between two turns: a process that serves domains may fork at any time.

A forked child would have copies of everything: descriptors on their way to a domain, which would keep a grant mapped as
long as the child lives; connections, by which domains would never hear that the hypervisor is gone; the socket on which
others would wait for an answer. So a fork waits for the end of a turn, and the child closes all of it.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import weakref
from typing import Protocol

from usermm.hypercalls import serving


class Forgetful(Protocol):
    """Who serves from a thread of this process."""

    turns: Turns

    def forget(self) -> None:
        """In a forked child: closes its descriptors, and says nothing to anybody."""


class Turns(selectors.EpollSelector):
    """Whoever has `lock` finds the loop's thread waiting and nothing half done. Made and closed in that thread."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.thread = threading.get_ident()
        serving.begin()
        self.lock.acquire()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Waits, and lets others have the lock meanwhile."""
        self.lock.release()
        try:
            return super().select(timeout)
        finally:
            self.lock.acquire()

    def close(self) -> None:
        """The loop has ended."""
        super().close()
        serving.end()
        self.lock.release()

    def forget(self) -> None:
        """In a forked child: the parent goes on waiting by it."""
        super().close()

    def loop(self) -> asyncio.AbstractEventLoop:
        """One that waits by this selector."""
        return asyncio.SelectorEventLoop(self)


_serving: weakref.WeakSet[Forgetful] = weakref.WeakSet()
_forking = threading.Lock()
_stopped: list[Forgetful] = []


def add(server: Forgetful) -> None:
    """From here on forks wait for it, and their children forget it."""
    _serving.add(server)


def remove(server: Forgetful) -> None:
    """It has ended."""
    _serving.discard(server)


def _before() -> None:
    _forking.acquire()
    for server in list(_serving):
        if server.turns.thread != threading.get_ident():
            server.turns.lock.acquire()
            _stopped.append(server)


def _in_parent() -> None:
    while _stopped:
        _stopped.pop().turns.lock.release()
    _forking.release()


def _in_child() -> None:
    for server in list(_serving):
        server.forget()
    _serving.clear()
    _in_parent()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
