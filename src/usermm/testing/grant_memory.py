"""`UserMemory`: the memory of one domain's only process, with content, so that devices can follow its pointers."""

from __future__ import annotations

import errno
from collections.abc import Callable

from usermm.errors import DeviceError, from_errno
from usermm.uapi.xen_gntdev import PAGE_BYTES

_FIRST_ADDRESS = 0x7F00_0000_0000

Page = bytearray
"""PAGE_BYTES of content. Whoever shares a page shares the object."""


class ModelMapping:
    """Whole pages at one address."""

    def __init__(self, address: int, pages: list[Page], *, writable: bool, inherit: bool) -> None:
        self.address = address
        self.pages = pages
        self.writable = writable
        self.inherit = inherit
        self.closed = False
        self.on_unmap: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.pages) * PAGE_BYTES

    @property
    def end(self) -> int:
        return self.address + len(self)


class UserMemory:
    """Addresses only go up and a hole follows each mapping: an address that was unmapped stays unmapped."""

    def __init__(self) -> None:
        self._mappings: list[ModelMapping] = []
        self._next = _FIRST_ADDRESS

    def map(self, pages: list[Page], *, writable: bool, inherit: bool = True) -> ModelMapping:
        """Maps `pages` side by side."""
        mapping = ModelMapping(self._next, pages, writable=writable, inherit=inherit)
        self._mappings.append(mapping)
        self._next = mapping.end + PAGE_BYTES
        return mapping

    def unmap(self, mapping: ModelMapping) -> None:
        """Unmaps it whole and tells its device. DeviceError EINVAL: it is not mapped here."""
        if mapping not in self._mappings:
            raise from_errno(errno.EINVAL, f"munmap({mapping.address:#x}): no mapping of this process begins there")
        self._mappings.remove(mapping)
        mapping.closed = True
        mapping.on_unmap()

    def unmap_all(self) -> None:
        """What the end of the process does."""
        for mapping in tuple(self._mappings):
            self.unmap(mapping)

    def place(self, data: bytes, *, at_end: bool = False) -> int:
        """Puts `data` into fresh pages and returns its address; `at_end`: its last byte is the last before the hole."""
        count = max(1, -(-len(data) // PAGE_BYTES))
        mapping = self.map([Page(PAGE_BYTES) for _ in range(count)], writable=True)
        address = mapping.end - len(data) if at_end else mapping.address
        self.write(address, data)
        return address

    def at(self, address: int) -> ModelMapping | None:
        """The mapping that has `address`."""
        return next((each for each in self._mappings if each.address <= address < each.end), None)

    def read(self, address: int, length: int) -> bytes:
        """DeviceError EFAULT: a byte of it is not mapped."""
        return b"".join(bytes(page[start:end]) for page, start, end in self._parts(address, length, writing=False))

    def write(self, address: int, data: bytes) -> None:
        """DeviceError EFAULT: as for read, or the mapping is read-only; then nothing is written."""
        taken = 0
        for page, start, end in self._parts(address, len(data), writing=True):
            page[start:end] = data[taken : taken + end - start]
            taken += end - start

    def forked(self) -> UserMemory:
        """What a forked child has: everything that it inherits, shared as far as grants go."""
        child = UserMemory()
        child._mappings = [each for each in self._mappings if each.inherit]
        child._next = self._next
        return child

    def _parts(self, address: int, length: int, *, writing: bool) -> list[tuple[Page, int, int]]:
        parts: list[tuple[Page, int, int]] = []
        position, end = address, address + length
        while position < end:
            mapping = self.at(position)
            if mapping is None or (writing and not mapping.writable):
                raise _fault(position)
            index, start = divmod(position - mapping.address, PAGE_BYTES)
            stop = min(PAGE_BYTES, start + end - position)
            parts.append((mapping.pages[index], start, stop))
            position += stop - start
        return parts


def _fault(address: int) -> DeviceError:
    return from_errno(errno.EFAULT, f"memory: {address:#x} is not mapped, or not for this")
