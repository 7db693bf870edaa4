"""Channels against peers that mean no good, arguments that are none, and moments that are no good."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support.channels import WAIT_S, joined, meet
from support.hypervisors import wait_until
from support.processes import in_child
from support.threads import running

import usermm
from usermm import (
    ArgumentError,
    ArgumentTypeError,
    Channel,
    ClosedError,
    ForkedError,
    PeerGoneError,
    PermissionDeniedError,
    ProtocolError,
)
from usermm.channels import rendezvous
from usermm.channels.listener import Listener
from usermm.channels.offers import Shared
from usermm.channels.rings import Geometry


@pytest.fixture
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as found:
        yield found


@pytest.fixture
def domains(hypervisor: usermm.Hypervisor) -> Iterator[tuple[usermm.Domain, usermm.Domain]]:
    with usermm.Domain(hypervisor.socket) as one, usermm.Domain(hypervisor.socket) as other:
        yield one, other


@pytest.fixture
def ends(domains: tuple[usermm.Domain, usermm.Domain]) -> Iterator[tuple[Channel, Channel]]:
    here, there = joined(*domains)
    with here, there:
        yield here, there


# Where two meet


@pytest.mark.parametrize("name", ["40000-zz", "32752", "99999-1", "x", "-"])
@pytest.mark.parametrize("text", [b"", b"?1 4294967295 1 1 1 1 1", b"?1 8 4294967295 1 1 1 1", b"?1 8 8 1 16 4095 4"])
def test_a_node_that_means_no_good_stops_nobody(
    hypervisor: usermm.Hypervisor, domains: tuple[usermm.Domain, usermm.Domain], name: str, text: bytes
) -> None:
    one, other = domains
    with usermm.Domain(hypervisor.socket) as stranger, Channel.listen(one, "door") as listener:
        own = f"{stranger.domid}-1" if name == "-" else name
        stranger.store.write(f"{rendezvous.directory_of(one.domid, 'door')}/{own}", text)
        accepted, connected = meet(listener, other)
        with accepted, connected:
            connected.send(b"x")
            assert accepted.receive(1, timeout=WAIT_S) == b"x"


@pytest.mark.parametrize("access", ["n", "r", "w"])
def test_a_request_that_cannot_be_answered_costs_nothing(
    domains: tuple[usermm.Domain, usermm.Domain], access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was mapped, allocated and bound again with each look."""
    one, other = domains
    mapped: list[object] = []
    monkeypatch.setattr(rendezvous, "map_offer", lambda *what: mapped.append(what))
    with Channel.listen(one, "door") as listener:
        path = f"{rendezvous.directory_of(one.domid, 'door')}/{other.domid}-1"
        other.store.mkdir(path)
        other.store.set_permissions(path, (other.domid, "n"), (one.domid, access))
        other.store.write(path, b"?1 8 11 1 1 1 1")
        with pytest.raises(TimeoutError):
            listener.accept(0.05)
    assert mapped == []


