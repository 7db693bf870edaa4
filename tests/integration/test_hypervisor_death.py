"""The hypervisor is killed: what domains have goes on, what they ask is refused at once, and a new one is another."""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.hypervisors import HypervisorProcess, socket_folder, wait_until
from support.threads import running

from usermm.channels.channel import Channel
from usermm.errors import BadReferenceError, HypervisorGoneError, UsermmError
from usermm.grants.domain import Domain
from usermm.grants.gntdev import Copy
from usermm.hypervisor.embedded import Hypervisor

RESTARTS = 50
REFERENCES = 8000
AT_ONCE_S = 1.0  # far above what a call takes on a busy machine, far below any time-out that there could be
PATIENCE_S = 20
GRANTOR, GRANTEE = 31, 32


@pytest.fixture
def path() -> Iterator[Path]:
    with socket_folder() as folder:
        yield folder / "s"


def domains(path: Path) -> tuple[Domain, Domain]:
    """The same numbers each time."""
    return Domain(str(path), domid=GRANTOR), Domain(str(path), domid=GRANTEE)


def test_mappings_go_on(path: Path) -> None:
    with HypervisorProcess(path) as hypervisor:
        grantor, grantee = domains(path)
        with grantor, grantee, closing(grantor.gntalloc.allocate(GRANTEE, 3, writable=True)) as pages:
            mapping = grantee.gntdev.map(GRANTOR, pages.references, writable=True)
            hypervisor.kill()
            for number in range(1000):
                pages.store(4096, number)
                assert mapping.load(4096) == number
                mapping.store(8192, number)
                assert pages.load(8192) == number
            assert mapping.is_mapped and pages.is_mapped
            mapping.close()
            assert not mapping.is_mapped
            assert pages.load(8192) == 999


def test_event_channels_go_on(path: Path) -> None:
    with HypervisorProcess(path) as hypervisor:
        grantor, grantee = domains(path)
        with grantor, grantee:
            port = grantor.evtchn.bind_unbound_port(GRANTEE)
            far = grantee.evtchn.bind_interdomain(GRANTOR, port)
            hypervisor.kill()
            assert grantee.evtchn.read(0) == [far]  # pending from the start, as Xen has it
            grantee.evtchn.unmask(far)
            for _ in range(1000):
                grantor.evtchn.notify(port)
                assert grantee.evtchn.read(5) == [far]
                grantee.evtchn.unmask(far)
                grantee.evtchn.notify(far)
                assert grantor.evtchn.read(5) == [port]
                grantor.evtchn.unmask(port)


def test_peers_death_is_seen_without_a_hypervisor(path: Path) -> None:
    """The kernel tells: the other end of the pair is closed."""
    with HypervisorProcess(path) as hypervisor:
        grantor, grantee = domains(path)
        with grantor:
            with grantee:
                port = grantor.evtchn.bind_unbound_port(GRANTEE)
                grantee.evtchn.bind_interdomain(GRANTOR, port)
                hypervisor.kill()
                assert grantor.evtchn.read(0) == []
            assert grantor.evtchn.read(5) == [port]
            grantor.evtchn.unmask(port)
            grantor.evtchn.notify(port)  # to nobody: no error, no wait


def test_channels_go_on(path: Path) -> None:
    with HypervisorProcess(path) as hypervisor:
        grantor, grantee = domains(path)
        with grantor, grantee, Channel.listen(grantor, "door") as listener:
            accepted: list[Channel] = []
            with running(lambda: accepted.append(listener.accept(PATIENCE_S))):
                there = Channel.connect(grantee, GRANTOR, "door", PATIENCE_S)
            (here,) = accepted
            with here, there:
                hypervisor.kill()
                for number in range(100):
                    here.send_message(b"%d" % number)
                    assert there.receive_message(timeout=PATIENCE_S) == b"%d" % number
                    there.send(b"stream")
                    assert here.receive_exactly(6, timeout=PATIENCE_S) == b"stream"


