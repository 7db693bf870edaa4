"""What a channel is expected to do: for each direction a queue, what is on loan, what is held, and a stream."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.threads import running

import usermm
from usermm.channels.arrays import Slot
from usermm.channels.channel import Lost

SLOT_BYTES = STREAM_BYTES = 4096
PATIENCE_S = 20


@dataclass
class Message:
    """As it was sent, and the array that it was received as."""

    data: bytes
    kind: str = ""
    shape: tuple[int, ...] = ()
    array: Any = None

    def check(self, *, writeable: bool) -> None:
        """The array is what was sent."""
        shape = self.shape if self.kind else (len(self.data),)
        assert (self.array.dtype.str, self.array.shape) == (self.kind or "|u1", shape)
        assert self.array.tobytes() == self.data
        assert self.array.flags.writeable == writeable

    def let_go(self, through_a_part: bool) -> None:
        """The last view goes: the array, or one that was made of it."""
        part = self.array[..., None].T if through_a_part else None
        self.array = None
        assert part is None or np.ascontiguousarray(part.T).tobytes() == self.data


@dataclass
class Flow:
    """One direction."""

    slots: int
    queue: deque[Message] = field(default_factory=deque)
    loans: list[tuple[Slot, Message]] = field(default_factory=list)
    held: list[Message] = field(default_factory=list)
    stream: bytearray = field(default_factory=bytearray)
    sent: int = 0
    never_back: int = 0
    """What the receiver held when it closed its end."""

    @property
    def out(self) -> int:
        """Messages that were taken and not given back."""
        return self.never_back or len(self.held)

    @property
    def free(self) -> int:
        """Slots that can be had."""
        return self.slots - len(self.queue) - len(self.loans) - self.out

    @property
    def room(self) -> int:
        """Of the stream, in bytes."""
        return STREAM_BYTES - len(self.stream)

    @property
    def lost(self) -> Lost:
        """What would be lost if the receiver went now."""
        return Lost(len(self.queue), self.out, len(self.stream))

    def enter(self, message: Message) -> int:
        """It is sent; its number."""
        self.queue.append(message)
        self.sent += 1
        return self.sent


class Link:
    """One channel: end 0 connected, end 1 accepted. Flow n is what end n sends."""

    def __init__(self, domains: tuple[usermm.Domain, usermm.Domain], name: str, slots: int) -> None:
        self.domains, self.name, self.slots = domains, name, slots
        self.sizes = {"slots": slots, "slot_bytes": SLOT_BYTES, "stream_bytes": STREAM_BYTES}
        self.ends: list[usermm.Channel] = []
        self.meet()

    def meet(self) -> Lost | None:
        """Both ends anew: by reconnect(), which says what was lost, if the connector has not closed its end."""
        there = self.domains[1]
        with usermm.Channel.listen(there, self.name, **self.sizes) as listener:
            accepted: list[usermm.Channel] = []
            lost = None
            with running(lambda: accepted.append(listener.accept(PATIENCE_S))):
                if self.ends and not self.ends[0].closed:
                    lost = self.ends[0].reconnect(PATIENCE_S)
                else:
                    here, peer = self.domains[0], there.domid
                    self.ends[:1] = [usermm.Channel.connect(here, peer, self.name, PATIENCE_S, **self.sizes)]
        self.ends[1:] = accepted
        self.flows = [Flow(self.slots), Flow(self.slots)]
        return lost

    def close(self, end: int) -> None:
        """As often as one likes."""
        if not self.ends[end].closed:
            self.flows[1 - end].never_back = len(self.flows[1 - end].held)
        self.ends[end].close()
