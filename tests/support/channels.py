"""Channels whose two ends are in one process."""

from __future__ import annotations

from support.threads import running
from usermm import Channel, Domain

WAIT_S = 20


def joined(here: Domain, there: Domain, *, slots: int = 4) -> tuple[Channel, Channel]:
    """(the end of `here`, which listens for nobody else, the end of `there`)."""
    with Channel.listen(here, "door", there.domid, slots=slots) as listener:
        accepted: list[Channel] = []
        with running(lambda: accepted.append(listener.accept(WAIT_S))):
            connected = Channel.connect(there, here.domid, "door", WAIT_S, slots=slots)
    return accepted[0], connected
