"""A pair that goes on while others crash: it counts its beats, and remembers its longest one."""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from collections.abc import Callable
from contextlib import closing

from support.crash_pair import Child
from usermm.errors import GrantError
from usermm.grants.domain import Domain

LEFT, RIGHT = 201, 202
PATIENCE_S = 5.0
_PAUSE_S = 0.002
_CONTROL_CALLS_EVERY = 8
_STATE = struct.Struct("=QQ")


class Bystanders:
    """Two processes: a number goes there and back by a granted page and an event channel, now and then with a call."""

    def __init__(self, socket: str) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the children
        self._left = Child(lambda say: self._run_left(socket, say))
        self._right = Child(lambda _: _run_right(socket))
        assert self._left.hear() == "beating"

    @property
    def beats(self) -> int:
        """How many there were."""
        return int(_STATE.unpack_from(self._memory)[0])

    @property
    def longest_s(self) -> float:
        """From the sending of a number to its return, waiting for a processor included."""
        return float(_STATE.unpack_from(self._memory)[1] / 1e9)

    def end(self) -> None:
        """Ends both."""
        self._left.end()
        self._right.end()
        self._memory.close()

    def _run_left(self, socket: str, say: Callable[[str], None]) -> None:
        with Domain(socket, domid=LEFT) as domain, closing(domain.gntalloc.allocate(RIGHT, writable=True)) as page:
            port = domain.evtchn.bind_unbound_port(RIGHT)
            while not domain.store.is_introduced(RIGHT):
                time.sleep(0.001)
            domain.store.write("page", f"{page.references[0]} {port}")
            domain.store.set_permissions("page", (LEFT, "n"), (RIGHT, "r"))
            number = longest_ns = 0
            while True:
                number += 1
                start_ns = time.monotonic_ns()
                page.store(0, number)
                domain.evtchn.notify(port)
                while page.load(4) != number:
                    assert domain.evtchn.read(PATIENCE_S), f"beat {number} is missed"
                    domain.evtchn.unmask(port)
                if number % _CONTROL_CALLS_EVERY == 0:
                    domain.store.write("beat", str(number))
                    assert domain.store.read("beat") == str(number).encode()
                    assert not domain.is_isolated_from(RIGHT)
                if number > 1:
                    longest_ns = max(longest_ns, time.monotonic_ns() - start_ns)
                else:
                    say("beating")
                _STATE.pack_into(self._memory, 0, number, longest_ns)
                time.sleep(_PAUSE_S)


def _run_right(socket: str) -> None:
    with Domain(socket, domid=RIGHT) as domain:
        while True:
            with contextlib.suppress(GrantError):
                reference, port = map(int, domain.store.read(f"/local/domain/{LEFT}/page").split())
                break
            time.sleep(0.001)
        with closing(domain.gntdev.map(LEFT, reference, writable=True)) as page:
            bound = domain.evtchn.bind_interdomain(LEFT, port)
            while True:
                domain.evtchn.read(None)
                domain.evtchn.unmask(bound)
                page.store(4, page.load(0))
                domain.evtchn.notify(bound)
