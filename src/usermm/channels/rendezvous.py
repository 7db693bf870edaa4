"""How two domains meet: a listener's directory in the store, where connectors leave what they share.

A request is a node below <listener's home>/channels/<name>: its owner is who asks, which the hypervisor vouches for.
What it says is worth nothing to anybody else, since grants and ports are for one domain.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from usermm.channels.rings import CONTROL_PAGES, Geometry, Side
from usermm.errors import (
    ArgumentError,
    BadReferenceError,
    DeviceError,
    PeerGoneError,
    PermissionDeniedError,
    UsermmError,
    protocol_broken,
)
from usermm.grants.arguments import domain_number
from usermm.grants.files import PAGE_BYTES
from usermm.grants.gntalloc import Allocation
from usermm.grants.waiter import Waiter

if TYPE_CHECKING:
    from usermm.grants.domain import Domain

VERSION = 1
REQUEST, ANSWER, REFUSAL = b"?", b"=", b"!"
_PAUSE_S = 0.01
_MOST_LETTERS = 128  # with room below it for the requests' nodes
_NAME = re.compile(rf"[A-Za-z0-9_@-]{{1,{_MOST_LETTERS}}}")
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
        for memory in (self.control, self.data):
            with contextlib.suppress(BufferError):
                memory.close()


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


def directory_of(domid: int, name: str) -> str:
    """Where a listener is found."""
    _check_name("channel: name", name)
    return f"/local/domain/{domid}/channels/{name}"


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(f"{what} {name!r:.60} must have 1 to {_MOST_LETTERS} letters, digits and -_@")


def domid_of(domain: Domain, peer: int | str) -> int:
    """A domain by its number or name. Raises BadReferenceError (ENOENT), ArgumentError for what can be neither."""
    if not isinstance(peer, str):
        return domain_number(peer, "connect: peer")
    _check_name("connect: peer", peer)
    return int(domain.store.read(f"/names/{peer}"))


Met = tuple[int, "Shared", Side, Waiter]
"""(the peer's domid, what this side shares, what the peer shares, the port)."""


def ask(domain: Domain, peer: int | str, name: str, geometry: Geometry, deadline: float) -> Met:
    """The connector's half."""
    domid = _wait_for_listener(domain, peer, name, deadline)
    shared = Shared(domain, domid, geometry)
    port = None
    try:
        port = domain.evtchn.bind_unbound_port(domid)
        path = f"{directory_of(domid, name)}/{domain.domid}-{os.urandom(6).hex()}"
        store = domain.store
        store.mkdir(path)
        try:
            store.set_permissions(path, (domain.domid, "n"), (domid, "b"))
            with store.watch(path) as watch:
                store.write(path, REQUEST + shared.offer(port).pack())
                answer = store.read(path)
                while answer[:1] == REQUEST:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0 or not store.is_introduced(domid):
                        raise _nobody(f"connect({name})", "nobody accepted: is the other side in accept()?", left_s)
                    watch.read(min(left_s, 1.0))
                    answer = store.read(path)
        finally:
            with contextlib.suppress(DeviceError):
                store.remove(path)
        if answer[:1] != ANSWER:
            text = f"connect({name}): the peer refused: {answer[1:].decode(errors='replace')[:80]}"
            raise PeerGoneError(errno.ECONNREFUSED, text)
        return domid, shared, *_answered(domain, domid, Offer.unpack(answer[1:]), port)
    except BaseException:
        if port is not None:
            domain.evtchn.unbind(port)
        shared.close()
        raise


def _answered(domain: Domain, domid: int, offer: Offer, port: int) -> tuple[Side, Waiter]:
    """What the listener shares, and the port, which it has bound; else nobody would ever tell of its end."""
    try:
        side = map_offer(domain, domid, offer)
    except BadReferenceError as error:
        text = "connect: the peer answered, and is gone, or does not share what it said: connect again"
        raise PeerGoneError(errno.EPIPE, text) from error
    try:
        waiter = domain.evtchn.waiter(port)
        if not waiter.wait(0):
            raise protocol_broken("it answered, and did not bind the port")
    except BaseException:
        release_side(side)
        raise
    return side, waiter


def accept_request(domain: Domain, path: str, geometry: Geometry, peer: int | None) -> Met | None:
    """The listener's half for one request; None when it is none, or no longer one."""
    store = domain.store
    try:
        asker, *others = store.permissions(path)  # type: ignore[attr-defined] # Nodes has a method called list
        text = store.read(path)
    except (BadReferenceError, PermissionDeniedError):
        return None
    if text[:1] != REQUEST or (domain.domid, "b") not in others:  # who lets nobody answer is not looked at again
        return None
    if peer is not None and asker.domid != peer:
        _say(domain, path, REFUSAL + b"it listens for another domain")
        return None
    port, shared, side = None, None, None
    try:
        offer = Offer.unpack(text[1:])
        side = map_offer(domain, asker.domid, offer)
        shared = Shared(domain, asker.domid, geometry)
        port = domain.evtchn.bind_interdomain(asker.domid, offer.port)
        waiter = domain.evtchn.waiter(port)
        waiter.notify()  # so that the connector knows, when it reads the answer, that this end is bound
        store.write(path, ANSWER + shared.offer(0).pack())
        return asker.domid, shared, side, waiter
    except UsermmError as error:
        if port is not None:
            domain.evtchn.unbind(port)
        if shared is not None:
            shared.close()
        if side is not None:
            release_side(side)
        _say(domain, path, REFUSAL + str(error).encode(errors="replace")[:200])
        return None


def _say(domain: Domain, path: str, text: bytes) -> None:
    with contextlib.suppress(DeviceError):
        domain.store.write(path, text)


def _wait_for_listener(domain: Domain, peer: int | str, name: str, deadline: float) -> int:
    while True:
        try:
            domid = domid_of(domain, peer)
            if domain.store.exists(directory_of(domid, name)):
                return domid
        except PermissionDeniedError:  # a store does not say whether what one may not read is there
            pass
        except BadReferenceError as error:
            if error.errno != errno.ENOENT:
                raise
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            text = f"domain {peer} does not listen for this one: call Channel.listen there"
            raise _nobody(f"connect({name})", text, left_s)
        time.sleep(min(_PAUSE_S, left_s))


def _nobody(call: str, text: str, left_s: float) -> OSError:
    if left_s <= 0:
        return TimeoutError(errno.ETIMEDOUT, f"{call}: {text}")
    return PeerGoneError(errno.EPIPE, f"{call}: the peer is gone: connect again when it is back")


PAGE = PAGE_BYTES
