"""The tests' language: the devices' calls with their bytes packed and unpacked."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

from conformance.grants_world import PAGE, DomainDriver, FileDriver

from usermm.uapi import xen_evtchn, xen_gntalloc, xen_gntdev

READ = mmap.PROT_READ
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
SHARED = mmap.MAP_SHARED
PRIVATE = mmap.MAP_PRIVATE

Reference = tuple[int, int]


class Allocated(NamedTuple):
    """What ALLOC_GREF gave; `granted` are (domid, reference)."""

    index: int
    references: list[int]
    granted: list[Reference]


class Owner:
    """A domain that grants: one gntalloc file."""

    def __init__(self, domain: DomainDriver) -> None:
        self.domain = domain
        self.file = domain.open("gntalloc")

    def alloc(self, grantee: int, count: int = 1, *, writable: bool = False) -> Allocated:
        argument = bytearray(xen_gntalloc.ALLOC.pack(grantee, xen_gntalloc.WRITABLE * writable, count, 0))
        argument += bytes(max(8, 4 * count))
        assert self.file.ioctl(xen_gntalloc.ALLOC_GREF, argument) == 0
        _, _, _, index = xen_gntalloc.ALLOC.unpack_from(argument)
        references = [
            xen_gntalloc.REFERENCE.unpack_from(argument, xen_gntalloc.ALLOC.size + 4 * at)[0] for at in range(count)
        ]
        return Allocated(index, references, [(self.domain.domid, reference) for reference in references])

    def dealloc(self, index: int, count: int = 1) -> None:
        assert self.file.ioctl(xen_gntalloc.DEALLOC_GREF, bytearray(xen_gntalloc.DEALLOC.pack(index, count))) == 0

    def map(self, index: int, count: int = 1, prot: int = READ_WRITE, flags: int = SHARED) -> int:
        return self.file.mmap(count * PAGE, prot, flags, index)

    def share(self, grantee: int, data: Sequence[bytes], *, writable: bool = False) -> tuple[Allocated, int]:
        """Pages that begin with these bytes, and their address here."""
        made = self.alloc(grantee, len(data), writable=writable)
        address = self.map(made.index, len(data))
        for at, each in enumerate(data):
            self.domain.poke(address + at * PAGE, each)
        return made, address

    def notify(self, index: int, action: int, port: int = 0) -> None:
        set_unmap_notify(self.file, index, action, port)


class User:
    """A domain that maps, by the mainline device."""

    def __init__(self, domain: DomainDriver) -> None:
        self.domain = domain
        self.file = domain.open("gntdev")

    def map_grant_ref(self, references: Sequence[Reference]) -> int:
        argument = bytearray(xen_gntdev.MAP.pack(len(references), 0))
        argument += b"".join(xen_gntdev.REFERENCE.pack(*each) for each in references)
        assert self.file.ioctl(xen_gntdev.MAP_GRANT_REF, argument) == 0
        return int(xen_gntdev.MAP.unpack_from(argument)[1])

    def mmap(self, index: int, count: int = 1, prot: int = READ, flags: int = SHARED) -> int:
        return self.file.mmap(count * PAGE, prot, flags, index)

    def map(self, references: Sequence[Reference], prot: int = READ) -> int:
        """Both steps; the address."""
        return self.mmap(self.map_grant_ref(references), len(references), prot)

    def unmap_grant_ref(self, index: int, count: int = 1) -> None:
        assert self.file.ioctl(xen_gntdev.UNMAP_GRANT_REF, bytearray(xen_gntdev.UNMAP.pack(index, count))) == 0

    def offset_of(self, address: int) -> tuple[int, int]:
        argument = bytearray(xen_gntdev.OFFSET.pack(address, 0, 0))
        assert self.file.ioctl(xen_gntdev.GET_OFFSET_FOR_VADDR, argument) == 0
        _, index, count = xen_gntdev.OFFSET.unpack(argument)
        return index, count

    def notify(self, index: int, action: int, port: int = 0) -> None:
        set_unmap_notify(self.file, index, action, port)


class User2007:
    """A domain that maps, by the first device."""

    def __init__(self, domain: DomainDriver) -> None:
        self.domain = domain
        self.file = domain.open("gntdev", "seed2007")

    def map_raw(self, count: int, pointer: int) -> int:
        """The index, which the caller may not expect to be a page's."""
        argument = bytearray(xen_gntdev.MAP_2007.pack(count, pointer, -1))
        result = self.file.ioctl(xen_gntdev.MAP_GRANT_REF, argument)
        assert result == 0, f"{result} instead of 0 or an error"
        got_count, got_pointer, index = xen_gntdev.MAP_2007.unpack(argument)
        assert (got_count, got_pointer) == (count, pointer)
        return int(index)

    def take(self, references: Sequence[Reference]) -> int:
        """MAP_GRANT_REF; the first slot."""
        data = b"".join(xen_gntdev.REFERENCE.pack(*each) for each in references)
        slot, rest = divmod(self.map_raw(len(references), self.domain.place(data)), PAGE)
        assert rest == 0
        return slot

    def mmap(self, slot: int, count: int = 1, prot: int = READ, flags: int = SHARED) -> int:
        return self.file.mmap(count * PAGE, prot, flags, slot * PAGE)

    def free_raw(self, index: int, count: int) -> None:
        assert self.file.ioctl(xen_gntdev.UNMAP_GRANT_REF, bytearray(xen_gntdev.UNMAP_2007.pack(index, count))) == 0

    def free(self, slot: int, count: int = 1) -> None:
        self.free_raw(slot * PAGE, count)

    def offset_of(self, address: int) -> tuple[int, int]:
        argument = bytearray(xen_gntdev.OFFSET_2007.pack(address, -1, 0))
        assert self.file.ioctl(xen_gntdev.GET_OFFSET_FOR_VADDR, argument) == 0
        _, offset, count = xen_gntdev.OFFSET_2007.unpack(argument)
        return offset, count