def test_every_control_call_says_so_at_once(path: Path) -> None:
    with HypervisorProcess(path) as hypervisor, contextlib.ExitStack() as stack:
        grantor, grantee = map(stack.enter_context, domains(path))
        pages = stack.enter_context(closing(grantor.gntalloc.allocate(GRANTEE, 2)))
        mapping = grantee.gntdev.map(GRANTOR, pages.references)
        index = grantee.gntdev.map_grant_ref([(GRANTOR, pages.references[0])])
        port = grantor.evtchn.bind_unbound_port(GRANTEE)
        watch = stack.enter_context(grantee.store.watch("@releaseDomain"))
        assert watch.read(5) == ["@releaseDomain"]
        transaction = grantee.store.transaction()
        hypervisor.kill()
        target = bytearray(10)
        calls = {
            "allocate": lambda: grantor.gntalloc.allocate(GRANTEE),
            "revoke one": lambda: grantor.gntalloc.revoke(pages.references[0]),
            "revoke": pages.revoke,
            "grantor's notification": lambda: grantor.gntalloc.set_unmap_notify(pages.index, clear_byte=True),
            "map": lambda: grantee.gntdev.map(GRANTOR, pages.references),
            "mmap": lambda: grantee.gntdev.mmap(index, 1),
            "grantee's notification": lambda: grantee.gntdev.set_unmap_notify(mapping.index, port=1),
            "copy": lambda: grantee.gntdev.copy([Copy((GRANTOR, pages.references[0], 0), target, 10)]),
            "bind_unbound_port": lambda: grantor.evtchn.bind_unbound_port(GRANTEE),
            "bind_interdomain": lambda: grantee.evtchn.bind_interdomain(GRANTOR, port),
            "bind_virq": lambda: grantee.evtchn.bind_virq(3),
            "is_isolated_from": lambda: grantee.is_isolated_from(GRANTOR),
            "read": lambda: grantee.store.read("name"),
            "write": lambda: grantee.store.write("a", b"b"),
            "list": lambda: grantee.store.list("/"),
            "watch": lambda: grantee.store.watch("name"),
            "transaction": grantee.store.transaction,
            "commit": transaction.commit,
            "watch.read": lambda: watch.read(20),
        }
        for name, call in calls.items():
            start = time.monotonic()
            with pytest.raises(HypervisorGoneError) as caught:
                call()
            assert time.monotonic() - start < AT_ONCE_S, name
            assert caught.value.errno == errno.ECONNRESET, name
            text = str(caught.value)
            assert str(path) in text and "open a new Domain" in text and "\n" not in text, name
        assert bytes(pages.read(0, 4)) == bytes(4)  # what could not be revoked is what it was
        assert mapping.is_mapped
        mapping.close()


def test_call_that_waits_for_its_answer_hears_of_the_end(path: Path) -> None:
    """Killed in the middle of thousands of calls by four threads: each thread gets the one error and none waits."""
    with HypervisorProcess(path) as hypervisor, Domain(str(path)) as domain:
        ended: list[BaseException] = []

        def ask() -> None:
            try:
                while True:
                    domain.store.read("name")
            except HypervisorGoneError as error:
                ended.append(error)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        hypervisor.kill()
        for thread in threads:
            thread.join(AT_ONCE_S * 5)
        assert len(ended) == 4


def test_new_domain_says_that_none_listens(path: Path) -> None:
    with HypervisorProcess(path) as hypervisor:
        hypervisor.kill()
        with pytest.raises(HypervisorGoneError, match="usermm hypervisor --socket") as caught:
            Domain(str(path))
        assert caught.value.errno == errno.ECONNREFUSED


