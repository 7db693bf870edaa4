"""Nobody waits for somebody who waits for him: the collector in the hypervisor's thread, signal handlers, both."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support.channels import WAIT_S, joined
from support.processes import run_quietly
from support.threads import alarm

import usermm
from usermm.errors import DeviceError
from usermm.grants.alone import Alone, Rank
from usermm.hypercalls import serving

COLLECTING = """
import gc
import usermm

class Circle:
    pass

gc.set_threshold(50, 2, 2)  # often, and so in every thread
with usermm.Hypervisor() as hypervisor:
    one, two = usermm.Domain(hypervisor.socket), usermm.Domain(hypervisor.socket)
    for number in range(3000):
        circle = Circle()
        {make}
        circle.me = circle
        del circle
    print("done")
"""

MAKING = {
    "allocations": "circle.memory = one.gntalloc.allocate(two.domid, 1 + number % 2)",
    "mappings": "page = one.gntalloc.allocate(two.domid, 2); "
    "circle.memory = two.gntdev.map(one.domid, page.references); page.close()",
    "transactions": "circle.transaction = one.store.transaction(); number % 8 or gc.collect()",
    "files of 2007": "page = one.gntalloc.allocate(two.domid); circle.file = two.open_gntdev('seed2007'); "
    "circle.memory = circle.file.map(one.domid, page.references); page.close(); number % 64 or gc.collect()",
}


@pytest.mark.parametrize("what", MAKING)
def test_the_collector_in_the_hypervisors_thread_waits_for_nobody(tmp_path: Path, what: str) -> None:
    """It finalizes what domains of the same process had, while one of them waits for that very thread."""
    assert run_quietly(COLLECTING.format(make=MAKING[what]), tmp_path, timeout_s=60) == "done\n"


def test_what_fills_the_socket_is_told_later(tmp_path: Path) -> None:
    """A finalizer must not wait until the hypervisor reads, in the thread that reads."""
    run_quietly(
        """
        import gc, threading
        import usermm
        from usermm.grants.session import status

        gc.disable()
        with usermm.Hypervisor() as hypervisor:
            one, two = usermm.Domain(hypervisor.socket), usermm.Domain(hypervisor.socket)
            pages = one.gntalloc.allocate(two.domid, 1000)
            circle = [two.gntdev.map(one.domid, reference) for reference in pages.references[:900]]
            circle.append(circle)
            del circle
            done = threading.Event()
            hypervisor._loop.call_soon_threadsafe(lambda: (gc.collect(), done.set()))
            assert done.wait(20), "the hypervisor's thread waits for itself"
            two.is_isolated_from(one.domid)
            usage = [domain["usage"]["mapped"] for domain in status(hypervisor.socket)["domains"]]
            assert usage == [0, 0], usage
        """,
        tmp_path,
        timeout_s=60,
    )


HANDLING = """
import itertools, os, signal, sys, threading
import usermm
from usermm.errors import ClosedError, DeviceError

with usermm.Hypervisor() as hypervisor:
    for _ in range({rounds}):
        one, two = usermm.Domain(hypervisor.socket), usermm.Domain(hypervisor.socket)
        {setup}
        handled = []
        def handler(number, frame):
            if not handled:
                handled.append(number)
                {handle}
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        while not handled:
            try:
                {call}
            except DeviceError:
                pass
        {after}
        two.close()
        one.close()
