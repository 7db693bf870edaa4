"""Channels whose two ends are in one process."""

from __future__ import annotations

from support.threads import running
from usermm import Channel, Domain, Listener

WAIT_S = 20


def meet(listener: Listener, domain: Domain, *, slots: int = 4) -> tuple[Channel, Channel]:
    """(the listener's end, the end of `domain`, which connects)."""
    accepted: list[Channel] = []
    with running(lambda: accepted.append(listener.accept(WAIT_S))):
        connected = Channel.connect(domain, listener._domain.domid, listener.name, WAIT_S, slots=slots)
    return accepted[0], connected


def joined(here: Domain, there: Domain, *, slots: int = 4) -> tuple[Channel, Channel]:
    """(the end of `here`, which listens for nobody else, the end of `there`)."""
    with Channel.listen(here, "door", there.domid, slots=slots) as listener:
        return meet(listener, there, slots=slots)
