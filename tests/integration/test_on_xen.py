"""What the conformance list cannot see of a real Xen's devices: objects, descriptors, forks, and what others unmap."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import weakref
from collections.abc import Callable, Iterator

import pytest
from support.processes import in_child

import usermm
from usermm.errors import BadReferenceError, ClosedError, ForkedError, GrantError
from usermm.grants.files import PAGE_BYTES
from usermm.uapi import xen_gntdev

pytestmark = pytest.mark.skipif(
    not os.path.exists(xen_gntdev.DEVICE_PATH), reason=f"no {xen_gntdev.DEVICE_PATH} here: `make xen` boots a machine"
)
ABOVE_SELECT = 1100
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture
def domain() -> Iterator[usermm.Domain]:
    with usermm.Domain(backend="xen") as domain:
        yield domain


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(GrantError) as caught:
        call()
    return caught.value.errno or 0


def test_auto_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERMM_HYPERVISOR", raising=False)
    with usermm.Domain() as domain:
        assert (domain.backend, domain.uid, domain.incarnation) == ("xen", -1, 0)


def test_a_child_deallocates_nothing_of_its_parents(domain: usermm.Domain) -> None:
    """Neither by close() nor by dropping it: the pages are granted as before."""
    page, dropped = domain.gntalloc.allocate(domain.domid), [domain.gntalloc.allocate(domain.domid)]
    mapped = domain.gntdev.map(domain.domid, page.references)
    names = [*page.references, *dropped[0].references]

    def close_all() -> str:
        page.close()
        dropped.clear()
        mapped.close()
        for call in (lambda: domain.gntalloc.allocate(0), lambda: domain.gntdev.map(0, 8), domain.evtchn.fileno):
            with pytest.raises(ForkedError):
                call()
        domain.close()
        return "done"

    assert domain.evtchn.fileno() >= 0
    assert in_child(close_all) == "done"
    for name in names:
        domain.gntdev.map(domain.domid, name).close()
    page.write(0, b"shared")
    assert mapped.read(0, 6) == b"shared"
    mapped.close()
    page.close()


def test_a_child_of_a_xen_domain_may_open_its_own(domain: usermm.Domain) -> None:
    page = domain.gntalloc.allocate(domain.domid)
    page.write(0, b"seen")

    def look() -> bytes:
        with usermm.Domain(backend="xen") as another, another.gntdev.map(domain.domid, page.references) as mapped:
            return mapped.read(0, 4)

    assert in_child(look) == b"seen"
    page.close()


def test_waiting_with_a_descriptor_above_those_of_select(domain: usermm.Domain) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as ends:
        ends.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * ABOVE_SELECT, max(2 * ABOVE_SELECT, before[1])))
        for _ in range(ABOVE_SELECT):
            ends.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        events = ends.enter_context(domain.open_evtchn())
        assert events.fileno() > ABOVE_SELECT
        port = events.bind_unbound_port(domain.domid)
        remote = events.bind_interdomain(domain.domid, port)
        assert events.read(5) == [remote]
        assert events.read(0.01) == []
        events.notify(remote)
        assert events.read(float("inf")) == [port]


def test_a_closed_domain_opens_nothing() -> None:
    domain = usermm.Domain(backend="xen")
    assert not domain.closed
    domain.close()
    assert domain.closed
    for opens in (domain.open_gntalloc, domain.open_gntdev, domain.open_evtchn, lambda: domain.gntdev):
        with pytest.raises(ClosedError, match="domain is closed"):
            opens()


def test_a_file_that_is_dropped_is_closed(domain: usermm.Domain) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for opens in (domain.open_gntalloc, domain.open_gntdev, domain.open_evtchn):
        file = weakref.ref(opens())
        assert file() is None
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [0x10000, 0x1_0000 | 5, (1 << 32) - 1])
def test_a_number_that_is_no_domid(domain: usermm.Domain, number: int) -> None:
    """The driver would take the lower 16 bits."""
    assert errno_of(lambda: domain.evtchn.bind_unbound_port(number)) == errno.EINVAL
    assert errno_of(lambda: domain.evtchn.bind_interdomain(number, 1)) == errno.EINVAL


def test_mapping_nothing(domain: usermm.Domain) -> None:
    page = domain.gntalloc.allocate(domain.domid)
    index = domain.gntdev.map_grant_ref([(domain.domid, page.references[0])])
    assert errno_of(lambda: domain.gntdev.mmap(index, 0)) == errno.EINVAL
    assert errno_of(lambda: domain.gntalloc.mmap(page.index, 0)) == errno.EINVAL
    domain.gntdev.mmap(index, 1).close()


def map_over(address: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    assert _libc.mmap(address, PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address


@pytest.mark.parametrize("device", ["gntdev", "gntalloc"])
def test_what_somebody_else_unmapped_is_noticed(domain: usermm.Domain, device: str) -> None:
    """And close() leaves alone what is mapped there by then."""
    page = domain.gntalloc.allocate(domain.domid)
    mapped = domain.gntdev.map(domain.domid, page.references)
    memory = mapped if device == "gntdev" else page
    address = memory.address
    assert memory.is_mapped
    map_over(address)
    ctypes.memset(address, 7, PAGE_BYTES)
    assert not memory.is_mapped
    memory.close()
    assert ctypes.string_at(address, PAGE_BYTES) == b"\7" * PAGE_BYTES
    assert _libc.munmap(address, PAGE_BYTES) == 0
    mapped.close()
    page.close()


def test_what_would_end_the_kernel_is_refused(domain: usermm.Domain) -> None:
    page = domain.gntalloc.allocate(domain.domid, writable=True)
    device = domain.gntdev
    index = device.map_grant_ref([(domain.domid, page.references[0])])
    device.set_unmap_notify(index, clear_byte=True)
    with pytest.raises(BadReferenceError, match="CLEAR_BYTE is set for it"):
        device.mmap(index, 1)
    device.unmap_grant_ref(index, 1)
    again = device.map_grant_ref([(domain.domid, page.references[0])])
    device.mmap(again, 1).close()
    device.unmap_grant_ref(again, 1)
    page.close()


def test_revoking_is_said_to_be_impossible(domain: usermm.Domain) -> None:
    page = domain.gntalloc.allocate(domain.domid)
    assert errno_of(page.revoke) == errno.EOPNOTSUPP
    assert page.is_mapped


def test_polling(domain: usermm.Domain) -> None:
    with domain.open_evtchn() as events:
        remote = events.bind_interdomain(domain.domid, events.bind_unbound_port(domain.domid))
        assert select.select([events], [], [], 5)[0] == [events]
        assert events.read(0) == [remote]
        assert select.select([events], [], [], 0)[0] == []
