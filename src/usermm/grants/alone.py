"""One call at a time inside an object, for threads, finalizers and signal handlers alike.

A lock alone is not enough. A finalizer runs in any thread: also in the one that the holder of the lock waits for, an
embedded hypervisor's. A signal handler runs in the middle of its own thread's call. Neither may wait, and neither may
find the object half changed.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar

from usermm.errors import grant_refused
from usermm.hypercalls import serving

Answer = TypeVar("Answer")


class Alone:
    """`run` for calls that have an answer, `finish` for those that must happen and have none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # it has an owner from the first instruction on, whatever interrupts it
        self._inside = 0
        """The thread."""
        self._unfinished: deque[Callable[[], object]] = deque()

    def run(self, call: str, function: Callable[[], Answer]) -> Answer:
        """What `function` returns; waits for its turn.

        GrantError (EDEADLK) in the name of `call`: this thread is inside, and a signal handler or a finalizer asks for
        more; or it is an embedded hypervisor's.
        """
        if serving.threads and serving.is_here():
            self.check(call)
        try:
            with self._lock:
                if self._inside:  # so by this thread
                    self.check(call)
                try:
                    self._inside = get_ident()
                    return function()
                finally:
                    self._inside = 0
        finally:
            if self._unfinished:
                self._settle()

    @property
    def refuses(self) -> bool:
        """Whether this thread is inside, or a hypervisor's."""
        return self._inside == get_ident() or (bool(serving.threads) and serving.is_here())

    def check(self, call: str) -> None:
        """Raises as run() does."""
        if self.refuses:
            text = f"{call}: this thread is in such a call, or serves it: do it after the signal handler or finalizer"
            raise grant_refused(errno.EDEADLK, text)

    def do(self, call: str, function: Callable[[], object]) -> None:
        """As run(); but where that would refuse it is done when this thread leaves, and nobody hears of an OSError."""
        if self.refuses:
            self.finish(lambda: _quietly(function), wait=False)
        else:
            self.run(call, function)

    def finish(self, function: Callable[[], object], *, wait: bool) -> None:
        """Has `function`, which does not fail, carried out: now, or by whoever is inside when it leaves.

        With `wait` now, unless it is this thread that is inside.
        """
        if not wait or self._inside == get_ident() or (serving.threads and serving.is_here()):
            self._unfinished.append(function)
            self._settle()
            return
        with self._lock:
            self._settle()
            try:
                self._inside = get_ident()
                function()
            finally:
                self._inside = 0
        if self._unfinished:
            self._settle()

    def _settle(self) -> None:
        while self._unfinished and self._lock.acquire(blocking=False):  # else its owner does this when it leaves
            try:
                if self._inside:  # then it is this thread, which will
                    return
                self._carry_out()
            finally:
                self._lock.release()

    def _carry_out(self) -> None:
        try:
            self._inside = get_ident()
            while self._unfinished:
                self._unfinished.popleft()()
        finally:
            self._inside = 0


def _quietly(function: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        function()