def test_a_listener_that_answers_and_does_not_bind(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    """Nobody would ever tell the connector of its end."""
    one, other = domains
    path = rendezvous.directory_of(one.domid, "door")
    one.store.mkdir(path)
    one.store.set_permissions(path, (one.domid, "b"))
    kept: list[Shared] = []

    def answer() -> None:
        while not (nodes := one.store.list(path)):
            time.sleep(0.001)
        while one.store.read(f"{path}/{nodes[0]}")[:1] != rendezvous.REQUEST:
            time.sleep(0.001)
        kept.append(Shared(one, other.domid, Geometry(1, 1, 1)))
        one.store.write(f"{path}/{nodes[0]}", rendezvous.ANSWER + kept[0].offer(0).pack())

    with running(answer), pytest.raises(ProtocolError, match="bind"):
        Channel.connect(other, one.domid, "door", WAIT_S)
    kept[0].close()


def test_a_stranger_cannot_take_away_what_others_made(hypervisor: usermm.Hypervisor) -> None:
    """Neither the directory of who listens for everybody, nor a request in it."""
    with (
        usermm.Domain(hypervisor.socket) as one,
        usermm.Domain(hypervisor.socket) as other,
        usermm.Domain(hypervisor.socket) as stranger,
        Channel.listen(one, "door") as listener,
    ):
        directory = rendezvous.directory_of(one.domid, "door")
        done, asked = threading.Event(), []

        def remove() -> None:
            while not done.is_set():
                with pytest.raises(PermissionDeniedError):
                    stranger.store.remove(directory)
                for node in stranger.store.list(directory):
                    with contextlib.suppress(PermissionDeniedError):  # unless it is gone by now
                        stranger.store.remove(f"{directory}/{node}")

        original = rendezvous._ask_once
        with (
            mock.patch.object(rendezvous, "_ask_once", lambda *given: (asked.append(1), original(*given))[1]),
            running(remove),
        ):
            for _ in range(20):
                for end in meet(listener, other):
                    end.close()
            done.set()
        assert len(asked) == 20, "no request had to be made again"


def test_a_request_that_was_taken_away_is_made_again(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    """By who may: the listener closes, and listens again."""
    one, other = domains
    path = rendezvous.directory_of(one.domid, "door")
    connected: list[Channel] = []
    first = Channel.listen(one, "door")
    with running(lambda: connected.append(Channel.connect(other, one.domid, "door", WAIT_S))):
        while not (nodes := one.store.list(path)):
            time.sleep(0.001)
        one.store.remove(f"{path}/{nodes[0]}")
        first.close()
        with Channel.listen(one, "door") as again, again.accept(WAIT_S) as accepted:
            accepted.send(b"x")
            wait_until(lambda: bool(connected), WAIT_S)
            assert connected[0].receive(1, timeout=WAIT_S) == b"x"
    connected[0].close()


def test_one_who_asks_for_what_cannot_be_holds_nobody_up(hypervisor: usermm.Hypervisor) -> None:
    """Each look at a request of 65536 pages takes long, and there are hundreds: others have their turns in between."""
    with (
        usermm.Domain(hypervisor.socket) as one,
        usermm.Domain(hypervisor.socket) as other,
        usermm.Domain(hypervisor.socket) as stranger,
        Channel.listen(one, "door") as listener,
    ):
        control = stranger.gntalloc.allocate(one.domid, 3)
        text = f"?1 {control.references[0]} {control.references[0]} 1 1 65534 1".encode()
        looks: list[int] = []

        def counted(domain: usermm.Domain, path: str, *rest: Any) -> Any:
            looks.append(int(path.rpartition("/")[2].partition("-")[0]))
            return original(domain, path, *rest)

        original = rendezvous.accept_request
        for number in range(150):
            path = f"{rendezvous.directory_of(one.domid, 'door')}/{stranger.domid}-{number}"
            stranger.store.mkdir(path)
            stranger.store.set_permissions(path, (stranger.domid, "n"), (one.domid, "b"))
            stranger.store.write(path, text)
        with mock.patch.object(rendezvous, "accept_request", counted):
            with pytest.raises(TimeoutError):
                listener.accept(0)
            assert len(looks) < 100, "accept() returns when its time is over"
            before = len(looks)
            accepted, connected = meet(listener, other)
            assert accepted.peer == other.domid
            accepted.close()
            connected.close()
            with pytest.raises(TimeoutError):
                listener.accept(5)
        assert looks.count(other.domid) == 1
        assert looks.count(stranger.domid) <= 320, "what was refused is looked at once more: it has changed"
        assert before < 100


def test_a_directory_that_is_written_to_while_nobody_accepts(hypervisor: usermm.Hypervisor) -> None:
    """More changes than a watch remembers: its end is not the listener's."""
    with (
        usermm.Domain(hypervisor.socket) as one,
        usermm.Domain(hypervisor.socket) as other,
        Channel.listen(one, "door") as listener,
    ):
        for number in range(900):
            other.store.write(f"{rendezvous.directory_of(one.domid, 'door')}/{other.domid}-{number}", b"")
        for end in meet(listener, other):
            end.close()


def test_an_array_whose_shape_cannot_be(ends: tuple[Channel, Channel]) -> None:
    """Also where it is copied."""
    here, there = ends
    for copy in (False, True):
        here.loan((0, 1 << 62), "u8").send()  # no bytes, and more items than NumPy counts
        with pytest.raises(ProtocolError):
            there.receive_array(timeout=WAIT_S, copy=copy)


def test_no_time_at_all(domains: tuple[usermm.Domain, usermm.Domain], ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    with Channel.listen(domains[0], "nan") as listener, pytest.raises(ArgumentError):
        listener.accept(math.nan)
    with pytest.raises(ArgumentError):
        here.receive_message(timeout=-1)
    for timeout in (math.inf, 1e300):
        with running(lambda: (time.sleep(0.2), there.send_message(b"x"))):
            assert here.receive_message(timeout=timeout) == b"x"


# Loans


@pytest.mark.parametrize("shape", [(2.0,), (2.5, 2), (1 << 64, 0), (-1,), ("3",), None, 1.5])
def test_a_shape_that_is_none_loses_no_slot(ends: tuple[Channel, Channel], shape: Any) -> None:
    here, _ = ends
    for _ in range(6):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            here.loan(shape, "u1", timeout=0)
    loans = [here.loan(3, timeout=0) for _ in range(4)]
    assert len(loans) == 4


@pytest.mark.parametrize("kind", [[("x", "i4")], {"no": "type"}, "no type", [1]])
def test_a_type_that_is_none(ends: tuple[Channel, Channel], kind: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^(loan|channel)"):
        ends[0].loan(3, kind, timeout=0)


@pytest.mark.parametrize("array", [[1, 2], b"12", None, np.ma.masked_array([1, 2], [True, False])])  # type: ignore[no-untyped-call]
def test_what_is_no_array_or_more_than_one(ends: tuple[Channel, Channel], array: Any) -> None:
    """A mask would get lost without a word."""
    here, there = ends
    with pytest.raises((ArgumentError, ArgumentTypeError), match="send_array"):
        here.send_array(array, timeout=0)
    with pytest.raises(TimeoutError):
        there.receive_array(timeout=0)


def test_a_shape_of_numpys_ints(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    for shape in ((np.int64(33),), (33,), (np.uint8(16), np.uint8(16))):
        here.send_array(np.ones(shape, "u1"))
        with here.loan(shape, "u1", timeout=WAIT_S) as slot:
            slot.array[...] = 1
            slot.send()
        for _ in range(2):
            assert there.receive_array(timeout=WAIT_S).sum() == math.prod(map(int, shape))
    assert len(here.loan(np.int64(7), timeout=WAIT_S)) == 7


# Moments


def test_closing_beside_a_task(ends: tuple[Channel, Channel]) -> None:
    """The loop forgets the descriptor: whoever gets its number is heard."""

    async def main() -> None:
        task = asyncio.create_task(ends[0].receive_message_async())
        await asyncio.sleep(0.05)
        ends[0].close()
        with pytest.raises(ClosedError):
            await task
        keys = asyncio.get_running_loop()._selector.get_map().values()  # type: ignore[attr-defined]
        assert not [key for key in keys if "Sleeper" in repr(key.data[0])]

    asyncio.run(main())


def test_closing_after_the_loop_of_a_task(ends: tuple[Channel, Channel]) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(ends[0].receive_message_async())
    loop.run_until_complete(asyncio.sleep(0.05))
    task.cancel()
    loop.close()
    ends[0].close()
    with pytest.raises(PeerGoneError):
        ends[1].receive_message(timeout=WAIT_S)
    del task
    gc.collect()


def test_two_loops_in_two_threads(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    got: list[bytes] = []

    def receive(what: Any) -> None:
        got.append(asyncio.run(asyncio.wait_for(what(), WAIT_S)))

    with running(lambda: receive(here.receive_async), lambda: receive(here.receive_message_async)):
        time.sleep(0.2)
        there.send(b"bytes")
        time.sleep(0.2)
        there.send_message(b"message")
    assert sorted(got) == [b"bytes", b"message"]


def test_a_forked_child_is_told_so(ends: tuple[Channel, Channel]) -> None:
    here, there = ends

    def calls() -> None:
        for call in (lambda: here.loan(1), lambda: here.send(b"x"), lambda: here.send_message(b"x")):
            with pytest.raises(ForkedError):
                call()
        here.close()

    in_child(calls)
    here.send(b"y")
    assert there.receive(1, timeout=WAIT_S) == b"y"


def test_a_child_of_busy_threads_closes(ends: tuple[Channel, Channel]) -> None:
    here, _ = ends
    until = time.monotonic() + 1

    def look() -> None:
        while time.monotonic() < until:
            with pytest.raises(TimeoutError):
                here.receive(1, timeout=0.0005)

    with running(look, look):
        while time.monotonic() < until:
            in_child(here.close)


def test_reconnecting_can_be_tried_again(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    one, other = domains
    listener = Channel.listen(one, "door")
    accepted: list[Channel] = []
    with running(lambda: accepted.append(listener.accept(WAIT_S))):
        channel = Channel.connect(other, one.domid, "door", WAIT_S)
    channel.send_message(b"lost")
    with pytest.raises(ArgumentError):
        channel.reconnect(-1)
    assert not channel.closed
    accepted[0].close()
    listener.close()
    with pytest.raises(TimeoutError):
        channel.reconnect(0.05)
    assert channel.lost().not_taken == 1
    with Channel.listen(one, "door") as again, channel:
        with running(lambda: accepted.append(again.accept(WAIT_S))):
            assert channel.reconnect(WAIT_S).not_taken == 1
        assert channel.lost().not_taken == 0
        accepted[1].close()
    with pytest.raises(ClosedError):
        channel.reconnect(0)


def test_ports_of_dropped_channels_are_used_again(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    """The next that is bound unbinds them."""
    seen = set()
    for _ in range(10):
        here, there = joined(*domains)
        seen.add(here._port.port)
        del here, there
        gc.collect()
    assert len(seen) <= 2


def test_closing_a_listener_that_somebody_waits_at(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    for pause_s in (0, 0.0002, 0.001, 0.01):
        for _ in range(5):
            listener = Channel.listen(domains[0], "door")

            def close(pause_s: float = pause_s, listener: Listener = listener) -> None:
                time.sleep(pause_s)
                listener.close()

            with running(close), pytest.raises(ClosedError, match=r"accept\(door\): the listener is closed"):
                listener.accept(WAIT_S)


def test_who_drops_a_channel_hangs_up(domains: tuple[usermm.Domain, usermm.Domain]) -> None:
    here, there = joined(*domains)
    del here
    gc.collect()
    with there, pytest.raises(PeerGoneError) as caught:
        there.receive_message(timeout=WAIT_S)
    assert caught.value.errno == errno.EPIPE
