"""/dev/xen/gntdev between Linux processes: the `mainline` personality, as Linux has the device today.

The contract is that of Linux' drivers/xen/gntdev.c as user space sees it; `docs/grants.md` states it call by call.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from usermm.errors import BadReferenceError, grant_refused
from usermm.grants import user_memory
from usermm.grants.alone import Alone, Rank
from usermm.grants.copying import copy_segments
from usermm.grants.files import PAGE_BYTES, UNCLEARABLE, Reference
from usermm.grants.foreign import Foreign
from usermm.grants.foreign_memory import ForeignMemory
from usermm.grants.local_file import LocalFile, Requests
from usermm.grants.session import Refusal
from usermm.uapi import xen_gntdev as abi


@dataclass(slots=True)
class _Notification:
    page: int
    offset_bytes: int
    actions: int
    port: int


@dataclass(slots=True, weakref_slot=True)
class _Map:
    """What one MAP_GRANT_REF made. It can be mapped once; it stays useful to its mapping after UNMAP_GRANT_REF."""

    first: int
    references: tuple[Reference, ...]
    memory: weakref.ref[MappedGrants] | None = None
    is_spent: bool = False
    """mmap came to its grants, and mapped them or was refused."""
    writable: bool = False
    """What that mmap asked for."""
    notification: _Notification | None = None
    mapped_in: dict[int, _Map] | None = None
    """The mappings of its file, in which it is while it is mapped."""

    @property
    def count(self) -> int:
        return len(self.references)

    @property
    def index(self) -> int:
        return self.first * PAGE_BYTES

    @property
    def call(self) -> str:
        """Its mmap, for messages."""
        return f"gntdev: mmap({self.count * PAGE_BYTES} bytes at {self.index:#x})"


class MappedGrants(ForeignMemory):
    """Pages of other domains, mapped through a gntdev file."""

    map: _Map | None = None

    def _let_go(self, *, wait: bool) -> None:
        if self.map is not None and self.map.mapped_in is not None:
            self.map.mapped_in.pop(self.map.first, None)
        super()._let_go(wait=wait)


class LocalGntdev(LocalFile):
    """An open gntdev file of the mainline personality. Any thread may call anything."""

    _device = "gntdev"

    def __init__(self, foreign: Foreign) -> None:
        super().__init__()
        self._foreign = foreign
        self._maps: dict[int, _Map] = {}
        self._next_page = 0
        self._alone = Alone(Rank.FILE)
        self._mapped: dict[int, _Map] = {}

    def _make_requests(self) -> Requests:
        return {
            abi.MAP_GRANT_REF: self._map_grant_ref,
            abi.UNMAP_GRANT_REF: self._unmap_grant_ref,
            abi.GET_OFFSET_FOR_VADDR: self._get_offset_for_vaddr,
            abi.SET_UNMAP_NOTIFY: self._set_unmap_notify,
            abi.GRANT_COPY: self._grant_copy,
        }

    def mmap(
        self, length: int, prot: int, flags: int, offset: int, kind: type[MappedGrants] = MappedGrants
    ) -> MappedGrants:
        """Maps all pages of one MAP_GRANT_REF, once. EINVAL: everything else, and grants that cannot be mapped so.

        An index whose grants were refused is spent, too: MAP_GRANT_REF gives another.
        """
        self._check_usable("mmap")
        writable = bool(prot & _mmap.PROT_WRITE)
        if writable and not flags & _mmap.MAP_SHARED:
            text = f"mmap({length} bytes at {offset:#x}): a writable private mapping: pass MAP_SHARED"
            raise grant_refused(errno.EINVAL, f"gntdev: {text}")
        found = self._maps.get(offset // PAGE_BYTES)
        pages = -(-length // PAGE_BYTES)  # as mmap(2) rounds
        if found is None or offset % PAGE_BYTES or pages != found.count:
            text = f"mmap({length} bytes at {offset:#x}): no MAP_GRANT_REF gave this index with {pages} pages"
            raise grant_refused(errno.EINVAL, f"gntdev: {text}: map all of one")
        self._alone.run("mmap", lambda: self._spend(found, writable))
        return self._map(found, writable, kind)

    def map(
        self, references: Sequence[Reference], *, writable: bool, kind: type[MappedGrants]
    ) -> tuple[MappedGrants, int]:
        """MAP_GRANT_REF and mmap. Errors of both."""
        found = self._add(references)
        found.is_spent, found.writable = True, writable  # nobody has its index yet
        try:
            return self._map(found, writable, kind), found.index
        except BaseException:
            self._maps.pop(found.first, None)
            raise

    def _map(self, found: _Map, writable: bool, kind: type[MappedGrants]) -> MappedGrants:
        try:
            memory = self._foreign.map(found.references, writable=writable, kind=kind)
        except Refusal as refusal:
            raise grant_refused(refusal.errno, f"{found.call}: {refusal.reason}") from None
        except BaseException:
            found.is_spent = False  # something ran out before its grants were looked at
            raise
        memory.map = found
        found.memory = weakref.ref(memory)
        found.mapped_in = self._mapped
        self._mapped[found.first] = found
        if found.notification is not None:
            self._notify_if_possible(found, found.notification)
        return memory

    def _spend(self, found: _Map, writable: bool) -> None:
        """One mmap of all that are tried goes on."""
        if found.is_spent:
            raise grant_refused(errno.EINVAL, f"{found.call}: it was mapped or refused before: take a new index")
        before = found.notification
        if before is not None and before.actions & abi.NOTIFY_CLEAR_BYTE and not writable:
            raise grant_refused(errno.EINVAL, f"{found.call}: {UNCLEARABLE}")
        found.is_spent, found.writable = True, writable

    def close(self) -> None:
        """Forgets what is not mapped; mappings stay until they are unmapped."""
        self._closed = True
        self._maps.clear()

    def _map_grant_ref(self, argument: bytearray | memoryview) -> None:
        count, _ = abi.MAP.unpack_from(argument)
        _check_count(count)
        inline = memoryview(argument)[abi.MAP.size :]
        if len(inline) < count * abi.REFERENCE.size:
            text = f"gntdev: MAP_GRANT_REF({count} references): only {len(inline)} bytes of them came"
            raise grant_refused(errno.EFAULT, text)
        index = self.map_grant_ref(tuple(abi.REFERENCE.iter_unpack(inline[: count * abi.REFERENCE.size])))
        abi.MAP.pack_into(argument, 0, count, index)

    def map_grant_ref(self, references: Sequence[Reference]) -> int:
        """MAP_GRANT_REF. BadReferenceError (EINVAL): none, or more than 65536."""
        return self._add(references).index

    def _add(self, references: Sequence[Reference]) -> _Map:
        self._check_usable("MAP_GRANT_REF")
        _check_count(len(references))
        return self._alone.run("MAP_GRANT_REF", lambda: self._make_map(tuple(references)))

    def _make_map(self, references: tuple[Reference, ...]) -> _Map:
        first = self._next_page
        self._next_page += len(references)
        found = self._maps[first] = _Map(first, references)
        return found

    def _unmap_grant_ref(self, argument: bytearray | memoryview) -> None:
        self.unmap_grant_ref(*abi.UNMAP.unpack_from(argument))

    def unmap_grant_ref(self, index: int, count: int) -> None:
        """UNMAP_GRANT_REF; `count` 0 is any. BadReferenceError (ENOENT)."""
        self._check_usable("UNMAP_GRANT_REF")
        found = self._maps.get(index // PAGE_BYTES)
        if found is None or (count and found.count != count):
            text = f"gntdev: UNMAP_GRANT_REF(index {index:#x}, {count} pages): no MAP_GRANT_REF gave these together"
            raise grant_refused(errno.ENOENT, text)
        del self._maps[found.first]

    def _get_offset_for_vaddr(self, argument: bytearray | memoryview) -> None:
        address, _, _ = abi.OFFSET.unpack_from(argument)
        for found in list(self._mapped.values()):
            memory = found.memory() if found.memory is not None else None
            if memory is not None and memory.is_mapped and 0 <= address - memory.address < len(memory):
                abi.OFFSET.pack_into(argument, 0, address, found.index, found.count)
                return
        text = f"gntdev: GET_OFFSET_FOR_VADDR({address:#x}): no grant of this file is mapped there"
        raise grant_refused(errno.EINVAL, text)

    def _set_unmap_notify(self, argument: bytearray | memoryview) -> None:
        index, actions, port = abi.NOTIFY.unpack_from(argument)
        call = f"gntdev: SET_UNMAP_NOTIFY(index {index:#x}, action {actions}, port {port})"
        if actions & ~(abi.NOTIFY_CLEAR_BYTE | abi.NOTIFY_SEND_EVENT):
            raise grant_refused(errno.EINVAL, f"{call}: actions are 1 CLEAR_BYTE and 2 SEND_EVENT")
        self._foreign.check_notification(index % PAGE_BYTES, actions, port, call)  # the port first, as the driver does
        page = index // PAGE_BYTES
        found = next((each for each in list(self._maps.values()) if 0 <= page - each.first < each.count), None)
        if found is None:
            raise grant_refused(errno.ENOENT, f"{call}: no MAP_GRANT_REF gave this index")
        wanted = _Notification(page - found.first, index % PAGE_BYTES, actions, port)
        before = self._alone.run("SET_UNMAP_NOTIFY", lambda: _keep(found, wanted, call))
        self._notify(found, wanted)
        if before is not None and before.page != wanted.page:  # the hypervisor keeps one for each page
            self._notify(found, _Notification(before.page, 0, 0, 0))

    def _notify(self, found: _Map, wanted: _Notification) -> None:
        memory = found.memory() if found.memory is not None else None
        if memory is not None and memory.is_mapped:
            memory.notify_on_unmap(wanted.page, wanted.offset_bytes, wanted.actions, wanted.port)

    def _notify_if_possible(self, found: _Map, wanted: _Notification) -> None:
        """Of a port that was unbound since, nothing is sent; the mapping is not to blame."""
        try:
            self._notify(found, wanted)
        except BadReferenceError:
            actions = wanted.actions & ~abi.NOTIFY_SEND_EVENT
            self._notify(found, _Notification(wanted.page, wanted.offset_bytes, actions, 0))

    def _grant_copy(self, argument: bytearray | memoryview) -> None:
        count, pointer = abi.COPY.unpack_from(argument)
        call = f"gntdev: GRANT_COPY({count} segments)"
        segments = bytearray(user_memory.read(pointer, count * abi.SEGMENT.size, call))
        try:
            copy_segments(self._foreign, segments, call)
        finally:
            user_memory.write(pointer, bytes(segments), call)


def _keep(found: _Map, wanted: _Notification, call: str) -> _Notification | None:
    """The one before."""
    if wanted.actions & abi.NOTIFY_CLEAR_BYTE and found.is_spent and not found.writable:
        raise grant_refused(errno.EINVAL, f"{call}: CLEAR_BYTE on a read-only mapping: map it writable")
    before, found.notification = found.notification, wanted
    return before


def _check_count(count: int) -> None:
    if not 0 < count <= abi.MOST_GRANTS:
        text = f"gntdev: MAP_GRANT_REF({count} references): pass 1 to {abi.MOST_GRANTS}"
        raise grant_refused(errno.EINVAL, text)
