"""The thread that gives memory back when nobody asks the cache any more.

A look-up finds out by itself what went; this is for programs that free their buffers and then do something else. It
bounds how long memory stays pinned: REACTION_S after it was unmapped, and twice the cache's `linger_s` after nobody
asked for it and no object that had is alive.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from typing import Protocol

from usermm.errors import DeviceError

REACTION_S = 0.05
"""Invalidations come in crowds: a crowd is dealt with at once. Most are found by the next look-up before that."""

_AGES = 2
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Cache(Protocol):
    """As much of a cache as its upkeep needs."""

    def fileno(self) -> int: ...

    def expire(self, ages: int, /) -> int: ...


def begin(cache: Cache, linger_s: float | None) -> None:
    """Starts the thread; it ends when the cache is closed or nobody has it any more.

    Raises DeviceError, OSError, RuntimeError (no thread can be started). A subinterpreter has none: it could not end.
    """
    signal = _Signal(cache.fileno())
    try:
        arguments = (weakref.ref(cache), signal, linger_s)
        threading.Thread(target=_run, args=arguments, name="usermm cache upkeep", daemon=True).start()
    except BaseException:
        signal.close()
        raise


class _Signal:
    """A copy of the cache's descriptor, which outlives the cache, and which a forked child closes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)
        self._file = _identity(self.descriptor)
        _signals.add(self)

    def close(self) -> None:
        """Once. Whoever closes all descriptors, as daemons do, may have given the number to another file."""
        _signals.discard(self)
        with contextlib.suppress(OSError):
            if _identity(self.descriptor) == self._file:
                os.close(self.descriptor)


_signals: set[_Signal] = set()


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _close_copies() -> None:
    for signal in list(_signals):
        signal.close()


os.register_at_fork(after_in_child=_close_copies)


def _run(reference: weakref.ref[Cache], signal: _Signal, linger_s: float | None) -> None:
    poll = select.poll()
    poll.register(signal.descriptor, select.POLLIN)
    try:
        period_s = None if linger_s is None else linger_s / _AGES
        due_s = time.monotonic() + (period_s or 0)
        while _wait(poll, None if period_s is None else due_s):
            aged = period_s is not None and time.monotonic() >= due_s
            if aged and period_s is not None:
                due_s = time.monotonic() + period_s
            if not _expire(reference(), _AGES if aged else 0):
                return
    finally:
        signal.close()


def _wait(poll: select.poll, until_s: float | None) -> bool:
    """Until something went or the time has come; False: the cache is closed."""
    left_ms = None if until_s is None else max(0.0, until_s - time.monotonic()) * 1000
    for _, events in poll.poll(left_ms):
        if events & _GONE:
            return False
        time.sleep(REACTION_S)
    return True


def _expire(cache: Cache | None, ages: int) -> bool:
    if cache is None:
        return False
    with contextlib.suppress(DeviceError):  # closed, or the monitor failed: the caller of get is told
        cache.expire(ages)
        return True
    return False
