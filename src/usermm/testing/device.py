"""`ModelDevice`: the device on a model address space, with the methods of `usermm.Ummunotify`."""

from __future__ import annotations

import errno
import mmap as _mmap
import os
import select
import threading
from typing import Self

from usermm.errors import ArgumentError, ArgumentTypeError, from_errno
from usermm.testing.address_space import AddressSpace
from usermm.testing.layouts import BytesLike, check_size, copy_in, copy_out, pack
from usermm.testing.notifications import Notification
from usermm.testing.regions import Regions
from usermm.uapi import ummunot, ummunotify
from usermm.ummunotify.events import Event

_COOKIE_LIMIT = 1 << 64
_ADDRESS_LIMIT = 1 << 63


class ModelDevice:
    """One open of /dev/ummunotify (`abi` 2) or /dev/ummunot (`abi` 1) by the process that owns `space`.

    `flags` as for open(2): O_RDONLY, optionally O_NONBLOCK and O_CLOEXEC; DeviceError EINVAL for any writing mode.
    Errors are those of `usermm.Ummunotify`. A model address holds no bytes, so an integer where a device wants an
    address of memory is a bad address: EFAULT, after everything that the real device does before it touches it.
    Threads may share a device: a blocking read waits for another thread's operation on the space.
    """

    def __init__(self, space: AddressSpace, abi: int = 2, *, flags: int = os.O_RDONLY) -> None:
        if abi not in (1, 2):
            raise ArgumentError(f"abi {abi!r}: the device has versions 1 and 2")
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise from_errno(errno.EINVAL, "open: the device opens read-only, use O_RDONLY")
        self.abi = abi
        self.flags = flags
        self.sigio_count = 0
        """Notifications that hit: as many signals a process that asked for them by F_SETOWN and O_ASYNC is sent."""
        self._space = space
        self._regions = Regions(abi)
        self._page = bytearray(ummunotify.MMAP_LIMIT_BYTES)
        self._used = False
        self._closed = False
        self._changed = threading.Condition()
        space.subscribe(self._notify)

    # Regions

    def register_range(
        self, start: int, end: int, cookie: int | None = None, *, accept_file_memory: bool = False  # noqa: ARG002
    ) -> int:
        """Watches [start, end) and returns its cookie, chosen if None. ArgumentError: empty, reversed, beyond 2**63.

        DeviceError: EFAULT for a hole (the ioctl accepts it). CookieError: registered already. No file memory here.
        """
        if not 0 <= start < end <= _ADDRESS_LIMIT:
            raise ArgumentError(f"register_range: [{start:#x}, {end:#x}) is not a range of addresses")
        if cookie is None:
            cookie = next(free for free in range(1, _COOKIE_LIMIT) if not self._regions.has(free))
        _check_cookie(cookie)
        with self._open_device("register_range"):
            self._used = True
            if not self._regions.has(cookie) and not self._space.is_mapped(start, end):
                raise from_errno(errno.EFAULT, f"register_range: [{start:#x}, {end:#x}) has a hole: map it first")
            self._register(start, end, cookie)
        return cookie

    def unregister(self, cookie: int) -> None:
        """Forgets the region, with its event if one is queued. CookieError: not registered."""
        _check_cookie(cookie)
        with self._open_device("unregister"):
            self._regions.unregister(cookie)

    @property
    def generation(self) -> int:
        """The number of notifications that hit a region so far."""
        with self._open_device("generation"):
            return self._regions.generation

    def check(self, seen: int, probe: bool = True) -> bool:  # noqa: ARG002
        """True: nothing changed since the generation was `seen`. In a model nothing is ever under way: no probe."""
        return self.generation == seen

    # Reading

    @property
    def readable(self) -> bool:
        """What poll(2) answers: an event is queued, or (version 2) a LAST is owed."""
        return bool(self.poll() & select.POLLIN)

    def poll(self) -> int:
        """The poll(2) mask: POLLIN | POLLRDNORM or nothing. Never writable, in error or hung up."""
        with self._open_device("poll"):
            return select.POLLIN | select.POLLRDNORM if self._regions.readable else 0

    def read(self, timeout: float | None = None) -> list[Event]:
        """Up to 128 events; waits for the first one, at most `timeout` seconds (then []), for ever if None."""
        with self._open_device("read"):
            self._used = True
            if not self._wait(timeout):
                return []
            return self._regions.take(ummunotify.EVENTS_PER_READ)

    def read_bytes(self, count: int = ummunotify.READ_LIMIT_BYTES) -> bytes:
        """read(2): b"" when something is there and `count` holds no event. WouldBlockError: nothing, O_NONBLOCK."""
        return b"".join(pack(event) for event in self._read(count))

    def readinto(self, address: int, count: int) -> int:
        """read(2) to a bad address: EFAULT, and the events are lost."""
        if self._read(count):
            raise from_errno(errno.EFAULT, f"readinto: nothing is mapped at {address:#x}; the events are lost")
        return 0

    def write(self, data: BytesLike) -> int:  # noqa: ARG002
        """write(2) on a descriptor that was opened read-only: ClosedError (EBADF), always."""
        raise from_errno(errno.EBADF, "write: the device is open for reading only")

    # The rest of the ABI

    def ioctl(self, request: int, argument: int | BytesLike) -> int:
        """ioctl(2): `argument` is bytes, as many as the request's number says (writable for results), or a bad address.

        DeviceError: ENOTTY for a request that this version does not know, EFAULT, EINVAL (a known or unknown cookie,
        another interface version, EXCHANGE_FEATURES too late). ArgumentError: another number of bytes.
        """
        check_size(argument, request)
        with self._open_device("ioctl"):
            if self.abi == 2 and request == ummunotify.EXCHANGE_FEATURES:
                self._exchange_features(argument)
            elif self.abi == 2 and request == ummunotify.REGISTER_REGION:
                start, end, cookie, _flags, _reserved = ummunotify.REGISTER.unpack(copy_in(argument))
                self._used = True
                self._register(start, end, cookie)
            elif self.abi == 1 and request == ummunot.REGISTER_REGION:
                version, _reserved, start, end, cookie = ummunot.REGISTER.unpack(copy_in(argument))
                if version != ummunot.INTERFACE_VERSION:
                    raise from_errno(errno.EINVAL, f"ioctl: interface version {version}, this device has 1")
                self._register(start, end, cookie)
            elif request == (ummunotify if self.abi == 2 else ummunot).UNREGISTER_REGION:
                self._regions.unregister(ummunotify.COOKIE.unpack(copy_in(argument))[0])
            else:
                raise from_errno(errno.ENOTTY, f"ioctl: version {self.abi} has no request {request:#x}")
        return 0

    def mmap(
        self,
        length: int = ummunotify.MMAP_LIMIT_BYTES,
        prot: int = _mmap.PROT_READ,
        flags: int = _mmap.MAP_SHARED,
        offset: int = 0,
    ) -> memoryview:
        """The page with the generation, a u64 at 0; a child of fork has the same page, and it outlives close.

        DeviceError: EINVAL for an offset or a length outside 1..4096, EACCES for a writable shared mapping.
        """
        with self._open_device("mmap"):
            if flags & _mmap.MAP_SHARED and prot & _mmap.PROT_WRITE:
                raise from_errno(errno.EACCES, "mmap: the device is read-only, so is a shared mapping of it")
            if offset != 0 or not 1 <= length <= ummunotify.MMAP_LIMIT_BYTES:
                raise from_errno(errno.EINVAL, f"mmap: offset {offset}, length {length}: the device has one page")
            return memoryview(self._page).toreadonly()[:length]

    def close(self) -> None:
        """Ends the device; a thread that waits in read gets ClosedError. A second close does nothing."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._space.unsubscribe(self._notify)
                self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # How it does it

    def _notify(self, notification: Notification) -> None:
        with self._changed:
            if self._regions.notify(notification.start, notification.end):
                ummunotify.GENERATION.pack_into(self._page, 0, self._regions.generation)
                self.sigio_count += 1
                self._changed.notify_all()

    def _register(self, start: int, end: int, cookie: int) -> None:
        self._regions.register(cookie, start, end)
        if start < end:
            self._space.watch(start, end)
        else:  # What hits an empty or reversed region covers its byte `start` and the byte before its `end`.
            self._space.watch(end - 1, end)
            self._space.watch(start, start + 1)

    def _exchange_features(self, argument: int | BytesLike) -> None:
        if self._used:
            raise from_errno(errno.EINVAL, "ioctl: EXCHANGE_FEATURES once, before any other use of the device")
        self._used = True
        wanted = ummunotify.FEATURES.unpack(copy_in(argument))[0]
        copy_out(argument, ummunotify.FEATURES.pack(wanted & ummunotify.SUPPORTED_FEATURES))

    def _read(self, count: int) -> list[Event]:
        with self._open_device("read"):
            self._used = True
            if not self._wait(0 if self.flags & os.O_NONBLOCK else None):
                raise from_errno(errno.EAGAIN, "read: no event is queued and the device is non-blocking")
            return self._regions.take(min(count, ummunotify.READ_LIMIT_BYTES) // ummunotify.EVENT.size)

    def _wait(self, timeout: float | None) -> bool:
        self._changed.wait_for(lambda: self._closed or self._regions.readable, timeout)
        self._check_open("read")
        return self._regions.readable

    def _open_device(self, call: str) -> threading.Condition:
        self._check_open(call)
        return self._changed

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise from_errno(errno.EBADF, f"{call}: the device is closed")


def _check_cookie(cookie: int) -> None:
    if not isinstance(cookie, int):
        raise ArgumentTypeError(f"cookie {cookie!r} is not an integer")
    if not 0 <= cookie < _COOKIE_LIMIT:
        raise ArgumentError(f"cookie {cookie} does not fit into 64 bits")
