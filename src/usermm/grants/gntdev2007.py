"""The gntdev of 2007 between Linux processes: the `seed2007` personality, with slots instead of maps.

The contract is that of the first driver as it was meant; what it did wrong is not copied. `docs/grants.md` has both.
"""

from __future__ import annotations

import ctypes
import errno
import mmap as _mmap
import threading
import weakref
from dataclasses import dataclass

from usermm.errors import BadReferenceError, DeviceError, grant_refused
from usermm.grants import user_memory
from usermm.grants.alone import Alone, Rank
from usermm.grants.files import PAGE_BYTES, Reference
from usermm.grants.foreign import Foreign
from usermm.grants.local_file import LocalFile, Requests
from usermm.grants.local_gntdev import MappedGrants
from usermm.grants.packed import PackedGntdev2007
from usermm.grants.session import Refusal
from usermm.grants.slots import Slots
from usermm.uapi import xen_gntdev as abi
from usermm.uapi.xen_gntdev import SLOTS_2007

MOST_FILES = 128
"""Open at once in one domain."""

_libc = ctypes.CDLL(None, use_errno=True)
_open_files: weakref.WeakKeyDictionary[Foreign, weakref.WeakSet[LocalGntdev2007]] = weakref.WeakKeyDictionary()
_opening = threading.RLock()  # a signal handler may open one, too


@dataclass(slots=True, eq=False)
class _Mapped:
    """Slots that are MAPPED. `memory` None: the mapping is being made."""

    first: int
    count: int
    memory: weakref.ref[MappedGrants] | None = None

    @property
    def is_gone(self) -> bool:
        if self.memory is None:
            return False
        memory = self.memory()
        return memory is None or not memory.is_mapped


