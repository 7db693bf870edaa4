"""Threads that must end, and signals that interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE_S = 20


class Gate:
    """A call that stays inside until it is let out: when a with block over it ends, or at `opened.set()`.

    The block itself begins when somebody is inside.
    """

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(PATIENCE_S), "nobody opened the gate"

    def __enter__(self) -> None:
        assert self.entered.wait(PATIENCE_S), "nobody came to the gate"

    def __exit__(self, *_: object) -> None:
        self.opened.set()


@contextlib.contextmanager
def running(*functions: Callable[[], Any]) -> Iterator[list[threading.Thread]]:
    """A thread for each, which must end, without an exception, soon after the end of the block."""
    failures: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


def in_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns, or raises, in a thread of its own."""
    answers = []
    with running(lambda: answers.append(function())):
        pass
    return answers[0]


@contextlib.contextmanager
def alarm(handler: Callable[[int, Any], Any], after_s: float, every_s: float = 0) -> Iterator[None]:
    """SIGALRM goes to `handler`, in the main thread."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after_s, every_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