class Events:
    """An evtchn file."""

    def __init__(self, domain: DomainDriver) -> None:
        self.domain = domain
        self.file = domain.open("evtchn")

    def bind_unbound(self, remote_domid: int) -> int:
        return self.file.ioctl(xen_evtchn.BIND_UNBOUND_PORT, bytearray(xen_evtchn.UNBOUND.pack(remote_domid)))

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        argument = bytearray(xen_evtchn.INTERDOMAIN.pack(remote_domid, remote_port))
        return self.file.ioctl(xen_evtchn.BIND_INTERDOMAIN, argument)

    def bind_virq(self, virq: int) -> int:
        return self.file.ioctl(xen_evtchn.BIND_VIRQ, bytearray(xen_evtchn.VIRQ.pack(virq)))

    def unbind(self, port: int) -> None:
        assert self.file.ioctl(xen_evtchn.UNBIND, bytearray(xen_evtchn.PORT.pack(port))) == 0

    def notify(self, port: int) -> None:
        assert self.file.ioctl(xen_evtchn.NOTIFY, bytearray(xen_evtchn.PORT.pack(port))) == 0

    def restrict(self, domid: int) -> None:
        assert self.file.ioctl(xen_evtchn.RESTRICT_DOMID, bytearray(xen_evtchn.RESTRICTION.pack(domid))) == 0

    def reset(self) -> None:
        assert self.file.ioctl(xen_evtchn.RESET, bytearray()) == 0

    def read(self, size: int = PAGE) -> list[int]:
        return [port for (port,) in xen_evtchn.PORT.iter_unpack(self.file.read(size))]

    def unmask(self, *ports: int) -> None:
        data = b"".join(xen_evtchn.PORT.pack(port) for port in ports)
        assert self.file.write(data) == len(data)

    def take(self, timeout_s: float = 10) -> list[int]:
        """Waits for events and takes them; [] if there are none in time."""
        return sorted(self.read()) if self.file.readable(timeout_s) else []


def set_unmap_notify(file: FileDriver, index: int, action: int, port: int) -> None:
    assert file.ioctl(xen_gntdev.SET_UNMAP_NOTIFY, bytearray(xen_gntdev.NOTIFY.pack(index, action, port))) == 0


class Couple(NamedTuple):
    """An event channel between two domains, its first event taken: each side's file and port."""

    one: Events
    one_port: int
    other: Events
    other_port: int


def connect(one: DomainDriver, other: DomainDriver) -> Couple:
    first, second = Events(one), Events(other)
    port = first.bind_unbound(other.domid)
    remote = second.bind_interdomain(one.domid, port)
    assert second.take() == [remote]  # a binding starts pending
    second.unmask(remote)
    return Couple(first, port, second, remote)
