"""`Ummunotify`: the device in Python, a pleasant API over the exact ABI, whichever monitor is behind it."""

from __future__ import annotations

import errno
import functools
import mmap as _mmap
import operator
import os
import struct
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Literal, Self

from usermm import _core
from usermm.errors import ArgumentError, ArgumentTypeError, ClosedError, DeviceError, refused
from usermm.uapi import ummunot, ummunotify
from usermm.ummunotify import memory
from usermm.ummunotify.events import Event, Invalidation, Last
from usermm.ummunotify.own_calls import MonitorName, OwnCalls
from usermm.ummunotify.readiness import readable

_EVENT = struct.Struct("=IIQQQ")  # struct ummunotify_event: type, flags, hint_start, hint_end, user_cookie_counter
_MOST_BYTES = 4096
_LAST = 1
_FLAG_HINT = 1
_ADDRESS_LIMIT = 1 << 63  # the upper half belongs to the kernel on every architecture
_NO_DRIVER = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM)  # a node that is of no use here


class Ummunotify(OwnCalls):
    """Learns when memory of this process is unmapped, moved or discarded.

    Regions are named by a cookie. `generation` counts the notifications that hit one of them; `check` answers "nothing
    changed" without reading; `read` says what did. A region watches the memory that is mapped when it is registered:
    memory mapped later at the same address is watched once it is registered again.

    Any thread may call anything. A forked child of the opener gets ForkedError (ECHILD) from every method but close();
    only where a kernel driver made the device a child may read it, and speak the ABI to it, as its parent does.
    """

    __slots__ = ()

    def __new__(
        cls, abi: int = 2, *, flags: int = 0, monitor: Literal["auto", "userfaultfd", "kernel"] = "auto"
    ) -> Self:
        """Opens a device: abi 2 (/dev/ummunotify) or 1 (/dev/ummunot); `flags` as of open(2), never for writing.

        `monitor`: "kernel" opens the node, "userfaultfd" makes the device inside this process, "auto" takes the node
        where there is one that can be opened. What the device is then, is an instance of a subclass.

        Raises UnavailableError (EPERM, ENOSYS) without userfaultfd, LimitError, DeviceError (EINVAL) for bad arguments,
        (ENOENT and others) for a node that cannot be opened.
        """
        if monitor == "auto":
            if os.access(ummunotify.DEVICE_PATH if abi == 2 else ummunot.DEVICE_PATH, os.F_OK):
                device: Self = _open_preferring_the_node(cls, abi, flags)
                return device
            monitor = "userfaultfd"
        if monitor not in ("userfaultfd", "kernel"):
            raise ArgumentError(f"open: monitor must be 'auto', 'userfaultfd' or 'kernel', not {monitor!r}")
        over: type[Self] = _class_over(cls, monitor)  # type: ignore[arg-type] # a class is hashable
        return over._open(abi, flags)

    def register(self, buffer: object, cookie: int | None = None, *, accept_file_memory: bool = False) -> int:
        """Watches the memory of `buffer` and returns its cookie (0..2**64-1; one of the device's own when left out).

        `buffer` has the buffer protocol (contiguous), or data_ptr() and nbytes, or address and size. It is not kept
        alive: that it goes away is what the device is there to notice. Otherwise like register_range.
        """
        address, length = _core.buffer_range(buffer)
        return self.register_range(address, address + length, cookie, accept_file_memory=accept_file_memory)

    def register_range(
        self, start: int, end: int, cookie: int | None = None, *, accept_file_memory: bool = False
    ) -> int:
        """Watches the addresses from `start` up to, not including, `end` (bytes; not empty, all of it mapped).

        `accept_file_memory=True` accepts file mappings although truncating the file, or punching a hole in it, takes
        memory away without a notification (userfaultfd reports what a process does to its mappings, not to files).

        Raises UnwatchableError (EOPNOTSUPP) for memory that can change unseen, with the mapping and the way out;
        DeviceError (EFAULT) for addresses where nothing is mapped; CookieError (EINVAL) for a cookie in use;
        WatchedElsewhereError (EBUSY); LimitError (ENOMEM).
        """
        try:
            start, end = operator.index(start), operator.index(end)
        except TypeError as error:
            raise ArgumentTypeError(f"register_range: start and end must be int addresses: {error}") from None
        if not 0 <= start < end <= _ADDRESS_LIMIT:
            raise ArgumentError(f"register_range: {_hex(start)}-{_hex(end)} is no range of addresses: pass start < end")
        flags = _core.REFUSE_HOLES | (0 if accept_file_memory else _core.REFUSE_FILES)
        try:
            return self.watch(start, end, cookie, flags)
        except DeviceError as error:
            return self._register_slowly(start, end, cookie, flags, error)

    def _register_slowly(self, start: int, end: int, cookie: int | None, flags: int, error: DeviceError) -> int:
        """The memory was refused: sealed files after all, everything else with the mapping's name and the way out."""
        if error.errno not in (errno.EOPNOTSUPP, errno.EFAULT):
            raise error
        strict = bool(flags & _core.REFUSE_FILES)
        refusal = memory.refusal(f"register({start:#x}-{end:#x})", error.errno, start, end, strict=strict)
        if refusal is None:
            return self.watch(start, end, cookie, flags & ~_core.REFUSE_FILES)
        try:
            raise refusal from None
        finally:
            del refusal  # with its traceback it would be a cycle that keeps the caller's buffer alive

    def read(self, timeout: float | None = None) -> list[Event]:
        """The next events, at most 128: Invalidation for each region hit, then Last once the queue is drained.

        Waits until there is one, `timeout` seconds at most ([] then), for 0 not at all. Signal handlers run while it
        waits; close() from another thread ends it with ClosedError.
        """
        return [_decode(*fields) for fields in _EVENT.iter_unpack(self.read_within(timeout, _MOST_BYTES))]

    def mmap(
        self,
        length: int = 4096,
        prot: int = _mmap.PROT_READ,
        flags: int = _mmap.MAP_SHARED,
        offset: int = 0,
    ) -> memoryview:
        """Maps the page whose first eight bytes are the generation, read-only; the view outlives the device.

        A load shows every change whose call has returned: it waits while one is being counted. A system call that reads
        the page in that moment answers EFAULT. EINVAL: offset not 0, length outside 1..4096, or other flags; EACCES: a
        writable shared mapping.
        """
        if flags not in (_mmap.MAP_SHARED, _mmap.MAP_PRIVATE):
            raise refused(errno.EINVAL, "mmap", f"flags must be MAP_SHARED or MAP_PRIVATE, not {flags!r}")
        return self.map_page(length, prot, flags, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, under asyncio; ends when the device is closed. For trio and others poll fileno()."""
        descriptors: tuple[int, ...] = ()
        try:
            descriptors = self._readiness()
            while True:
                await readable(descriptors[0])
                # One by one: what is not taken stays in the queue when the iteration ends.
                for fields in _EVENT.iter_unpack(self.read_within(0, _EVENT.size)):
                    yield _decode(*fields)
        except ClosedError:
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _open_preferring_the_node(cls: Any, abi: int, flags: int) -> Any:
    try:
        return _class_over(cls, "kernel")._open(abi, flags)
    except DeviceError as error:
        if error.errno not in _NO_DRIVER:
            raise
    return _class_over(cls, "userfaultfd")._open(abi, flags)


@functools.cache
def _class_over(cls: Any, monitor: MonitorName) -> Any:
    """`cls` over this monitor: the monitor's own class, or one made from that and a user's subclass of Ummunotify."""
    over = _userfaultfd() if monitor == "userfaultfd" else _kernel()
    if issubclass(over, cls):
        return over
    if issubclass(cls, over):
        return cls
    return type(cls.__name__, (cls, over), {"__slots__": (), "__module__": cls.__module__, "__doc__": cls.__doc__})


def _userfaultfd() -> type[Ummunotify]:
    from usermm.ummunotify.userfaultfd_device import UserfaultfdDevice

    return UserfaultfdDevice


def _kernel() -> type[Ummunotify]:
    from usermm.ummunotify.kernel_device import KernelDevice  # here: nearly nobody needs it, and ctypes takes its time

    return KernelDevice


def _hex(address: int) -> str:
    return f"{address:#x}" if abs(address) < 1 << 64 else "(beyond 64 bits)"


def _decode(kind: int, flags: int, start: int, end: int, cookie_or_counter: int) -> Event:
    if kind == _LAST:
        return Last(cookie_or_counter)
    return Invalidation(cookie_or_counter, start, end, bool(flags & _FLAG_HINT))
