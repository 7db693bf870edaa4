"""`ModelGntalloc`: /dev/xen/gntalloc of a model domain."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from usermm.errors import from_errno, grant_refused
from usermm.testing.grant_layouts import Argument, copy_in, copy_in_array, is_shared, is_writable, pages_of, unknown
from usermm.testing.grant_machine import Grant, ModelDomain, Notification
from usermm.testing.grant_memory import ModelMapping
from usermm.uapi import xen_gntalloc as uapi
from usermm.uapi.xen_gntdev import PAGE_BYTES

_ACTIONS = uapi.NOTIFY_CLEAR_BYTE | uapi.NOTIFY_SEND_EVENT
_HEADER = uapi.ALLOC.size


@dataclass(eq=False)
class _Listed:
    """A page of this file, by its index."""

    grant: Grant
    notification: Notification = field(default_factory=Notification)


class ModelGntalloc:
    """One open file. Its pages are listed by index; an index is never used twice by one file."""

    def __init__(self, domain: ModelDomain) -> None:
        self.closed = False
        self._domain = domain
        self._listed: dict[int, _Listed] = {}
        self._next_index = 0
        domain.files.append(self)

    def ioctl(self, request: int, argument: Argument) -> int:
        """DeviceError: EBADF, EFAULT for a short argument, ENOTTY, and those of the calls below."""
        self._check_open()
        if request == uapi.ALLOC_GREF:
            self._alloc(argument)
        elif request == uapi.DEALLOC_GREF:
            self._dealloc(*copy_in(argument, uapi.DEALLOC))
        elif request == uapi.SET_UNMAP_NOTIFY:
            self._set_unmap_notify(*copy_in(argument, uapi.NOTIFY))
        else:
            raise unknown("gntalloc", request)
        return 0

    def _alloc(self, argument: Argument) -> None:
        """EINVAL: no page. ENOSPC: the domain would have more than its limit, with those that only peers still map."""
        grantee, flags, count, _ = copy_in(argument, uapi.ALLOC)
        if not count:
            raise grant_refused(errno.EINVAL, "ALLOC_GREF(0): at least one page")
        copy_in_array(argument, uapi.REFERENCE, _HEADER, count)
        if len(self._domain.grants) + count > self._domain.limit_pages:
            raise grant_refused(errno.ENOSPC, f"ALLOC_GREF({count}): the domain may have {self._domain.limit_pages}")
        writable = bool(flags & uapi.WRITABLE)
        uapi.ALLOC.pack_into(argument, 0, grantee, flags, count, self._next_index)
        for position in range(count):
            grant = self._domain.grant(grantee, writable=writable)
            grant.local_users += 1
            self._listed[self._next_index] = _Listed(grant)
            self._next_index += PAGE_BYTES
            uapi.REFERENCE.pack_into(argument, _HEADER + position * uapi.REFERENCE.size, grant.reference)

    def _dealloc(self, index: int, count: int) -> None:
        """Whether a peer maps the pages or not, it succeeds: what is in use goes later. EINVAL: not all are listed."""
        if not count or not self._has(index, count):
            raise grant_refused(errno.EINVAL, f"DEALLOC_GREF({index:#x}, {count}): not pages of this file")
        for position in range(count):
            self._unlist(index + position * PAGE_BYTES)

    def _unlist(self, index: int) -> None:
        self._leave(self._listed.pop(index))

    def _leave(self, listed: _Listed) -> None:
        """One local user less. After the last the grant ends and the notification is carried out."""
        listed.grant.local_users -= 1
        if not listed.grant.local_users:
            self._domain.end(listed.grant)
            self._domain.machine.notify(self._domain, listed.notification, listed.grant.page)

    def _set_unmap_notify(self, index: int, action: int, port: int) -> None:
        """ENOENT: no page there. EINVAL: an unknown action, or a port that the domain does not have."""
        listed = self._listed.get(index - index % PAGE_BYTES)
        if listed is None:
            raise grant_refused(errno.ENOENT, f"SET_UNMAP_NOTIFY({index:#x}): no page of this file")
        if action & ~_ACTIONS:
            raise grant_refused(errno.EINVAL, f"SET_UNMAP_NOTIFY: unknown action {action:#x}")
        channels = self._domain.machine.channels
        if action & uapi.NOTIFY_SEND_EVENT and not channels.is_bound(self._domain.domid, port):
            raise grant_refused(errno.EINVAL, f"SET_UNMAP_NOTIFY: the domain has no port {port}")
        listed.notification = Notification(action, index % PAGE_BYTES, port)

    def mmap(self, length: int, prot: int, flags: int, offset: int) -> ModelMapping:
        """Any run of pages of this file, over several allocations too.

        EINVAL: not MAP_SHARED, not at a page. ENOENT: not there.
        """
        self._check_open()
        count = pages_of(length)
        if length <= 0 or offset % PAGE_BYTES or not is_shared(flags, "mmap"):
            raise grant_refused(errno.EINVAL, "mmap(gntalloc): only MAP_SHARED, of whole pages, one at least")
        if not self._has(offset, count):
            raise grant_refused(errno.ENOENT, f"mmap(gntalloc): {count} pages at {offset:#x} are not of this file")
        listed = [self._listed[offset + position * PAGE_BYTES] for position in range(count)]
        mapping = self._domain.memory.map([each.grant.page for each in listed], writable=is_writable(prot))

        def unmapped() -> None:
            for position, each in enumerate(listed):
                each.grant.local.remove((mapping, position))
                self._leave(each)

        for position, each in enumerate(listed):
            each.grant.local_users += 1
            each.grant.local.append((mapping, position))
        mapping.on_unmap = unmapped
        return mapping

    def munmap(self, mapping: ModelMapping) -> None:
        """Also after the file was closed."""
        self._domain.memory.unmap(mapping)

    def close(self) -> None:
        """Deallocates all; what is mapped stays mapped."""
        if not self.closed:
            self.closed = True
            self._domain.files.remove(self)
            for index in tuple(self._listed):
                self._unlist(index)

    def _has(self, index: int, count: int) -> bool:
        return all(index + position * PAGE_BYTES in self._listed for position in range(count))

    def _check_open(self) -> None:
        if self.closed:
            raise from_errno(errno.EBADF, "gntalloc: the file is closed: open another")