class LocalGntdev2007(LocalFile, PackedGntdev2007):
    """An open gntdev file of 2007. Any thread may call anything; a forked child gets ForkedError (ECHILD)."""

    _device = "gntdev"

    def __init__(self, foreign: Foreign) -> None:
        """Raises LimitError (EMFILE): the domain has 128 files open."""
        super().__init__()
        self._foreign = foreign
        self._slots = Slots()
        self._mapped: list[_Mapped] = []
        self._alone = Alone(Rank.FILE)
        with _opening:
            files = _open_files.setdefault(foreign, weakref.WeakSet())
            if len(files) >= MOST_FILES:
                raise grant_refused(errno.EMFILE, f"gntdev: open: this domain has {MOST_FILES} files open: close one")
            files.add(self)

    def _make_requests(self) -> Requests:
        return {
            abi.MAP_GRANT_REF: self._map_grant_ref,
            abi.UNMAP_GRANT_REF: self._unmap_grant_ref,
            abi.GET_OFFSET_FOR_VADDR: self._get_offset_for_vaddr,
        }

    def mmap(
        self, length: int, prot: int, flags: int, offset: int, kind: type[MappedGrants] = MappedGrants
    ) -> MappedGrants:
        """Maps slots that wait for it, part of an allocation or several: all or none. `length` is rounded up to pages.

        ENXIO: beyond the slots. EINVAL: a slot that is free or mapped, a writable private mapping, an offset that is no
        page's. ENOMEM: a grant cannot be mapped, or memory ran out; the message names it.
        """
        self._check_usable("mmap")
        call = f"gntdev: mmap({length} bytes at {offset:#x})"
        writable = bool(prot & _mmap.PROT_WRITE)
        if writable and not flags & _mmap.MAP_SHARED:
            raise grant_refused(errno.EINVAL, f"{call}: a writable private mapping: pass MAP_SHARED")
        first, rest = divmod(offset, PAGE_BYTES)
        if rest:
            raise grant_refused(errno.EINVAL, f"{call}: the offset is not a page's: pass what MAP_GRANT_REF gave")
        mapped = _Mapped(first, -(-length // PAGE_BYTES))
        references = self._alone.run("mmap", lambda: self._begin(mapped, call))
        try:
            memory = self._foreign.map(references, writable=writable, kind=kind)
        except BaseException as error:
            self._alone.finish(lambda: self._end(mapped), wait=True)
            if isinstance(error, Refusal):
                raise _refused(error, first, call) from None
            raise
        mapped.memory = weakref.ref(memory)
        return memory

    def close(self) -> None:
        """Forgets the slots; what is mapped stays until it is unmapped. May be called again."""
        self._closed = True
        if self.is_inherited:
            return
        with _opening:
            _open_files.get(self._foreign, weakref.WeakSet[LocalGntdev2007]()).discard(self)

    def _begin(self, mapped: _Mapped, call: str) -> list[Reference]:
        self._settle()
        references = self._slots.map(mapped.first, mapped.count, call)
        self._mapped.append(mapped)
        return references

    def _end(self, mapped: _Mapped) -> None:
        self._mapped.remove(mapped)
        self._slots.unmapped(mapped.first, mapped.count)

    def _settle(self) -> None:
        """Slots whose mapping is gone, by close() or by somebody else's munmap, wait to be mapped again."""
        for mapped in [each for each in self._mapped if each.is_gone]:
            self._end(mapped)

    def _map_grant_ref(self, argument: bytearray | memoryview) -> None:
        count, pointer, _ = abi.MAP_2007.unpack_from(argument)
        call = f"gntdev: MAP_GRANT_REF({count} references at {pointer:#x})"
        if not count:
            raise grant_refused(errno.EINVAL, f"{call}: pass 1 to {SLOTS_2007}")
        if count > SLOTS_2007:
            raise grant_refused(errno.ENOMEM, f"{call}: a file has {SLOTS_2007} slots")
        data = user_memory.read(pointer, count * abi.REFERENCE.size, call)
        references: list[tuple[int, int]] = list(abi.REFERENCE.iter_unpack(data))
        first = self._alone.run("MAP_GRANT_REF", lambda: self._slots.take(references, call))
        abi.MAP_2007.pack_into(argument, 0, count, pointer, first * PAGE_BYTES)

    def _unmap_grant_ref(self, argument: bytearray | memoryview) -> None:
        index, count = abi.UNMAP_2007.unpack_from(argument)
        call = f"gntdev: UNMAP_GRANT_REF(index {index:#x}, {count} slots)"
        if not count:
            return
        slot, rest = divmod(index, PAGE_BYTES)
        if rest:
            raise grant_refused(errno.EINVAL, f"{call}: the index is not a slot's: pass what MAP_GRANT_REF gave")
        self._alone.run("UNMAP_GRANT_REF", lambda: self._free(slot, count, call))

    def _free(self, slot: int, count: int, call: str) -> None:
        self._settle()
        self._slots.free(slot, count, call)

    def _get_offset_for_vaddr(self, argument: bytearray | memoryview) -> None:
        address, _, _ = abi.OFFSET_2007.unpack_from(argument)
        call = f"gntdev: GET_OFFSET_FOR_VADDR({address:#x})"
        found = self._alone.run("GET_OFFSET_FOR_VADDR", lambda: self._mapped_at(address))
        if found is not None:
            abi.OFFSET_2007.pack_into(argument, 0, address, found.first * PAGE_BYTES, found.count)
        elif _is_anything_at(address):
            raise grant_refused(errno.EINVAL, f"{call}: no mapping of this file starts there")
        else:
            raise grant_refused(errno.EFAULT, f"{call}: nothing is mapped there")

    def _mapped_at(self, address: int) -> _Mapped | None:
        self._settle()
        for mapped in self._mapped:
            memory = mapped.memory() if mapped.memory is not None else None
            if memory is not None and memory.is_mapped and memory.address == address:
                return mapped
        return None


def _refused(refusal: Refusal, first: int, call: str) -> DeviceError:
    """What the driver said of every grant that it could not map: ENOMEM. The class tells what it was."""
    text = f"{call}: slot {first + refusal.index}: {refusal.reason}"
    if refusal.errno == errno.EINVAL:
        return BadReferenceError(errno.ENOMEM, text)
    return grant_refused(errno.ENOMEM, text)


def _is_anything_at(address: int) -> bool:
    """mincore(2) says ENOMEM of addresses where nothing is mapped, whatever the protection of what is."""
    page = address // PAGE_BYTES * PAGE_BYTES
    found = ctypes.c_ubyte()
    return not _libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(PAGE_BYTES), ctypes.byref(found))
