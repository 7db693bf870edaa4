"""Random scripts for support/native/preload/player.c, and the model's word on what each step must give.

What a kernel may do one way or the other is left out as in side_by_side.py, for the same reasons.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import select
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from usermm.testing import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_BYTES,
    AddressSpace,
    ModelDevice,
)
from usermm.uapi import ummunot, ummunotify
from usermm.uapi._ioctl import ioctl_size

SLOTS = 4
PAGES = 12
COOKIES = 12
BASE = 0x0EAD_0000_0000  # far from where the kernel puts anything
STEP = struct.Struct("=II5Q")
OPEN, CLOSE, COPY, IOCTL, IOCTL_BAD, READ, READV, PREAD, READ_BAD, MMAP, MUNMAP, MADVISE, MPROTECT, MREMAP = range(14)

_NUMBER = struct.Struct("=q")
_STATE = struct.Struct("=QQ")
_COUNTS = (32, 64, 32, 96, 128, 4096, 31, 33, 0, 10000)
_ADVICES = (MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED, 3, 20)
_REQUESTS = (
    ummunotify.EXCHANGE_FEATURES,
    ummunotify.REGISTER_REGION,
    ummunotify.UNREGISTER_REGION,
    ummunot.REGISTER_REGION,
    ummunot.UNREGISTER_REGION,
)
_BAD_ADDRESSES = (0, 8, BASE - PAGE_BYTES, 0xFFFF_8000_0000_0000, (1 << 64) - PAGE_BYTES)
_U64 = (1 << 64) - 1


@dataclass
class Script:
    """`steps` for the player, and for each step the bytes that it must write."""

    seed: int
    steps: list[bytes] = field(default_factory=list)
    expected: list[bytes] = field(default_factory=list)

    def first_difference(self, results: bytes) -> str:
        """Empty when the results are what the model says."""
        offset = 0
        for index, (step, wanted) in enumerate(zip(self.steps, self.expected, strict=True)):
            if (got := results[offset : offset + len(wanted)]) != wanted:
                before = [STEP.unpack(each) for each in self.steps[max(0, index - 5) : index + 1]]
                return f"seed {self.seed}, step {index} {STEP.unpack(step)}:\n{got!r}, not\n{wanted!r}, after {before}"
            offset += len(wanted)
        return "" if offset == len(results) else f"seed {self.seed}: {len(results) - offset} bytes too many"


def make(seed: int, length: int) -> Script:
    """A script of about `length` steps."""
    return _Maker(seed).make(length)


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.script = Script(seed)
        self.space = AddressSpace()
        self.devices: list[ModelDevice | None] = [None] * SLOTS

    def make(self, length: int) -> Script:
        self.mmap_all()
        self.reopen()
        kinds: list[tuple[Callable[[], None], int]] = [
            (self.reopen, 2),
            (self.copy, 2),
            (self.register_pages, 20),
            (self.register_bytes, 10),
            (self.unregister, 10),
            (self.exchange, 2),
            (self.odd_ioctl, 5),
            (self.bad_ioctl, 5),
            (self.read, 25),
            (self.bad_read, 5),
            (self.mmap, 15),
            (self.munmap, 10),
            (self.madvise, 20),
            (self.mprotect, 5),
            (self.move, 10),
            (self.resize, 5),
        ]
        calls, weights = zip(*kinds, strict=True)
        while len(self.script.steps) < length:
            self.random.choices(calls, weights)[0]()
        return self.script

    # One step: to the model, and what the player must write

    def step(self, code: int, slot: int, *numbers: int, call: Callable[[], object], argument: bytes = b"") -> None:
        padded = [number & _U64 for number in numbers] + [0] * (5 - len(numbers))
        value, data = _outcome(call)
        if argument:  # of an ioctl, in the script after the request, and in the results as it was left
            padded[1:] = struct.unpack("=4Q", argument.ljust(32, b"\0"))
            data = (data or argument).ljust(32, b"\0")
        self.script.steps.append(STEP.pack(code, slot, *padded))
        self.script.expected.append(b"".join([_NUMBER.pack(value), data, *self.states()]))

    def states(self) -> Iterator[bytes]:
        for device in self.devices:
            if device is not None:
                yield _STATE.pack(device.generation, select.POLLIN if device.readable else 0)

    # Devices

    def reopen(self) -> None:
        slot = self.random.randrange(SLOTS)
        device = self.devices[slot]
        if device is not None:
            self.devices[slot] = None
            device.close()
            self.step(CLOSE, slot, call=lambda: 0)
        abi = self.random.choice([1, 2, 2])
        if self.random.random() < 0.1:
            writing = self.random.choice([os.O_RDWR, os.O_WRONLY])
            self.step(OPEN, slot, abi, writing, call=lambda: ModelDevice(self.space, abi, flags=writing))
        flags = os.O_RDONLY | os.O_NONBLOCK
        self.devices[slot] = ModelDevice(self.space, abi, flags=flags)
        self.step(OPEN, slot, abi, flags, call=lambda: 0)
        # Used once, before there is a copy that the library was not told of: by that one a read of nothing is the
        # pipe's own, and does not count as a use.
        self.random.choice([self.exchange, self.read])(slot)

    def copy(self) -> None:
        self.step(COPY, self.pick()[0], call=lambda: 0)

    def register_pages(self) -> None:
        page = self.random.randrange(PAGES)
        self._register(BASE + page * PAGE_BYTES, BASE + (page + self.random.randrange(1, 8)) * PAGE_BYTES)

    def register_bytes(self) -> None:
        """Unaligned, empty and reversed ranges too."""
        start = BASE + self.random.randrange(PAGES * PAGE_BYTES)
        self._register(start, start + self.random.choice([0, 1, self.random.randrange(-9000, 20000)]))

    def _register(self, start: int, end: int) -> None:
        slot, device = self.pick()
        cookie, garbage = self.random.randrange(COOKIES), self.random.getrandbits(32)
        if device.abi == 2:
            request, argument = (
                ummunotify.REGISTER_REGION,
                ummunotify.REGISTER.pack(start, end, cookie, garbage, garbage),
            )
        else:
            version = self.random.choice([1] * 9 + [0])
            request, argument = ummunot.REGISTER_REGION, ummunot.REGISTER.pack(version, garbage, start, end, cookie)
        self.ioctl(slot, device, request, argument)

    def unregister(self) -> None:
        slot, device = self.pick()
        request = (ummunotify if device.abi == 2 else ummunot).UNREGISTER_REGION
        self.ioctl(slot, device, request, ummunotify.COOKIE.pack(self.random.randrange(COOKIES)))

    def exchange(self, slot: int | None = None) -> None:
        slot, device = self.pick(slot)
        asked = ummunotify.FEATURES.pack(self.random.getrandbits(32))
        self.ioctl(slot, device, ummunotify.EXCHANGE_FEATURES, asked)

    def odd_ioctl(self) -> None:
        """A number that one version does not know, or neither."""
        slot, device = self.pick()
        known = [*_REQUESTS[:3]] if device.abi == 2 else [*_REQUESTS[3:]]
        random_one = self.random.getrandbits(2) << 30 | 32 << 16 | ord("U") << 8 | self.random.randrange(4, 256)
        request = self.random.choice([*(each for each in _REQUESTS if each not in known), random_one])
        self.ioctl(slot, device, request, self.random.randbytes(ioctl_size(request)))

    def ioctl(self, slot: int, device: ModelDevice, request: int, argument: bytes) -> None:
        left = bytearray(argument)
        self.step(IOCTL, slot, request, call=lambda: (device.ioctl(request, left), left)[0] or left, argument=argument)

    def bad_ioctl(self) -> None:
        slot, device = self.pick()
        request, address = self.random.choice(_REQUESTS), self.random.choice(_BAD_ADDRESSES)
        self.step(IOCTL_BAD, slot, request, address, call=lambda: device.ioctl(request, address))

    def read(self, slot: int | None = None) -> None:
        slot, device = self.pick(slot)
        count = self.random.choice(_COUNTS)
        code, offset = self.random.choice([READ, READ, READV, PREAD]), self.random.randrange(1 << 40)
        self.step(code, slot, count, offset, call=lambda: device.read_bytes(count))

    def bad_read(self) -> None:
        slot, device = self.pick()
        count, address = self.random.choice(_COUNTS), self.random.choice(_BAD_ADDRESSES)
        self.step(READ_BAD, slot, count, address, call=lambda: device.readinto(address, count))

    def pick(self, wanted: int | None = None) -> tuple[int, ModelDevice]:
        open_ones = [(slot, device) for slot, device in enumerate(self.devices) if device]
        return self.random.choice([each for each in open_ones if wanted in (None, each[0])])

    # Memory

    def mmap_all(self) -> None:
        bounds = sorted({0, PAGES, *self.random.sample(range(PAGES), 3)})
        for index, (page, next_page) in enumerate(itertools.pairwise(bounds)):
            self._mmap(page, next_page - page, index % 2 == 1)

    def mmap(self) -> None:
        self._mmap(self.random.randrange(PAGES), self.random.randrange(1, 8), self.random.random() < 0.5)

    def _mmap(self, page: int, pages: int, shared: bool) -> None:
        address, length = BASE + page * PAGE_BYTES, pages * PAGE_BYTES
        call = lambda: self.space.mmap(length, address=address, fixed=True, shared=shared)  # noqa: E731
        self.step(MMAP, 0, address, length, int(shared), call=call)

    def munmap(self) -> None:
        address = BASE + self.random.randrange(PAGES) * PAGE_BYTES + self.random.choice([0] * 9 + [8])
        length = self.random.randrange(8) * PAGE_BYTES
        self.step(MUNMAP, 0, address, length, call=lambda: self.space.munmap(address, length))

    def madvise(self) -> None:
        if part := self.part():
            (start, end), advice = part, self.random.choice(_ADVICES)
            self.step(
                MADVISE, 0, start, end - start, advice, call=lambda: self.space.madvise(start, end - start, advice)
            )

    def mprotect(self) -> None:
        if part := self.part():
            (start, end), prot = part, self.random.choice([mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE])
            self.step(MPROTECT, 0, start, end - start, prot, call=lambda: self.space.mprotect(start, end - start, prot))

    def move(self) -> None:
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | self.random.choice([0, MREMAP_DONTUNMAP])
        self._mremap(flags, BASE + self.random.randrange(PAGES) * PAGE_BYTES)

    def resize(self) -> None:
        self._mremap(0, 0)

    def _mremap(self, flags: int, new: int) -> None:
        if part := self.part():
            numbers = (part[0], part[1] - part[0], self.random.randrange(1, 8) * PAGE_BYTES, flags, new)
            self.step(MREMAP, 0, *numbers, call=lambda: self.space.mremap(*numbers))

    def part(self) -> tuple[int, int] | None:
        """Some pages inside one run that the model never cut."""
        if not (runs := self.space.mappings()):
            return None
        run = self.random.choice(runs)
        start = run.start + self.random.randrange((run.end - run.start) // PAGE_BYTES) * PAGE_BYTES
        return start, min(run.end, start + self.random.randrange(1, 8) * PAGE_BYTES)


def _outcome(call: Callable[[], object]) -> tuple[int, bytes]:
    """The player's result, and the bytes that came with it."""
    try:
        result = call()
    except OSError as error:
        return -(error.errno or 0), b""
    if isinstance(result, bytes):
        return len(result), result
    if isinstance(result, bytearray):  # an ioctl's argument
        return 0, bytes(result)
    return int(result or 0) if isinstance(result, int | None) else 0, b""