def test_old_references_are_nothing_to_a_new_hypervisor(path: Path) -> None:
    """Thousands of them, from domains that have the same numbers and have granted as much again."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(HypervisorProcess(path))
        old_grantor, _ = map(stack.enter_context, domains(path))
        old = [stack.enter_context(closing(old_grantor.gntalloc.allocate(GRANTEE, 8))) for _ in range(100)]
        references = [number for pages in old for number in pages.references]
        first.kill()
        second = stack.enter_context(HypervisorProcess(path))
        grantor, grantee = map(stack.enter_context, domains(path))
        new = [stack.enter_context(closing(grantor.gntalloc.allocate(GRANTEE, 8))) for _ in range(100)]
        given = {number for pages in new for number in pages.references}
        assert not given & set(references)
        guesses = [(references[0] >> 20 << 20) + number for number in range(REFERENCES)]
        for number in {*references, *guesses} - given:
            with pytest.raises(BadReferenceError, match="earlier hypervisor"):
                grantee.gntdev.map(GRANTOR, number)
        assert not any(grant["mapped_by"] for grant in second.status()["grants"])


def test_closing_old_objects_does_no_harm_to_the_new(path: Path) -> None:
    with HypervisorProcess(path) as first, contextlib.ExitStack() as stack:
        old_grantor, old_grantee = domains(path)
        old_pages = old_grantor.gntalloc.allocate(GRANTEE, 4)
        old_mapping = old_grantee.gntdev.map(GRANTOR, old_pages.references)
        old_port = old_grantor.evtchn.bind_unbound_port(GRANTEE)
        old_grantee.evtchn.bind_interdomain(GRANTOR, old_port)
        old_watch = old_grantee.store.watch("name")
        first.kill()

        second = stack.enter_context(HypervisorProcess(path))
        grantor, grantee = map(stack.enter_context, domains(path))
        pages = stack.enter_context(closing(grantor.gntalloc.allocate(GRANTEE, 4)))
        mapping = grantee.gntdev.map(GRANTOR, pages.references)
        port = grantor.evtchn.bind_unbound_port(GRANTEE)
        far = grantee.evtchn.bind_interdomain(GRANTOR, port)
        assert port == old_port  # the same number, of another hypervisor
        before = second.status()

        old_mapping.close()
        old_pages.close()
        old_grantor.evtchn.notify(old_port)
        with contextlib.suppress(UsermmError):
            old_grantor.evtchn.unbind(old_port)
        old_watch.close()
        old_grantor.close()
        old_grantee.close()

        after = second.status()
        assert [after[what] for what in ("domains", "grants", "ports")] == [
            before[what] for what in ("domains", "grants", "ports")
        ]
        pages.write(0, b"new")
        assert mapping.read(0, 3) == b"new"
        grantee.evtchn.read(0)
        grantee.evtchn.unmask(far)
        grantor.evtchn.notify(port)
        assert grantee.evtchn.read(5) == [far]
        mapping.close()


def test_fifty_restarts(path: Path) -> None:
    """Every reference of every incarnation stays what it was: nothing to all the others."""
    seen: set[int] = set()
    last = -1
    for number in range(RESTARTS):
        with Hypervisor(str(path)) if number % 2 else HypervisorProcess(path) as hypervisor:
            grantor, grantee = domains(path)
            with grantor, grantee, closing(grantor.gntalloc.allocate(GRANTEE, 64)) as pages:
                assert not seen & set(pages.references)
                seen.update(pages.references)
                if last >= 0:
                    with pytest.raises(BadReferenceError):
                        grantee.gntdev.map(GRANTOR, last)
                last = pages.references[-1]
                mapping = grantee.gntdev.map(GRANTOR, pages.references)
                pages.write(0, b"%d" % number)
                if isinstance(hypervisor, HypervisorProcess):
                    hypervisor.kill()
                else:
                    hypervisor.close()
                assert mapping.read(0, 2).rstrip(b"\0") == b"%d" % number
                mapping.close()
    assert len(seen) == RESTARTS * 64


def test_memory_of_a_killed_hypervisor_is_free_once_nobody_has_it(path: Path) -> None:
    def shared_kib() -> int:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))

    size = 64 << 20
    with HypervisorProcess(path) as hypervisor:
        grantor, grantee = Domain(str(path), domid=GRANTOR, limit=size // mmap.PAGESIZE), Domain(str(path))
        with grantor, grantee:
            pages = grantor.gntalloc.allocate(grantee.domid, size // mmap.PAGESIZE)
            mapping = grantee.gntdev.map(GRANTOR, pages.references)
            memoryview(pages)[:] = bytes(size)
            before = shared_kib()
            hypervisor.kill()
            pages.close()
            mapping.close()
            wait_until(lambda: before - shared_kib() > size * 3 // 4 // 1024, 1, shared_kib)
