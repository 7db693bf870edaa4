"""Which threads of this process serve domains: who asked a hypervisor for something there would wait for itself."""

from __future__ import annotations

import threading
from typing import Final

threads: Final[set[int]] = set()


def begin() -> None:
    """This thread serves from here on."""
    threads.add(threading.get_ident())


def end() -> None:
    """No longer."""
    threads.discard(threading.get_ident())


def is_here() -> bool:
    """Whether this thread serves. The garbage collector runs anybody's finalizers in it."""
    return threading.get_ident() in threads
