"""What each side of a channel shares with the other, and how it says so."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from usermm.channels.rings import CONTROL_PAGES, Geometry, Side
from usermm.errors import ArgumentError, protocol_broken
from usermm.grants.gntalloc import Allocation

if TYPE_CHECKING:
    from usermm.grants.domain import Domain

VERSION = 1
_FIELDS = 7


@dataclass(frozen=True, slots=True)
class Offer:
    """What one side tells the other: references, a port (0 in an answer) and its geometry."""

    control: int
    data: int
    port: int
    geometry: Geometry

    def pack(self) -> bytes:
        """As text, which a store is made for."""
        return " ".join(map(str, (VERSION, self.control, self.data, self.port, *self.geometry))).encode()

    @classmethod
    def unpack(cls, text: bytes) -> Offer:
        """Raises ProtocolError for what no honest side writes."""
        words = text.split()
        if len(words) != _FIELDS or not all(word.isdigit() and len(word) <= 10 for word in words):
            raise protocol_broken(f"an offer {text[:40]!r}")
        version, control, data, port, *sizes = map(int, words)
        geometry = Geometry(*sizes)
        if version != VERSION:
            raise protocol_broken(f"an offer of version {version}: this side speaks {VERSION}")
        try:
            geometry.check()
        except ArgumentError as error:
            raise protocol_broken(f"an offer of {geometry}") from error
        if max(control + CONTROL_PAGES, data + geometry.pages, port + 1) > 1 << 32:
            raise protocol_broken(f"an offer of references from {control} and {data} on, and port {port}")
        return cls(control, data, port, geometry)


class Shared:
    """What this side shares with the peer."""

    def __init__(self, domain: Domain, peer: int, geometry: Geometry) -> None:
        """All of it is granted read-only. It comes from a file of its own: the driver's limit is for other uses."""
        with domain.open_gntalloc(limit=CONTROL_PAGES + geometry.pages) as file:
            self.control: Allocation = file.allocate(peer, CONTROL_PAGES)
            self.data: Allocation = file.allocate(peer, geometry.pages)
        self.geometry = geometry

    def side(self) -> Side:
        """For the rings."""
        return Side(self.control, self.data, self.geometry)

    def offer(self, port: int) -> Offer:
        """For the peer."""
        return Offer(self.control.references[0], self.data.references[0], port, self.geometry)

    def close(self) -> None:
        """Deallocates; a view that is left keeps the memory."""
        release_side(self.side())


def map_offer(domain: Domain, peer: int, offer: Offer) -> Side:
    """The peer's pages here. Raises BadReferenceError for references that are none."""
    control = domain.gntdev.map(peer, range(offer.control, offer.control + CONTROL_PAGES))
    try:
        data = domain.gntdev.map(peer, range(offer.data, offer.data + offer.geometry.pages))
    except BaseException:
        control.close()
        raise
    return Side(control, data, offer.geometry)


def release_side(side: Side) -> None:
    """Unmaps; what is looked at stays until its last view goes."""
    for memory in (side.control, side.data):
        with contextlib.suppress(BufferError):
            memory.close()
