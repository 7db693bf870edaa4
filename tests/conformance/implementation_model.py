"""The reference model, over both sources of notifications."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar

from conformance.implementations import PAGE, Child, Implementation, listed

from usermm.testing import AddressSpace, Flavour, ModelDevice
from usermm.uapi import ummunotify


class _Model(Implementation):
    flavour: Flavour

    def __init__(self, space: AddressSpace | None = None) -> None:
        self.space = space or AddressSpace(self.flavour)
        self._next = 0x1000_0000

    def open(self, abi: int, flags: int) -> ModelDevice:
        return ModelDevice(self.space, abi, flags=flags)

    def generation(self, device: ModelDevice) -> int:
        return int(ummunotify.GENERATION.unpack_from(device.mmap())[0])

    def poll(self, device: ModelDevice, how: str) -> set[str]:  # noqa: ARG002
        return {"readable"} if device.poll() else set()

    def write(self, device: ModelDevice) -> int:
        return device.write(b"x")

    @contextlib.contextmanager
    def signals(self, device: ModelDevice, number: int) -> Iterator[Callable[[int], int]]:  # noqa: ARG002
        before = device.sigio_count
        yield lambda _expected: device.sigio_count - before

    def reserve(self, pages: int) -> int:
        address = self._next
        self._next += (pages + 1) * PAGE
        return address

    def map_at(self, address: int, pages: int, *, shared: bool = False) -> None:
        self.space.mmap(pages * PAGE, address=address, fixed=True, shared=shared)

    def unmap(self, address: int, pages: int) -> None:
        self.space.munmap(address, pages * PAGE)

    def remap(self, address: int, pages: int, new_pages: int, flags: int = 0, new_address: int = 0) -> int:
        return self.space.mremap(address, pages * PAGE, new_pages * PAGE, flags, new_address)

    def advise(self, address: int, pages: int, advice: int) -> None:
        self.space.madvise(address, pages * PAGE, advice)

    def protect(self, address: int, pages: int, prot: int) -> None:
        self.space.mprotect(address, pages * PAGE, prot)

    def grow_heap(self, pages: int) -> int:
        before = self.space.brk()
        assert self.space.brk(before + pages * PAGE) == before + pages * PAGE
        return before

    def shrink_heap(self, pages: int) -> None:
        self.space.brk(self.space.brk() - pages * PAGE)

    @property
    def bad_address(self) -> int:
        return PAGE

    def in_child(self, action: Child) -> int:
        return action(type(self)(self.space.fork()))

    def close(self) -> None:
        for mapping in self.space.mappings():
            self.space.munmap(mapping.start, mapping.end - mapping.start)


@listed
class ModelOverMmuNotifier(_Model):
    name = "model-mmu-notifier"
    flavour = Flavour.MMU_NOTIFIER


@listed
class ModelOverUserfaultfd(_Model):
    name = "model-userfaultfd"
    flavour = Flavour.USERFAULTFD
    cannot: ClassVar = {
        "mprotect and fork are reported": "userfaultfd reports neither, and neither invalidates a registration",
    }
