"""A real Xen, where /dev/xen is: one domain granting to itself, with the same bytes through the kernel's drivers."""

from __future__ import annotations

import os
from typing import ClassVar

from conformance.grants_world import World, listed
from conformance.grants_world_local import _Domain, _Here

from usermm.uapi import xen_gntdev


@listed
class XenWorld(World):
    name: ClassVar = "xen"
    cannot: ClassVar = {
        "the peer's end is an event": "Xen unbinds the other end silently",
        "several domains": "this domain is the only one, and grants to itself",
        "ports from 1": "the kernel's own ports come first",
        "references are not used twice": "Linux gives the number of a grant that ended to the next one",
        "closing ends what is not mapped": "a mapping keeps the driver's file open, and with it all that it granted",
        "unbinding takes an event along": "the driver has put it into the file's ring",
        "the personality of 2007": "the kernel has the driver of today",
    }
    unused_domid = 0x7FEF

    @classmethod
    def unavailable(cls) -> str | None:
        if not os.path.exists(xen_gntdev.DEVICE_PATH):
            return f"no {xen_gntdev.DEVICE_PATH} here: run it in a Xen guest or dom0 with the drivers loaded"
        return "needs a second guest that runs the tests' agent" if not os.environ.get("USERMM_XEN") else None

    def __init__(self) -> None:
        self._agents: list[_Here] = []

    def make_domain(self, *, control: bool = False) -> _Domain:  # noqa: ARG002
        self._agents.append(_Here("", None, "xen"))
        return _Domain(self._agents[-1])

    def close(self) -> None:
        for agent in self._agents:
            agent.crash()
