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
from typing import TYPE_CHECKING

from usermm.channels.offers import Offer, Shared, map_offer, release_side
from usermm.channels.rings import Geometry, Side
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
from usermm.grants.waiter import Waiter

if TYPE_CHECKING:
    from usermm.grants.domain import Domain
    from usermm.grants.store import Transaction

REQUEST, ANSWER, REFUSAL = b"?", b"=", b"!"
_PAUSE_S = 0.01
_MOST_LETTERS = 128  # with room below it for the requests' nodes
_NAME = re.compile(rf"[A-Za-z0-9_@-]{{1,{_MOST_LETTERS}}}")


def directory_of(domid: int, name: str) -> str:
    """Where a listener is found."""
    _check_name("channel: name", name)
    return f"/local/domain/{domid}/channels/{name}"


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(f"{what} {name!r:.60} must have 1 to {_MOST_LETTERS} letters, digits and -_@")


def domid_of(domain: Domain, peer: int | str, what: str) -> int:
    """A domain by its number or name. Raises BadReferenceError (ENOENT), ArgumentError for what can be neither."""
    if not isinstance(peer, str):
        return domain_number(peer, what)
    _check_name(what, peer)
    return int(domain.store.read(f"/names/{peer}"))


Met = tuple[int, "Shared", Side, Waiter]
"""(the peer's domid, what this side shares, what the peer shares, the port)."""


def ask(domain: Domain, peer: int | str, name: str, geometry: Geometry, deadline: float) -> Met:
    """The connector's half."""
    while True:
        domid = _wait_for_listener(domain, peer, name, deadline)
        met = _ask_once(domain, domid, name, geometry, deadline)
        if met is not None:
            return met
        time.sleep(_PAUSE_S)  # the listener closed, and may listen again


def _ask_once(domain: Domain, domid: int, name: str, geometry: Geometry, deadline: float) -> Met | None:
    """None: somebody who may took the request away before it was answered."""
    with contextlib.ExitStack() as unneeded:
        shared = Shared(domain, domid, geometry)
        unneeded.callback(shared.close)
        port = domain.evtchn.bind_unbound_port(domid)
        unneeded.callback(domain.evtchn.unbind, port)
        path = f"{directory_of(domid, name)}/{domain.domid}-{os.urandom(6).hex()}"
        try:
            answer = _answer(domain, domid, path, REQUEST + shared.offer(port).pack(), deadline)
        finally:
            with contextlib.suppress(DeviceError):
                domain.store.remove(path)
        if answer[:1] == ANSWER:
            met = domid, shared, *_answered(domain, domid, Offer.unpack(answer[1:]), port)
            unneeded.pop_all()
            return met
        if answer:
            text = f"connect({name}): the peer refused: {answer[1:].decode(errors='replace')[:200]}"
            raise PeerGoneError(errno.ECONNREFUSED, text)
        return None


def _answer(domain: Domain, domid: int, path: str, request: bytes, deadline: float) -> bytes:
    """What the listener writes in the place of the request; nothing, if that was taken away."""
    store = domain.store

    def make(together: Transaction) -> None:  # at once: until it says so, whoever may write above may write it
        together.mkdir(path)
        together.set_permissions(path, (domain.domid, "n"), (domid, "b"))
        together.write(path, request)

    with store.watch(path) as watch:
        try:
            store.atomically(make)
            while (answer := store.read(path))[:1] == REQUEST:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not store.is_introduced(domid):
                    raise _nobody("connect", "nobody accepted: is the other side in accept()?", left_s)
                watch.read(min(left_s, 1.0))
        except (BadReferenceError, PermissionDeniedError):
            if not store.is_introduced(domid):
                raise _nobody("connect", "", 1.0) from None
            return b""
        return answer


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


def asker_of(domain: Domain, path: str) -> int | None:
    """Whose request it is; None: it is not there any more, or lets nobody look."""
    try:
        owner, *_ = domain.store.permissions(path)  # type: ignore[attr-defined] # Nodes has a method called list
    except (BadReferenceError, PermissionDeniedError):
        return None
    return int(owner.domid)


def accept_request(domain: Domain, path: str, geometry: Geometry, peer: int | None) -> Met | None:
    """The listener's half for one request; None when it is none, or no longer one. Raises Declined."""
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
        raise Declined(f"it was of domain {asker.domid}")
    try:
        return _accept(domain, path, Offer.unpack(text[1:]), asker.domid, geometry)
    except UsermmError as error:
        reason = getattr(error, "strerror", None) or str(error)
        _say(domain, path, REFUSAL + reason.encode(errors="replace")[:200])
        raise Declined(reason) from None


def _accept(domain: Domain, path: str, offer: Offer, asker: int, geometry: Geometry) -> Met:
    with contextlib.ExitStack() as unneeded:
        side = map_offer(domain, asker, offer)
        unneeded.callback(release_side, side)
        shared = Shared(domain, asker, geometry)
        unneeded.callback(shared.close)
        port = domain.evtchn.bind_interdomain(asker, offer.port)
        unneeded.callback(domain.evtchn.unbind, port)
        waiter = domain.evtchn.waiter(port)
        waiter.notify()  # so that the connector knows, when it reads the answer, that this end is bound
        domain.store.write(path, ANSWER + shared.offer(0).pack())
        unneeded.pop_all()
        return asker, shared, side, waiter


class Declined(Exception):  # noqa: N818 - an answer
    """What was asked for cannot be: the reason."""


def _say(domain: Domain, path: str, text: bytes) -> None:
    with contextlib.suppress(DeviceError):
        domain.store.write(path, text)


def _wait_for_listener(domain: Domain, peer: int | str, name: str, deadline: float) -> int:
    while True:
        try:
            domid = domid_of(domain, peer, "connect: peer")
            if domain.store.exists(directory_of(domid, name)):
                return domid
        except PermissionDeniedError:  # a store does not say whether what one may not read is there
            pass
        except BadReferenceError as error:
            if error.errno != errno.ENOENT:
                raise
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            text = f"domain {peer} is not there, or does not listen for this one: call Channel.listen there"
            raise _nobody(f"connect({name})", text, left_s)
        time.sleep(min(_PAUSE_S, left_s))


def _nobody(call: str, text: str, left_s: float) -> OSError:
    if left_s <= 0:
        return TimeoutError(errno.ETIMEDOUT, f"{call}: {text}")
    return PeerGoneError(errno.EPIPE, f"{call}: the peer is gone: connect again when it is back")