print("done")
"""

CHANNEL = (
    "with usermm.Channel.listen(one, 'x') as listener: "
    "met = []; thread = threading.Thread(target=lambda: met.append(usermm.Channel.connect(two, one.domid, 'x'))); "
    "thread.start(); channel = listener.accept(20); thread.join()"
)
PORTS = "mine = one.evtchn.bind_unbound_port(two.domid); theirs = two.evtchn.bind_interdomain(one.domid, mine)"

HANDLED = {
    "a channel": (CHANNEL, "channel.close()", "one.is_isolated_from(two.domid)", "assert channel.closed"),
    "a domain": ("", "one.close()", "one.is_isolated_from(two.domid)", "assert one.closed"),
    "a domain that opens devices": ("", "one.close()", "one.open_evtchn().close()", "assert one.closed"),
    "an allocation": (
        "page = one.gntalloc.allocate(two.domid, 2)",
        "page.close()",
        "one.gntalloc.allocate(two.domid, 2).close()",
        "assert page.closed",
    ),
    "a mapping": (
        "page = one.gntalloc.allocate(two.domid, 2); mapping = two.gntdev.map(one.domid, page.references)",
        "mapping.close()",
        "two.gntdev.map(one.domid, page.references).close()",
        "assert mapping.closed",
    ),
    "a port": (PORTS, "one.evtchn.unbind(mine)", "one.evtchn.unbind(one.evtchn.bind_unbound_port(1))", ""),
    "a file of ports": (PORTS, "one.evtchn.close()", "one.evtchn.unmask(mine); one.evtchn.read(0)", ""),
    "a listener": (
        "listener = usermm.Channel.listen(one, 'x')",
        "listener.close()",
        "one.is_isolated_from(two.domid)",
        "usermm.Channel.listen(one, 'x').close()",
    ),
}


@pytest.mark.parametrize("what", HANDLED)
def test_a_signal_handler_may_close(tmp_path: Path, what: str) -> None:
    """In the middle of a call of its own thread that has to do with the same."""
    setup, handle, call, after = HANDLED[what]
    text = HANDLING.format(setup=setup, handle=handle, call=call, after=after or "pass", rounds=40)
    assert run_quietly(text, tmp_path, timeout_s=60) == "done\n"


BESIDES = {
    "a domain": ("one.gntalloc.allocate(two.domid, 2).close()", "one.close()"),
    "an allocation": ("one.gntalloc.allocate(two.domid, 2).close()", "page.close()"),
    "a port": ("one.evtchn.unbind(one.evtchn.bind_unbound_port(two.domid))", "one.evtchn.unbind(mine)"),
}


@pytest.mark.parametrize("what", BESIDES)
def test_a_signal_handler_may_close_what_another_thread_is_in(tmp_path: Path, what: str) -> None:
    """That thread waits for the request that the handler has interrupted."""
    call, handle = BESIDES[what]
    text = HANDLING.format(
        setup=f"""page = one.gntalloc.allocate(two.domid, 2); mine = one.evtchn.bind_unbound_port(two.domid); done = []
        def use():
            while not done:
                try:
                    {call}
                except DeviceError:
                    pass
        thread = threading.Thread(target=use); thread.start()""",
        handle=handle,
        call="one.is_isolated_from(two.domid)",
        after="done.append(1); thread.join()",
        rounds=60,
    )
    assert run_quietly(text, tmp_path, timeout_s=60) == "done\n"


def test_what_a_handler_could_not_ask_for_is_asked_for_later(one: usermm.Domain, two: usermm.Domain) -> None:
    """A port whose peer went needs a new end; in the middle of a request nobody can ask for one."""
    for _ in range(5):
        mine = one.evtchn.bind_unbound_port(two.domid)
        two.evtchn.unbind(two.evtchn.bind_interdomain(one.domid, mine))
        handled: list[int] = []

        def handler(*_: object, mine: int = mine, handled: list[int] = handled) -> None:
            if not handled:
                handled += one.evtchn.read(0)
                one.evtchn.unmask(mine)

        with alarm(handler, 0.0005, 0.0005):
            while not handled:
                one.is_isolated_from(two.domid)
        assert handled == [mine]
        two.evtchn.notify(two.evtchn.bind_interdomain(one.domid, mine))
        assert one.evtchn.read(WAIT_S) == [mine]
        one.evtchn.unbind(mine)


def test_a_handler_that_masks_what_its_thread_unmasks(one: usermm.Domain, two: usermm.Domain) -> None:
    """Whatever is done last holds: a masked port is not reported."""
    mine = one.evtchn.bind_unbound_port(two.domid)
    theirs = two.evtchn.bind_interdomain(one.domid, mine)
    counts = [0, 0]

    def handler(*_: object) -> None:
        counts[0] += 1
        one.evtchn.mask(mine)

    with alarm(handler, 0.0005, 0.0005):
        while counts[0] < 500:
            one.evtchn.unmask(mine)
            two.evtchn.notify(theirs)
            counts[1] += len(one.evtchn.read(0))
    one.evtchn.mask(mine)
    two.evtchn.notify(theirs)
    assert one.evtchn.read(0) == []
    one.evtchn.unmask(mine)
    assert one.evtchn.read(WAIT_S) == [mine]


def test_a_request_in_a_handler_is_refused_while_its_thread_makes_one(one: usermm.Domain, two: usermm.Domain) -> None:
    """Its reply would be taken for the other's; and nothing of it is begun."""
    refused, answered = [], [0]
    page = one.gntalloc.allocate(two.domid, writable=True)
    page.write(0, b"kept")

    def handler(*_: object) -> None:
        for call in (lambda: one.is_isolated_from(two.domid), page.revoke):
            try:
                call()
                answered[0] += 1
            except DeviceError as error:
                refused.append(error.errno)

    with alarm(handler, 0.0005, 0.0005):
        while len(refused) < 20 and not answered[0] > 2000:
            assert one.is_isolated_from(two.domid) is False
    assert set(refused) <= {errno.EDEADLK}
    assert page.read(0, 4) == b"kept"
    page.close()


def test_a_finalizer_of_somebodys_in_the_hypervisors_thread(one: usermm.Domain, two: usermm.Domain) -> None:
    """A program's own __del__ may close a channel; a request is refused there, since nobody would answer it."""
    here, there = joined(one, two)
    pages = one.gntalloc.allocate(two.domid, 2)
    mapping = two.gntdev.map(one.domid, pages.references)
    serving.begin()
    try:
        with pytest.raises(DeviceError) as caught:
            one.is_isolated_from(two.domid)
        assert caught.value.errno == errno.EDEADLK
        here.close()
        mapping.close()
        one.evtchn.close()
    finally:
        serving.end()
    with pytest.raises(usermm.PeerGoneError):
        there.receive(1, timeout=WAIT_S)
    there.close()
    assert two.is_isolated_from(one.domid) is False


def test_alone_does_what_is_asked_of_it_inside_when_it_leaves() -> None:
    """In the order in which it was asked, and also when the call fails."""
    alone, done = Alone(Rank.FILE), []

    def call() -> None:
        alone.finish(lambda: done.append(1), wait=True)
        alone.do("second", lambda: done.append(2))
        alone.do("failing", os_error)
        alone.finish(lambda: done.append(3), wait=False)
        assert not done
        with pytest.raises(DeviceError) as caught:
            alone.run("inner", lambda: done.append(9))
        assert caught.value.errno == errno.EDEADLK
        raise KeyError

    def os_error() -> None:
        raise OSError(errno.ENOSPC, "x")

    with pytest.raises(KeyError):
        alone.run("outer", call)
    assert done == [1, 2, 3]
    with pytest.raises(OSError):
        alone.do("outside", os_error)
