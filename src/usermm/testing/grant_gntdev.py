"""`ModelGntdev`: /dev/xen/gntdev of a model domain as Linux has it (`mainline`)."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from usermm.errors import from_errno, grant_refused
from usermm.testing.grant_copy import copy_segments
from usermm.testing.grant_layouts import Argument, copy_in, copy_in_array, is_shared, is_writable, pages_of, unknown
from usermm.testing.grant_machine import BadGrantError, ModelDomain, Notification
from usermm.testing.grant_memory import ModelMapping
from usermm.uapi import xen_gntdev as uapi
from usermm.uapi.xen_gntdev import PAGE_BYTES

_ACTIONS = uapi.NOTIFY_CLEAR_BYTE | uapi.NOTIFY_SEND_EVENT


@dataclass(eq=False)
class _Map:
    """The references of one MAP_GRANT_REF, at `index`. Mapped at most once; `tried`: refused counts as well."""

    index: int
    references: list[tuple[int, int]]
    tried: bool = False
    writable: bool = False
    mapping: ModelMapping | None = None
    notification: Notification = field(default_factory=Notification)
    notified_page: int = 0

    @property
    def end(self) -> int:
        return self.index + len(self.references) * PAGE_BYTES


class ModelGntdev:
    """One open file: a list of maps."""

    def __init__(self, domain: ModelDomain) -> None:
        self.closed = False
        self._domain = domain
        self._maps: list[_Map] = []
        self._mapped: dict[int, _Map] = {}
        """By the address of the mapping, whether the map is still listed or not."""
        self._next_index = 0
        domain.files.append(self)

    def ioctl(self, request: int, argument: Argument) -> int:
        """DeviceError: EBADF, EFAULT for a short argument, ENOTTY, and those of the calls below."""
        self._check_open()
        if request == uapi.MAP_GRANT_REF:
            self._map_grant_ref(argument)
        elif request == uapi.UNMAP_GRANT_REF:
            self._unmap_grant_ref(*copy_in(argument, uapi.UNMAP))
        elif request == uapi.GET_OFFSET_FOR_VADDR:
            found = self._mapping_at(copy_in(argument, uapi.OFFSET)[0])
            uapi.OFFSET.pack_into(argument, 0, copy_in(argument, uapi.OFFSET)[0], found.index, len(found.references))
        elif request == uapi.SET_UNMAP_NOTIFY:
            self._set_unmap_notify(*copy_in(argument, uapi.NOTIFY))
        elif request == uapi.GRANT_COPY:
            copy_segments(self._domain, *copy_in(argument, uapi.COPY))
        else:
            raise unknown("gntdev", request)
        return 0

    def _map_grant_ref(self, argument: Argument) -> None:
        """Looks at no reference: mmap does. EINVAL: none, or more than 65536."""
        count, _ = copy_in(argument, uapi.MAP)
        if not 0 < count <= uapi.MOST_GRANTS:
            raise grant_refused(errno.EINVAL, f"MAP_GRANT_REF({count}): from 1 to {uapi.MOST_GRANTS}")
        references = copy_in_array(argument, uapi.REFERENCE, uapi.MAP.size, count)
        made = _Map(self._next_index, [(domid, reference) for domid, reference in references])
        self._maps.append(made)
        self._next_index = made.end
        uapi.MAP.pack_into(argument, 0, count, made.index)

    def _unmap_grant_ref(self, index: int, count: int) -> None:
        """Takes the map off the list; what is mapped stays mapped. ENOENT: not exactly one MAP_GRANT_REF's.

        Of the index the page counts; `count` 0 is any.
        """
        start = index - index % PAGE_BYTES
        found = next((each for each in self._maps if each.index == start and count in (0, len(each.references))), None)
        if found is None:
            raise grant_refused(errno.ENOENT, f"UNMAP_GRANT_REF({index:#x}, {count}): not what a MAP_GRANT_REF made")
        self._maps.remove(found)

    def mmap(self, length: int, prot: int, flags: int, offset: int) -> ModelMapping:
        """Maps all grants of one MAP_GRANT_REF. Read-only unless PROT_WRITE is asked for.

        EINVAL: whatever is wrong, with the map, the flags or a grant. After a bad grant the index is spent.
        """
        self._check_open()
        writable = is_writable(prot)
        if not is_shared(flags, "mmap") and writable:
            raise grant_refused(errno.EINVAL, "mmap(gntdev): a writable mapping needs MAP_SHARED")
        found = self._find(offset, pages_of(length))
        if found is None or found.tried:
            raise grant_refused(errno.EINVAL, f"mmap(gntdev): {length} bytes at {offset:#x}: no map, or tried already")
        if found.notification.action & uapi.NOTIFY_CLEAR_BYTE and not writable:
            raise grant_refused(errno.EINVAL, "mmap(gntdev): CLEAR_BYTE is set, and the mapping would be read-only")
        here = found
        here.tried, here.writable = True, writable
        try:
            mapping = self._domain.machine.map(
                self._domain, here.references, writable=writable, on_unmap=lambda: self._unmapped(here)
            )
        except BadGrantError as error:
            raise grant_refused(errno.EINVAL, f"mmap(gntdev): reference {error.index}: {error.reason}") from error
        here.mapping = mapping
        self._mapped[mapping.address] = here
        return mapping

    def munmap(self, mapping: ModelMapping) -> None:
        """Also after the file was closed."""
        self._domain.memory.unmap(mapping)

    def _unmapped(self, made: _Map) -> None:
        assert made.mapping is not None
        del self._mapped[made.mapping.address]
        self._domain.machine.notify(self._domain, made.notification, made.mapping.pages[made.notified_page])

    def _mapping_at(self, address: int) -> _Map:
        """Any address inside a mapping of this file. EINVAL: elsewhere."""
        mapping = self._domain.memory.at(address)
        found = None if mapping is None else self._mapped.get(mapping.address)
        if found is None:
            raise grant_refused(errno.EINVAL, f"GET_OFFSET_FOR_VADDR({address:#x}): no mapping of this file")
        return found

    def _set_unmap_notify(self, index: int, action: int, port: int) -> None:
        """EINVAL: an unknown action, a port that the domain does not have, CLEAR_BYTE in a read-only mapping.

        ENOENT: no map there.
        """
        if action & ~_ACTIONS:
            raise grant_refused(errno.EINVAL, f"SET_UNMAP_NOTIFY: unknown action {action:#x}")
        channels = self._domain.machine.channels
        if action & uapi.NOTIFY_SEND_EVENT and not channels.is_bound(self._domain.domid, port):
            raise grant_refused(errno.EINVAL, f"SET_UNMAP_NOTIFY: the domain has no port {port}")
        found = next((each for each in self._maps if each.index <= index < each.end), None)
        if found is None:
            raise grant_refused(errno.ENOENT, f"SET_UNMAP_NOTIFY({index:#x}): no map there")
        if action & uapi.NOTIFY_CLEAR_BYTE and found.tried and not found.writable:
            raise grant_refused(errno.EINVAL, "SET_UNMAP_NOTIFY: the mapping is read-only, its byte cannot be cleared")
        found.notified_page, byte = divmod(index - found.index, PAGE_BYTES)
        found.notification = Notification(action, byte, port)

    def close(self) -> None:
        """What is mapped stays mapped."""
        if not self.closed:
            self.closed = True
            self._domain.files.remove(self)
            self._maps.clear()

    def _find(self, index: int, count: int) -> _Map | None:
        return next((each for each in self._maps if (each.index, len(each.references)) == (index, count)), None)

    def _check_open(self) -> None:
        if self.closed:
            raise from_errno(errno.EBADF, "gntdev: the file is closed: open another")
