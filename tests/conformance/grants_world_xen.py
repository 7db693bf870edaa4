"""A real Xen, where /dev/xen is, with the same bytes through the kernel's drivers: one domain, or several guests."""

from __future__ import annotations

import contextlib
import os
from typing import Any, ClassVar

import pytest
from conformance.grants_guest import READY
from conformance.grants_world import World, listed
from conformance.grants_world_local import AgentDriver, Domain, Here, result
from support.console import ConsoleStream
from support.messages import receive, send

from usermm.uapi import xen_gntdev

_PATIENCE_S = 60.0
_GUESTS = "USERMM_XEN_GUESTS"
"""Where the tests run in dom0: the other guests' numbers and consoles, as in 1:/dev/pts/0,2:/dev/pts/1."""
_CANNOT = {
    "the peer's end is an event": "Xen unbinds the other end silently",
    "ports from 1": "the kernel's own ports come first",
    "references are not used twice": "Linux gives the number of a grant that ended to the next one",
    "closing ends what is not mapped": "a mapping keeps the driver's file open, and with it all that it granted",
    "unbinding takes an event along": "the driver has put it into the file's ring",
    "the personality of 2007": "the kernel has the driver of today",
}


@listed
class XenWorld(World):
    """One domain, which grants to itself."""

    name: ClassVar = "xen"
    cannot: ClassVar = {**_CANNOT, "several domains": "this domain is the only one, and grants to itself"}
    unused_domid = 0x7FEF

    @classmethod
    def unavailable(cls) -> str | None:
        if not os.path.exists(xen_gntdev.DEVICE_PATH):
            return f"no {xen_gntdev.DEVICE_PATH} here: `make xen` boots a machine that has it"
        return None

    def __init__(self) -> None:
        self._agents: list[AgentDriver] = []

    def make_domain(self, *, control: bool = False) -> Domain:  # noqa: ARG002
        self._agents.append(Here("", None, "xen"))
        return Domain(self._agents[-1])

    def close(self) -> None:
        for agent in self._agents:
            agent.crash()


class _Guest:
    """The agent is a process of another guest."""

    def __init__(self, domid: int, path: str) -> None:
        self.domid = domid
        self._console = ConsoleStream(path, _PATIENCE_S)
        self.call("start", "", domid, "xen")

    def call(self, name: str, *arguments: object) -> Any:
        send(self._console, (name, *arguments))
        answer = receive(self._console)
        while answer == READY:  # of a process before
            answer = receive(self._console)
        return result(answer)

    def crash(self) -> None:
        """Returns when there is the next, which would lose what this one has read already."""
        send(self._console, ("crash",))
        while receive(self._console) != READY:
            pass

    def close(self) -> None:
        self.crash()
        self._console.close()


@listed
class XenGuestsWorld(World):
    """Guests that grant to each other and to dom0, where the tests run. Their processes crash, they do not."""

    name: ClassVar = "xen-guests"
    cannot: ClassVar = {
        **_CANNOT,
        "the end of a domain": "a guest does not end with the test's process in it",
        "a free virtual interrupt": "xenstored has bound it",
        "virtual interrupts need control": "Xen lets every domain bind it, and tells only dom0",
    }
    unused_domid = 0x7FEF

    @classmethod
    def unavailable(cls) -> str | None:
        return None if _GUESTS in os.environ else "no other guests here: `make xen` boots a machine with two"

    def __init__(self) -> None:
        self._places = [each.partition(":") for each in os.environ[_GUESTS].split(",")]
        self._ends = contextlib.ExitStack()
        self._has_dom0 = False

    def make_domain(self, *, control: bool = False) -> Domain:
        """The guests first, then dom0, which has control."""
        if self._places and not control:
            domid, _, path = self._places.pop(0)
            guest = _Guest(int(domid), path)
            self._ends.callback(guest.close)
            return Domain(guest)
        if self._has_dom0:
            pytest.skip("there are no more domains here")
        self._has_dom0 = True
        agent = Here("", None, "xen")
        self._ends.callback(agent.crash)
        return Domain(agent)

    def close(self) -> None:
        self._ends.close()
