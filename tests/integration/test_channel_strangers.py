"""Who can come between two domains: nobody. The hypervisor vouches for who asks, and what is granted is for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from support.channels import WAIT_S, joined
from support.hypervisors import wait_until
from support.threads import running

import usermm
from usermm.errors import BadReferenceError, PeerGoneError, PermissionDeniedError


class Three(NamedTuple):
    """Domains without rights of their own."""

    here: usermm.Domain
    there: usermm.Domain
    stranger: usermm.Domain


@pytest.fixture
def three() -> Iterator[Three]:
    with (
        usermm.Hypervisor() as hypervisor,
        usermm.Domain(hypervisor.socket) as here,
        usermm.Domain(hypervisor.socket) as there,
        usermm.Domain(hypervisor.socket) as stranger,
    ):
        yield Three(here, there, stranger)


def test_a_stranger_is_not_heard_by_who_listens_for_another(three: Three) -> None:
    with usermm.Channel.listen(three.here, "door", three.there.domid) as listener:
        with pytest.raises(TimeoutError):
            usermm.Channel.connect(three.stranger, three.here.domid, "door", 0.05)
        directory = f"/local/domain/{three.here.domid}/channels/door"
        with pytest.raises(PermissionDeniedError):
            three.stranger.store.write(f"{directory}/{three.there.domid}-0", b"?1 9 12 3 4 16 16")
        with pytest.raises(TimeoutError):
            listener.accept(0)


def test_one_who_was_let_into_the_directory_by_mistake_is_refused(three: Three) -> None:
    """The permissions of the store are not the only thing between them."""
    with usermm.Channel.listen(three.here, "door", three.there.domid) as listener:
        directory = f"/local/domain/{three.here.domid}/channels/door"
        three.here.store.set_permissions(directory, (three.here.domid, "b"))

        def accept() -> None:
            with pytest.raises(TimeoutError):
                listener.accept(0.5)

        with running(accept), pytest.raises(PeerGoneError, match="listens for another domain"):
            usermm.Channel.connect(three.stranger, three.here.domid, "door", WAIT_S)


def test_a_request_in_anothers_name_is_of_who_made_it(three: Three) -> None:
    """The name of a node says what its maker likes; its owner is who it is."""
    with usermm.Channel.listen(three.here, "door") as listener:
        path = f"/local/domain/{three.here.domid}/channels/door/{three.there.domid}-0"
        store = three.stranger.store
        store.mkdir(path)
        store.set_permissions(path, (three.stranger.domid, "n"), (three.here.domid, "b"))
        control = three.stranger.gntalloc.allocate(three.here.domid, 3)
        data = three.stranger.gntalloc.allocate(three.here.domid, 2)
        port = three.stranger.evtchn.bind_unbound_port(three.here.domid)
        store.write(path, f"?1 {control.references[0]} {data.references[0]} {port} 1 1 1".encode())
        with listener.accept(WAIT_S) as channel:
            assert channel.peer == three.stranger.domid
            assert store.read(path)[:1] == b"="
        store.remove(path)
        control.close()
        data.close()


def has_asked(domain: usermm.Domain, directory: str) -> bool:
    with suppress(PermissionDeniedError):  # it was made, and is not ours to read yet
        return any(domain.store.read(f"{directory}/{node}") for node in domain.store.list(directory))
    return False


def test_a_request_is_readable_by_the_two(three: Three) -> None:
    directory = f"/local/domain/{three.here.domid}/channels/door"
    with usermm.Channel.listen(three.here, "door") as listener:
        connected: list[usermm.Channel] = []
        peer = three.here.domid
        with running(lambda: connected.append(usermm.Channel.connect(three.there, peer, "door", WAIT_S))):
            wait_until(lambda: has_asked(three.here, directory), WAIT_S)
            (node,) = three.here.store.list(directory)
            for call in (three.stranger.store.read, lambda path: three.stranger.store.write(path, b"!no")):
                with pytest.raises(PermissionDeniedError):
                    call(f"{directory}/{node}")
            accepted = listener.accept(WAIT_S)
        accepted.close()
        connected[0].close()


def test_what_is_granted_is_for_the_peer_to_read(three: Three) -> None:
    here, there = joined(three.here, three.there)
    with here, there:
        for channel, owner, peer in ((here, three.here, three.there), (there, three.there, three.here)):
            for pages in (channel._shared.control, channel._shared.data):
                peer.gntdev.map(owner.domid, pages.references).close()
                with pytest.raises(BadReferenceError, match="read-only"):
                    peer.gntdev.map(owner.domid, pages.references, writable=True)
                with pytest.raises(BadReferenceError):
                    three.stranger.gntdev.map(owner.domid, pages.references)
