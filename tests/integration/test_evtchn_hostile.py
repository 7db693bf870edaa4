"""Event channels with a peer that plays tricks, and with many threads."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress

import pytest
from support.event_channels import MOMENT_S, PATIENCE_S, bind, stream_of

import usermm
from usermm.errors import DeviceError
from usermm.grants.event_ports import EventPorts, hang_up


def test_garbage_and_floods_are_events_and_nothing_more(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    stream = stream_of(two, theirs)
    sent = 0
    with suppress(BlockingIOError):
        while sent < 1 << 26:
            sent += stream.send(os.urandom(65536), socket.MSG_DONTWAIT)
    reads = 0
    while one.evtchn.read(MOMENT_S) == [mine]:
        one.evtchn.unmask(mine)
        reads += 1
    assert 1 <= reads <= sent // 4096 + 1
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_passed_descriptors_are_discarded(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        read_end, write_end = os.pipe()
        with suppress(PermissionError):  # since Linux 6.16 they cannot even be sent (SO_PASSRIGHTS)
            socket.send_fds(stream_of(two, theirs), [b"x"], [write_end])
        os.close(write_end)
        if one.evtchn.read(0):
            one.evtchn.unmask(mine)
        assert select.select([read_end], [], [], PATIENCE_S)[0], "somebody has the other end still"
        os.close(read_end)
    assert len(os.listdir("/proc/self/fd")) == before


def test_out_of_band_bytes_are_no_end_and_keep_no_limit_from_passing(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    stream = stream_of(two, theirs)
    try:
        stream.send(b"x", socket.MSG_OOB)
    except OSError:
        pytest.skip("this kernel has no out-of-band bytes on Unix sockets (CONFIG_AF_UNIX_OOB)")
    assert one.evtchn.read(MOMENT_S) in ([], [mine])
    one.evtchn.unmask(mine)
    with one.evtchn.waiter(mine) as waiter:
        stream.send(b"x", socket.MSG_OOB)
        waiter.wait(MOMENT_S)
        assert waiter.hang_ups == 0
    one.evtchn.unmask(mine)
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_peer_that_does_not_take_its_events_keeps_nobody_waiting(one: usermm.Domain, two: usermm.Domain) -> None:
    """Neither does clearing O_NONBLOCK on its side, nor a copy of ours on which somebody clears it."""
    mine, theirs = bind(one, two)
    stream_of(two, theirs).setblocking(True)
    copy = stream_of(one, mine).dup()
    copy.setblocking(True)
    for _ in range(2000):
        one.evtchn.notify(mine)
    copy.close()
    two.evtchn.notify(theirs)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_a_copy_made_non_blocking_does_not_end_a_wait(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    with one.evtchn.waiter(mine) as waiter:
        os.set_blocking(stream_of(one, mine).fileno(), False)
        later = threading.Timer(MOMENT_S, two.evtchn.notify, [theirs])
        later.start()
        assert waiter.wait() is True
        later.join()


def test_a_peer_that_hangs_up_by_itself_leaves_a_usable_port(one: usermm.Domain, two: usermm.Domain) -> None:
    """Without parting the ports the dead socket would be reported for ever."""
    mine, theirs = bind(one, two)
    stream_of(two, theirs).shutdown(socket.SHUT_RDWR)
    assert one.evtchn.read(PATIENCE_S) == [mine]
    one.evtchn.unmask(mine)
    assert one.evtchn.read(MOMENT_S) == []
    again = two.evtchn.bind_interdomain(one.domid, mine)
    two.evtchn.notify(again)
    assert one.evtchn.read(PATIENCE_S) == [mine]


def test_the_default_timeout_of_sockets_does_not_matter(hypervisor: usermm.Hypervisor) -> None:
    socket.setdefaulttimeout(0.01)
    try:
        with usermm.Domain(hypervisor.socket) as one, usermm.Domain(hypervisor.socket) as two:
            mine, theirs = bind(one, two)
            with one.evtchn.waiter(mine) as waiter:
                later = threading.Timer(5 * MOMENT_S, two.evtchn.notify, [theirs])
                later.start()
                assert waiter.wait() and waiter.hang_ups == 0
                later.join()
    finally:
        socket.setdefaulttimeout(None)


def test_what_was_reported_under_a_reused_number_leaves_the_new_port_masked() -> None:
    """The kernel masked the old port; the new one has the same descriptor and an event, which is taken as well."""

    def refuse(number: int) -> int:
        raise AssertionError(number)

    ports = EventPorts(refuse)
    old, old_far = socket.socketpair()
    ports.add(1, old.detach())
    old_far.send(b"\1")
    changes, ready = ports.changes, ports.epoll.poll(PATIENCE_S)
    removed = ports.remove(ports.by_number[1])
    assert removed is not None
    number = removed.fileno()
    removed.close()
    new, new_far = socket.socketpair()
    ports.add(2, os.dup2(new.detach(), number, inheritable=False) if new.fileno() != number else new.detach())
    new_far.send(b"\1")
    assert ready == [(number, select.EPOLLIN)] and ports.take(ready, changes) == [2]
    new_far.send(b"\1")
    assert ports.epoll.poll(0) == [], "read, and not masked"
    ports.unmask(ports.by_number[2])
    assert ports.epoll.poll(PATIENCE_S) == [(number, select.EPOLLIN)]
    hang_up(ports.remove(ports.by_number[2]))
    ports.close()
    old_far.close()
    new_far.close()


def test_ports_come_and_go_while_others_read(one: usermm.Domain, two: usermm.Domain) -> None:
    """A descriptor's number is used again at once: what was reported under it may be another port's."""
    mine, theirs = bind(one, two)
    stop = threading.Event()
    taken = threading.Semaphore(0)

    def read() -> None:
        while not stop.is_set():
            for port in one.evtchn.read(0.01):
                if port == mine:
                    taken.release()
                one.evtchn.unmask(port)

    def churn() -> None:
        with two.open_evtchn() as other:
            for _ in range(150):
                extra = one.evtchn.bind_unbound_port(two.domid)
                other.notify(other.bind_interdomain(one.domid, extra))
                one.evtchn.unbind(extra)
                for port in other.read(0):
                    other.unbind(port)

    threads = [threading.Thread(target=read) for _ in range(2)]
    churner = threading.Thread(target=churn)
    for thread in [*threads, churner]:
        thread.start()
    for _ in range(300):
        two.evtchn.notify(theirs)
        assert taken.acquire(timeout=PATIENCE_S), "an event was lost"
    churner.join()
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("end", ["close", "unbind"])
def test_a_waiting_thread_is_let_go(one: usermm.Domain, two: usermm.Domain, end: str) -> None:
    mine, _ = bind(one, two)
    with one.evtchn.waiter(mine) as waiter:
        caught: list[DeviceError] = []

        def wait() -> None:
            try:
                waiter.wait()
            except DeviceError as error:
                caught.append(error)

        def read() -> None:
            try:
                one.evtchn.read()
            except DeviceError as error:
                caught.append(error)

        threads = [threading.Thread(target=wait), *([threading.Thread(target=read)] * (end == "close"))]
        for thread in threads:
            thread.start()
        time.sleep(MOMENT_S)
        if end == "close":
            one.evtchn.close()
        else:
            one.evtchn.unbind(mine)
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    expected = {errno.EBADF} if end == "close" else {errno.ENOTCONN}
    assert {error.errno for error in caught} == expected and len(caught) == len(threads)


def test_a_signal_handler_runs_while_reading(one: usermm.Domain, two: usermm.Domain) -> None:
    mine, theirs = bind(one, two)
    before = signal.signal(signal.SIGALRM, lambda *_: two.evtchn.notify(theirs))
    try:
        signal.setitimer(signal.ITIMER_REAL, MOMENT_S)
        assert one.evtchn.read(PATIENCE_S) == [mine]
        with one.evtchn.waiter(mine) as waiter:
            signal.setitimer(signal.ITIMER_REAL, MOMENT_S)
            assert waiter.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
