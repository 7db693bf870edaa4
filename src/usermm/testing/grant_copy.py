"""GRANT_COPY of the model: bytes between granted pages and a domain's own memory, segment by segment."""

from __future__ import annotations

import errno
import operator

from usermm.errors import grant_refused
from usermm.testing.grant_channels import DOMID_SELF
from usermm.testing.grant_machine import BadGrantError, ModelDomain
from usermm.uapi import xen_gntdev as uapi
from usermm.uapi.xen_gntdev import PAGE_BYTES, GrantStatus

_KNOWN = uapi.COPY_SOURCE_GRANTED | uapi.COPY_DEST_GRANTED
_STATUS_OFFSET = uapi.SEGMENT.size - 4
_LENGTH = operator.itemgetter(2)


def copy_segments(domain: ModelDomain, count: int, pointer: int) -> None:
    """Each segment's status says how it went; EINVAL and EFAULT are about the request itself, and copy nothing.

    EINVAL: a segment with no granted side, or one that crosses a granted page's end. EFAULT: a bad pointer.
    """
    segments = list(uapi.SEGMENT.iter_unpack(domain.memory.read(pointer, count * uapi.SEGMENT.size)))
    for _source, _dest, length, flags, _status in segments:
        if not flags & _KNOWN:
            raise grant_refused(errno.EINVAL, "GRANT_COPY: neither side is granted")
        for side, granted in ((_source, uapi.COPY_SOURCE_GRANTED), (_dest, uapi.COPY_DEST_GRANTED)):
            if flags & granted and uapi.COPY_GRANTED.unpack(side)[1] + length > PAGE_BYTES:
                raise grant_refused(errno.EINVAL, "GRANT_COPY: a segment crosses the end of a granted page")
    for source, dest, length, flags, _status in filter(_LENGTH, segments):
        if not flags & uapi.COPY_SOURCE_GRANTED:
            domain.memory.read(_pointer(source), length)
        if not flags & uapi.COPY_DEST_GRANTED:
            domain.memory.write(_pointer(dest), domain.memory.read(_pointer(dest), length))
    for index, (source, dest, length, flags, _status) in enumerate(segments):
        status = _copy(domain, source, dest, length, flags)
        where = pointer + index * uapi.SEGMENT.size + _STATUS_OFFSET
        domain.memory.write(where, int(status).to_bytes(2, "little", signed=True))


def _copy(domain: ModelDomain, source: bytes, dest: bytes, length: int, flags: int) -> GrantStatus:
    if not length:
        return GrantStatus.OKAY  # nothing is looked at
    try:
        if flags & uapi.COPY_SOURCE_GRANTED:
            reference, offset, domid = uapi.COPY_GRANTED.unpack(source)
            page = domain.machine.look_up(domain, _grantor(domain, domid), reference, writable=False).page
            data = bytes(page[offset : offset + length])
        else:
            data = domain.memory.read(_pointer(source), length)
        if flags & uapi.COPY_DEST_GRANTED:
            reference, offset, domid = uapi.COPY_GRANTED.unpack(dest)
            page = domain.machine.look_up(domain, _grantor(domain, domid), reference, writable=True).page
            page[offset : offset + length] = data
        else:
            domain.memory.write(_pointer(dest), data)
    except BadGrantError as error:
        return error.status
    return GrantStatus.OKAY


def _grantor(domain: ModelDomain, domid: int) -> int:
    return domain.domid if domid == DOMID_SELF else domid


def _pointer(side: bytes) -> int:
    return int(uapi.COPY_LOCAL.unpack(side)[0])
