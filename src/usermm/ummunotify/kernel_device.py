"""The device that a driver makes: a thin skin over an opened /dev/ummunotify or /dev/ummunot.

The same code speaks to the kernel's driver and to libusermm-preload.so, which stands in for it. Behind the latter is a
userfaultfd: only there memory is looked at before it is taken for watched.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from usermm import _core
from usermm.errors import ArgumentError, CookieError, DeviceError, refused
from usermm.uapi import ummunot, ummunotify
from usermm.ummunotify import arguments, memory, node
from usermm.ummunotify.arguments import u64
from usermm.ummunotify.device import Ummunotify

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIRST_OWN_COOKIE: Final = 1 << 63  # far from the numbers and pointers that people choose
_LONGEST_WAIT_S: Final = 1000.0

Answer = TypeVar("Answer")


class KernelDevice(Ummunotify):
    """`Ummunotify` over a node.

    A child may read, and speak the ABI, where the driver lets it (the kernel's does). What would be said about the
    parent's memory as if it were the child's (generation, check, register, unregister) is refused here.
    """

    __slots__ = ("__weakref__", "_abi", "_flags", "_next_cookie", "_node", "_page")

    monitor: Final = "kernel"

    _abi: int
    _flags: int
    _next_cookie: int
    _node: node.Node
    _page: memoryview

    @classmethod
    def _open(cls, abi: Any, flags: Any) -> Self:
        opening = arguments.opening(abi, flags)
        if opening is None:
            raise refused(errno.EINVAL, "open", "abi must be 1 or 2, and flags must not ask for writing")
        device = object.__new__(cls)
        device._abi, device._flags = opening
        device._next_cookie = _FIRST_OWN_COOKIE
        path = ummunotify.DEVICE_PATH if device._abi == 2 else ummunot.DEVICE_PATH
        device._node = node.Node(path)
        try:
            device._greet(path)
            device._page = device.map_page(ummunotify.GENERATION.size, mmap.PROT_READ, mmap.MAP_SHARED, 0).cast("Q")
        except BaseException:
            device.close()
            raise
        return device

    def _greet(self, path: str) -> None:
        """Something else at this path does not know the request; for the device it is no use (rule 4 of its ABI)."""
        try:
            self._unregister("open", _FIRST_OWN_COOKIE)
        except DeviceError as error:
            if error.errno == errno.EINVAL:  # no region has this cookie
                return
            if error.errno != errno.ENOTTY:
                raise
        reason = f"{path} is another device or file: remove it, or open with monitor='userfaultfd'"
        raise refused(errno.ENODEV, "open", reason)

    def __del__(self) -> None:
        if hasattr(self, "_node"):
            self.close()

    def __reduce__(self) -> str:
        raise TypeError(f"cannot pickle or copy {type(self).__name__}: it is a device of this process")

    # Answered without a call to the node

    @property
    def generation(self) -> int:
        self._refuse_if_closed_or_forked("generation")
        return int(self._page[0])

    def check(self, seen: int, /, probe: bool = True) -> bool:
        """As every monitor's. `probe` makes no difference: a driver counts a change before the memory is given back."""
        self._refuse_if_closed_or_forked("check")
        bool(probe)
        return int(self._page[0]) == u64(seen, "seen")

    @property
    def closed(self) -> bool:
        return self._node.closed

    @property
    def flags(self) -> int:
        return self._flags

    def fileno(self) -> int:
        return self._node.number("fileno")

    def _readiness(self) -> tuple[int, ...]:
        self._refuse_if_closed_or_forked("iteration")
        return self._call("iteration", self._node.readiness)

    def close(self) -> None:
        self._node.close()

    def _refuse_if_closed_or_forked(self, call: str) -> None:
        if self._node.closed:
            raise refused(errno.EBADF, call)
        if os.getpid() != self._node.opener:
            raise refused(errno.ECHILD, call)

    # Regions

    def watch(self, start: int, end: int, cookie: int | None, flags: int, /) -> int:
        start, end, flags = u64(start, "start"), u64(end, "end"), u64(flags, "flags")
        wanted = None if cookie is None else u64(cookie, "cookie")
        self._refuse_if_closed_or_forked("register")
        used = self._register(start, end, wanted)
        if self._node.emulated and flags:
            holes, files = bool(flags & _core.REFUSE_HOLES), bool(flags & _core.REFUSE_FILES)
            number = memory.unwatchable(start, end, refuse_holes=holes, refuse_files=files)
            if number:
                self._unregister("unregister", used)
                raise refused(number, _registering(start, end, used))
        return used

    def _register(self, start: int, end: int, wanted: int | None) -> int:
        request = ummunotify.REGISTER_REGION if self._abi == 2 else ummunot.REGISTER_REGION
        while True:
            cookie = self._next_cookie if wanted is None else wanted
            self._next_cookie += wanted is None
            argument = self._register_argument(start, end, cookie)
            try:
                self._call(_registering(start, end, cookie), node.ioctl_buffer, request, argument)
            except DeviceError as error:
                if error.errno != errno.EINVAL:
                    raise
                if wanted is not None:
                    reason = "the cookie is in use: unregister it first, or pass another one"
                    raise CookieError(errno.EINVAL, f"{_registering(start, end, cookie)}: {reason}") from None
            else:
                return cookie

    def _register_argument(self, start: int, end: int, cookie: int) -> bytearray:
        if self._abi == 2:
            return bytearray(ummunotify.REGISTER.pack(start, end, cookie, 0, 0))
        return bytearray(ummunot.REGISTER.pack(ummunot.INTERFACE_VERSION, 0, start, end, cookie))

    def retire(self, cookie: int, /) -> None:
        self.unregister(cookie)  # the kernel's notifier waits for nobody

    def unregister(self, cookie: int, /) -> None:
        number = u64(cookie, "cookie")
        self._refuse_if_closed_or_forked("unregister")
        call = f"unregister({number})"
        try:
            self._unregister(call, number)
        except DeviceError as error:
            if error.errno != errno.EINVAL:
                raise
            reason = "no region has this cookie: pass one that register returned, once"
            raise CookieError(errno.EINVAL, f"{call}: {reason}") from None

    def _unregister(self, call: str, cookie: int) -> None:
        request = ummunotify.UNREGISTER_REGION if self._abi == 2 else ummunot.UNREGISTER_REGION
        self._call(call, node.ioctl_buffer, request, bytearray(ummunotify.COOKIE.pack(cookie)))

    # The ABI

    def ioctl(self, request: int, argument: int | Buffer, /) -> int:
        request = u64(request, "request")
        call = f"ioctl({request:#x})"
        if request >> 32:  # ioctl(2) would drop these bits, and maybe find a request that was not meant
            raise refused(errno.ENOTTY, call)
        if isinstance(argument, int):
            self._call(call, node.ioctl, request, u64(argument, "argument"))
        else:
            with arguments.ioctl_buffer(request, argument) as room:
                self._call(call, node.ioctl_buffer, request, room)
        return 0

    def read_within(self, timeout: float | None, count: int, /) -> bytes:
        deadline_s = arguments.deadline_s(timeout)
        try:
            return self._read("read", deadline_s, node.read, _capacity(count))
        except BlockingIOError:
            return b""

    def read_bytes(self, count: int = 4096, /) -> bytes:
        return self._read("read_bytes", self._abi_deadline_s, node.read, _capacity(count))

    def readinto(self, address: int, count: int, /) -> int:
        where, size = u64(address, "address"), u64(count, "count")
        try:
            return self._read("readinto", self._abi_deadline_s, node.read_to, where, size)
        except DeviceError as error:
            if error.errno != errno.EFAULT:
                raise
            raise refused(errno.EFAULT, "readinto", "the address is not writable; the events are lost") from None

    @property
    def _abi_deadline_s(self) -> float:
        return 0 if self._flags & os.O_NONBLOCK else math.inf

    def _read(self, call: str, deadline_s: float, read: Callable[..., Answer], *rest: int) -> Answer:
        """`read` as soon as there is something. Raises WouldBlockError at `deadline_s`, a time.monotonic()."""
        while True:
            try:
                return self._call(call, read, *rest)
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise
            self._call(call, self._wait, min(left_s, _LONGEST_WAIT_S))

    def _wait(self, fd: int, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._node.ended, select.POLLIN)
        poll.poll(math.ceil(timeout_s * 1000))

    def map_page(self, length: int, prot: int, flags: int, offset: int, /) -> memoryview:
        numbers = u64(length, "length"), u64(prot, "prot"), u64(flags, "flags"), u64(offset, "offset")
        if not prot & mmap.PROT_READ:
            raise ArgumentError("mmap: prot must include PROT_READ, or the view could not be read")
        fits = prot < 1 << 31 and flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE) and offset < 1 << 63
        if not fits or not 0 < length <= ummunotify.MMAP_LIMIT_BYTES:
            raise refused(errno.EINVAL, "mmap")
        return self._call("mmap", node.map_page, *numbers)

    def _call(self, call: str, function: Callable[..., Answer], *rest: Any) -> Answer:
        """function(descriptor, *rest); its OSError becomes one of ours. Nobody closes the descriptor meanwhile."""
        fd = self._node.enter(call)
        try:
            return function(fd, *rest)
        except OSError as error:
            raise refused(error.errno or errno.EIO, call) from None
        finally:
            self._node.leave()


def _capacity(count: int) -> int:
    return min(u64(count, "count"), ummunotify.READ_LIMIT_BYTES)


def _registering(start: int, end: int, cookie: int) -> str:
    return f"register({start:#x}-{end:#x}, cookie={cookie})"
