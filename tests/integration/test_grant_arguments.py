"""Arguments that are none, to a domain and its devices: one line, no struct.error, and nothing was done."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.calls import refused_line

import usermm
from usermm.grants.gntdev import Copy
from usermm.uapi import xen_gntalloc


@pytest.fixture(scope="module")
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as found:
        yield found


def copy(domain: Any, source: Any, length: Any) -> Any:
    return domain.gntdev.copy([Copy(source, bytearray(8), length)])


CALLS: dict[str, Callable[[Any], Any]] = {
    "is_isolated_from(70000)": lambda domain: domain.is_isolated_from(70000),
    "is_isolated_from(-1)": lambda domain: domain.is_isolated_from(-1),
    "get_offset_for_vaddr(2**64)": lambda domain: domain.gntdev.get_offset_for_vaddr(1 << 64),
    "get_offset_for_vaddr(-1)": lambda domain: domain.gntdev.get_offset_for_vaddr(-1),
    "gntdev.set_unmap_notify(-1)": lambda domain: domain.gntdev.set_unmap_notify(-1),
    "gntdev.set_unmap_notify(0, port=-1)": lambda domain: domain.gntdev.set_unmap_notify(0, port=-1),
    "gntalloc.set_unmap_notify(2**64)": lambda domain: domain.gntalloc.set_unmap_notify(1 << 64),
    "allocate(1, 1.0)": lambda domain: domain.gntalloc.allocate(1, 1.0),
    "allocate(1, -1)": lambda domain: domain.gntalloc.allocate(1, -1),
    "allocate('x')": lambda domain: domain.gntalloc.allocate("x"),
    "allocate(2**16)": lambda domain: domain.gntalloc.allocate(1 << 16),
    "alloc_gref(1, -1, 1)": lambda domain: domain.gntalloc.alloc_gref(1, -1, 1),
    "dealloc_gref(-1, 1)": lambda domain: domain.gntalloc.dealloc_gref(-1, 1),
    "gntalloc.mmap(-1, 1)": lambda domain: domain.gntalloc.mmap(-1, 1),
    "gntalloc.mmap(0, 1.0)": lambda domain: domain.gntalloc.mmap(0, 1.0),
    "gntdev.mmap(0.0, 1)": lambda domain: domain.gntdev.mmap(0.0, 1),
    "map(1, None)": lambda domain: domain.gntdev.map(1, None),
    "map(1, 8.0)": lambda domain: domain.gntdev.map(1, 8.0),
    "map('x', 8)": lambda domain: domain.gntdev.map("x", 8),
    "map_grant_ref([8])": lambda domain: domain.gntdev.map_grant_ref([8]),
    "map_grant_ref([(1, 2, 3)])": lambda domain: domain.gntdev.map_grant_ref([(1, 2, 3)]),
    "unmap_grant_ref(-1, 1)": lambda domain: domain.gntdev.unmap_grant_ref(-1, 1),
    "unmap_grant_ref(0, 1.0)": lambda domain: domain.gntdev.unmap_grant_ref(0, 1.0),
    "bind_interdomain(1, -1)": lambda domain: domain.evtchn.bind_interdomain(1, -1),
    "notify(-1)": lambda domain: domain.evtchn.notify(-1),
    "notify([])": lambda domain: domain.evtchn.notify([]),
    "notify('x')": lambda domain: domain.evtchn.notify("x"),
    "unmask([])": lambda domain: domain.evtchn.unmask([]),
    "unmask('x')": lambda domain: domain.evtchn.unmask("x"),
    "revoke([])": lambda domain: domain.gntalloc.revoke([]),
    "revoke('x')": lambda domain: domain.gntalloc.revoke("x"),
    "map_many(3)": lambda domain: domain.gntdev.map_many(3),
    "map_grant_ref(3)": lambda domain: domain.gntdev.map_grant_ref(3),
    "gntalloc.mmap(0, 1, 'x')": lambda domain: domain.gntalloc.mmap(0, 1, "x"),
    "gntdev.mmap(0, 1, 1, 'x')": lambda domain: domain.gntdev.mmap(0, 1, 1, "x"),
    "open_gntalloc(limit='x')": lambda domain: domain.open_gntalloc(limit="x"),
    "copy(3)": lambda domain: domain.gntdev.copy(3),
    "copy([3])": lambda domain: domain.gntdev.copy([3]),
    "copy of -1 bytes": lambda domain: copy(domain, (1, 8, 0), -1),
    "copy of 70000 bytes": lambda domain: copy(domain, (1, 8, 0), 70000),
    "copy of '1' bytes": lambda domain: copy(domain, (1, 8, 0), "1"),
    "copy from before": lambda domain: copy(domain, (1, 8, -3), 1),
    "copy from (1, 2)": lambda domain: copy(domain, (1, 2), 1),
    "copy from ('x', 8, 0)": lambda domain: copy(domain, ("x", 8, 0), 1),
    "copy from None": lambda domain: copy(domain, None, 1),
    "set_permissions(3)": lambda domain: domain.store.set_permissions("name", 3),
    "set_permissions((1,))": lambda domain: domain.store.set_permissions("name", (1,)),
    "atomically(3)": lambda domain: domain.store.atomically(3),
    "ioctl('x')": lambda domain: domain.gntalloc.ioctl("x", bytearray(8)),
    "ioctl(None)": lambda domain: domain.gntalloc.ioctl(xen_gntalloc.ALLOC_GREF, None),
    "ioctl of every second": lambda domain: domain.evtchn.ioctl(0, memoryview(bytearray(8))[::2]),
    "Channel.connect(-1)": lambda domain: usermm.Channel.connect(domain, -1, "x", 0),
    "Channel.connect(99999)": lambda domain: usermm.Channel.connect(domain, 99999, "x", 0),
    "Channel.connect(None)": lambda domain: usermm.Channel.connect(domain, None, "x", 0),
    "Channel.connect('a/b')": lambda domain: usermm.Channel.connect(domain, "a/b", "x", 0),
    "Channel.listen(peer=-1)": lambda domain: usermm.Channel.listen(domain, "x", -1),
    "Channel.listen(slots=1.5)": lambda domain: usermm.Channel.listen(domain, "x", slots=1.5),
    "Channel.listen(slot_bytes='x')": lambda domain: usermm.Channel.listen(domain, "x", slot_bytes="x"),
    "Channel.listen(stream_bytes=-1)": lambda domain: usermm.Channel.listen(domain, "x", stream_bytes=-1),
    "Channel.listen(long name)": lambda domain: usermm.Channel.listen(domain, "x" * 5000),
    "Channel.listen(5)": lambda domain: usermm.Channel.listen(domain, 5),
}


WRONG_KINDS = {
    "allocate(1, 1.0)",
    "allocate('x')",
    "gntalloc.mmap(0, 1.0)",
    "gntdev.mmap(0.0, 1)",
    "unmap_grant_ref(0, 1.0)",
    "Channel.connect(None)",
    "notify([])",
    "notify('x')",
    "unmask([])",
    "unmask('x')",
    "revoke([])",
    "revoke('x')",
    "map_many(3)",
    "map_grant_ref(3)",
    "gntalloc.mmap(0, 1, 'x')",
    "gntdev.mmap(0, 1, 1, 'x')",
    "open_gntalloc(limit='x')",
    "copy(3)",
    "copy([3])",
    "copy of '1' bytes",
    "copy from ('x', 8, 0)",
    "copy from None",
    "set_permissions(3)",
    "set_permissions((1,))",
    "atomically(3)",
    "ioctl('x')",
    "ioctl(None)",
    "ioctl of every second",
    "Channel.listen(slots=1.5)",
    "Channel.listen(slot_bytes='x')",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_that_is_none(hypervisor: usermm.Hypervisor, name: str) -> None:
    with usermm.Domain(hypervisor.socket) as domain:
        kind = usermm.ArgumentTypeError if name in WRONG_KINDS else usermm.ArgumentError
        refused_line(lambda: CALLS[name](domain), kind)
        assert domain.gntalloc.allocate(domain.domid, 1024).closed is False  # the limit is untouched


@pytest.mark.parametrize("kind", [np.int64, np.uint32])
def test_numbers_of_numpy_are_numbers(hypervisor: usermm.Hypervisor, kind: Any) -> None:
    with usermm.Domain(hypervisor.socket) as domain:
        pages = domain.gntalloc.allocate(kind(domain.domid), kind(2))
        assert type(pages.domid) is int
        for wanted in (kind(pages.references[0]), np.array(pages.references, kind)):
            with domain.gntdev.map(kind(domain.domid), wanted) as mapped:
                assert all(type(number) is int for number in mapped.references[0])
        pages.close()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"domid": 1.5}, usermm.ArgumentTypeError),
        ({"domid": 1 << 40}, usermm.ArgumentError),
        ({"domid": -1}, usermm.ArgumentError),
        ({"name": "\ud800"}, usermm.ArgumentError),
        ({"name": 5}, usermm.ArgumentError),
        ({"limit": "x"}, usermm.ArgumentTypeError),
        ({"limit": -1}, usermm.ArgumentError),
    ],
)
def test_a_domain_that_is_none(hypervisor: usermm.Hypervisor, given: dict[str, Any], kind: type) -> None:
    refused_line(lambda: usermm.Domain(hypervisor.socket, **given), kind)


def test_an_answer_that_cannot_be_written_is_not_asked_for(hypervisor: usermm.Hypervisor) -> None:
    """The pages were allocated, and nobody knew their references."""
    with usermm.Domain(hypervisor.socket, limit=1) as domain:
        argument = xen_gntalloc.ALLOC.pack(domain.domid, 0, 1, 0) + bytes(8)
        with pytest.raises(usermm.GrantError) as caught:
            domain.gntalloc.ioctl(xen_gntalloc.ALLOC_GREF, argument)
        assert caught.value.errno == errno.EFAULT
        words = memoryview(bytearray(argument)).cast("I")
        domain.gntalloc.ioctl(xen_gntalloc.ALLOC_GREF, words)
        index = xen_gntalloc.ALLOC.unpack_from(words.cast("B"))[3]
        domain.gntalloc.ioctl(xen_gntalloc.DEALLOC_GREF, xen_gntalloc.DEALLOC.pack(index, 1))
