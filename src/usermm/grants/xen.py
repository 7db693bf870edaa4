"""The devices of a real Xen, as Linux has them in /dev/xen: the same calls, made to the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap as _mmap
import os
import threading

from usermm._core import process
from usermm.errors import ForkedError, UnavailableError, grant_refused
from usermm.grants.files import PAGE_BYTES, UNCLEARABLE
from usermm.grants.packed import PackedGntalloc, PackedGntdev
from usermm.grants.watched_memory import WatchedMemory, file_of
from usermm.uapi import xen_gntalloc, xen_gntdev

_SIZE_SHIFT, _SIZE_MASK = 16, 0x3FFF  # of the argument, in a request's number (asm-generic/ioctl.h)
_MODULES = {"gntdev": "xen-gntdev", "gntalloc": "xen-gntalloc", "evtchn": "xen-evtchn"}


def is_usable() -> bool:
    """Whether this machine has them, and this process may open them."""
    return os.access("/dev/xen/gntdev", os.R_OK | os.W_OK)


def require() -> None:
    """Raises UnavailableError where this process may open none of them."""
    if not any(os.access(f"/dev/xen/{name}", os.R_OK | os.W_OK) for name in _MODULES):
        XenFile("gntdev").close()  # says why


class XenFile:
    """An open /dev/xen/NAME. Raises UnavailableError (ENOENT, EACCES and others) with what is missing.

    A forked child gets ForkedError (ECHILD): the ports and pages behind its copy of the descriptor are the parent's.
    """

    _descriptor = -1

    def __init__(self, name: str) -> None:
        self._name = name
        self._owner = process()
        path = f"/dev/xen/{name}"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(error.errno or errno.EIO, f"open({path}): {_cure(error, name)}") from None

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """ioctl(2). GrantError (EFAULT): the driver would read or write beyond the end of `argument`."""
        needed = self._needed(request, argument)
        if len(argument) < needed:
            text = f"{self._name}: ioctl({request:#x}): it takes {needed} bytes, and {len(argument)} came"
            raise grant_refused(errno.EFAULT, text)
        descriptor = self._usable("ioctl")
        try:
            return int(fcntl.ioctl(descriptor, request, argument, True))
        except OSError as error:
            raise self._refused(error, f"ioctl({request:#x})") from None

    def read(self, size: int) -> bytes:
        """read(2), for evtchn."""
        descriptor = self._usable("read")
        try:
            return os.read(descriptor, size)
        except OSError as error:
            raise self._refused(error, f"read({size})") from None

    def write(self, data: bytes) -> int:
        """write(2), for evtchn."""
        descriptor = self._usable("write")
        try:
            return os.write(descriptor, data)
        except OSError as error:
            raise self._refused(error, f"write({len(data)} bytes)") from None

    def mmap(
        self, length: int, prot: int, flags: int, offset: int, kind: type[WatchedMemory] = WatchedMemory
    ) -> WatchedMemory:
        """mmap(2). The kernel keeps gntdev's mappings from forked children itself."""
        descriptor = self._usable("mmap")
        call = f"mmap({length} bytes at {offset:#x})"
        if length <= 0:
            raise grant_refused(errno.EINVAL, f"{self._name}: {call}: map one page or more")
        shared = bool(flags & _mmap.MAP_SHARED)
        writable = bool(prot & _mmap.PROT_WRITE)
        try:
            run = [(descriptor, offset, length)]
            memory = kind(run, writable=writable, shared=shared, inherit=self._name != "gntdev")
        except OSError as error:
            raise self._refused(error, call) from None
        memory.watch(None, frozenset({file_of(descriptor)}))
        return memory

    def fileno(self) -> int:
        """The descriptor."""
        return self._usable("fileno")

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._descriptor < 0

    def close(self) -> None:
        """close(2); of a child's copy, too."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _needed(self, request: int, argument: bytearray | memoryview) -> int:  # noqa: ARG002 - of some it depends
        return request >> _SIZE_SHIFT & _SIZE_MASK

    def _usable(self, call: str) -> int:
        """The descriptor."""
        if process() != self._owner:
            text = f"{self._name}: {call}: the file is the parent's: open a domain in this child"
            raise ForkedError(errno.ECHILD, text)
        if self._descriptor < 0:
            raise grant_refused(errno.EBADF, f"{self._name}: {call}: the file is closed: open a new one")
        return self._descriptor

    def _refused(self, error: OSError, call: str) -> Exception:
        return grant_refused(error.errno or errno.EIO, f"{self._name}: {call}: {error.strerror} (from Xen)")


class XenGntalloc(XenFile, PackedGntalloc):
    """An open /dev/xen/gntalloc."""

    def _needed(self, request: int, argument: bytearray | memoryview) -> int:
        layout = xen_gntalloc.ALLOC
        if request != xen_gntalloc.ALLOC_GREF or len(argument) < layout.size:
            return super()._needed(request, argument)
        references: int = layout.unpack_from(argument)[2] * xen_gntalloc.REFERENCE.size
        return max(super()._needed(request, argument), layout.size + references)


class XenGntdev(XenFile, PackedGntdev):
    """An open /dev/xen/gntdev.

    What SET_UNMAP_NOTIFY said of maps that are not mapped yet is kept, to refuse the mmap that would end the kernel.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lock = threading.RLock()
        self._ends: dict[int, int] = {}
        """Of each MAP_GRANT_REF that was made here, the first page and the one behind its last."""
        self._cleared: set[int] = set()
        """First pages of those that are to have a byte cleared."""

    def ioctl(self, request: int, argument: bytearray | memoryview) -> int:
        """As of every file; what is kept changes with what the driver did."""
        with self._lock:
            result = super().ioctl(request, argument)
            if request == xen_gntdev.MAP_GRANT_REF:
                count, index = xen_gntdev.MAP.unpack_from(argument)
                self._ends[index // PAGE_BYTES] = index // PAGE_BYTES + count
            elif request == xen_gntdev.UNMAP_GRANT_REF:
                first = xen_gntdev.UNMAP.unpack_from(argument)[0] // PAGE_BYTES
                self._ends.pop(first, None)
                self._cleared.discard(first)
            elif request == xen_gntdev.SET_UNMAP_NOTIFY:
                self._note(*xen_gntdev.NOTIFY.unpack_from(argument))
            return result

    def _note(self, index: int, actions: int, _port: int) -> None:
        page = index // PAGE_BYTES
        first = next((first for first, end in self._ends.items() if first <= page < end), None)
        if first is not None:
            self._cleared.discard(first)
            if actions & xen_gntdev.NOTIFY_CLEAR_BYTE:
                self._cleared.add(first)

    def mmap(
        self, length: int, prot: int, flags: int, offset: int, kind: type[WatchedMemory] = WatchedMemory
    ) -> WatchedMemory:
        """As of every file. EINVAL also for a read-only mapping of what is to have a byte cleared."""
        with self._lock:
            if offset // PAGE_BYTES in self._cleared and not prot & _mmap.PROT_WRITE:
                raise grant_refused(errno.EINVAL, f"gntdev: mmap({length} bytes at {offset:#x}): {UNCLEARABLE}")
            return super().mmap(length, prot, flags, offset, kind)

    def _needed(self, request: int, argument: bytearray | memoryview) -> int:
        layout = xen_gntdev.MAP
        if request != xen_gntdev.MAP_GRANT_REF or len(argument) < layout.size:
            return super()._needed(request, argument)
        references: int = layout.unpack_from(argument)[0] * xen_gntdev.REFERENCE.size
        return max(super()._needed(request, argument), layout.size + references)


def _cure(error: OSError, name: str) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.strerror}: run as root, or give this user the node"
    if not os.path.exists("/proc/xen") and not os.path.exists("/sys/hypervisor/type"):
        return "this machine is no Xen guest: leave backend out, and start `usermm hypervisor`"
    return f"{error.strerror}: `modprobe {_MODULES[name]}`"
