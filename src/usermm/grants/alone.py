"""One call at a time inside an object, for threads, finalizers and signal handlers alike.

A lock alone is not enough. A finalizer runs in any thread: also in the one that the holder of the lock waits for, an
embedded hypervisor's. A signal handler runs in the middle of its own thread's call. Neither may wait, and neither may
find the object half changed.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar

from usermm._core import TryLock
from usermm.errors import DeviceError, grant_refused
from usermm.hypercalls import serving

Answer = TypeVar("Answer")


class Rank(enum.IntEnum):
    """What may be waited for from inside what: the higher from the lower. So no two threads wait for each other."""

    DOMAIN = 1
    DEVICE = 2
    FILE = 3
    SESSION = 4


_deepest: dict[int, int] = {}
"""By threads: the highest rank that each is inside of."""


class Alone:
    """`run` for calls that have an answer, `finish` for those that must happen and have none."""

    def __init__(self, rank: Rank) -> None:
        self._rank = int(rank)
        self._lock = threading.RLock()  # it has an owner from the first instruction on, whatever interrupts it
        self._is_inside = False
        self._unfinished: deque[Callable[[], object]] = deque()

    def run(self, call: str, function: Callable[[], Answer]) -> Answer:
        """What `function` returns; waits for its turn.

        GrantError (EDEADLK) in the name of `call`: a signal handler or a finalizer asks while this thread is inside, or
        is where others wait for it who are inside; or it is an embedded hypervisor's.
        """
        thread = get_ident()
        before = _deepest.get(thread, 0)
        if before >= self._rank or (serving.threads and serving.is_here()):
            return self._run_if_free(call, function)
        try:
            with self._lock:
                try:
                    _deepest[thread] = self._rank
                    self._is_inside = True
                    return function()
                finally:
                    self._is_inside = False
                    _deepest[thread] = before  # no call here, which could be interrupted
        finally:
            if self._unfinished:
                self._settle()

    def _run_if_free(self, call: str, function: Callable[[], Answer]) -> Answer:
        """Does not wait, which others could be waiting for."""
        if serving.is_here():
            raise _deadlock(call)
        try:
            with TryLock(self._lock) as got:
                if not got or self._is_inside:
                    raise _deadlock(call)
                try:
                    self._is_inside = True
                    return function()
                finally:
                    self._is_inside = False
        finally:
            if self._unfinished:
                self._settle()

    @property
    def refuses(self) -> bool:
        """Whether run() would not wait."""
        return _deepest.get(get_ident(), 0) >= self._rank or (bool(serving.threads) and serving.is_here())

    def check(self, call: str) -> None:
        """Raises as run() does."""
        if self.refuses:
            raise _deadlock(call)

    def do(self, call: str, function: Callable[[], object]) -> None:
        """As run(); but where that would refuse it is done when this thread leaves, and nobody hears of an OSError."""
        if self.refuses:
            self.finish(lambda: _quietly(function), wait=False)
        else:
            self.run(call, function)

    def finish(self, function: Callable[[], object], *, wait: bool) -> None:
        """Has `function`, which does not fail, carried out: now, or by whoever is inside when it leaves.

        With `wait` now, unless run() would not wait.
        """
        if not wait or self.refuses:
            self._unfinished.append(function)
            self._settle()
            return
        if self._unfinished:  # what was asked for before comes before
            self._settle()
        self.run("finish", function)

    def _settle(self) -> None:
        thread = get_ident()
        before = _deepest.get(thread, 0)
        while self._unfinished:
            try:
                _deepest[thread] = self._rank if self._rank > before else before
                with TryLock(self._lock) as got:
                    if not got or self._is_inside:  # who is inside, maybe this thread, does it when it leaves
                        return
                    self._carry_out()
            finally:
                _deepest[thread] = before

    def _carry_out(self) -> None:
        try:
            self._is_inside = True
            while self._unfinished:
                self._unfinished.popleft()()
        finally:
            self._is_inside = False


def _deadlock(call: str) -> DeviceError:
    text = f"{call}: this thread is in such a call, or serves it: do it after the signal handler or finalizer"
    return grant_refused(errno.EDEADLK, text)


def _quietly(function: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        function()
