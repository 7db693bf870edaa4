"""The devices of a real Xen, as Linux has them in /dev/xen: the same calls, made to the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap as _mmap
import os
from typing import Any

from usermm._core import Memory
from usermm.errors import UnavailableError, grant_refused
from usermm.grants.packed import PackedGntalloc, PackedGntdev
from usermm.uapi import xen_gntalloc, xen_gntdev

_SIZE_SHIFT, _SIZE_MASK = 16, 0x3FFF  # of the argument, in a request's number (asm-generic/ioctl.h)
_MODULES = {"gntdev": "xen-gntdev", "gntalloc": "xen-gntalloc", "evtchn": "xen-evtchn"}


def is_there() -> bool:
    """Whether this machine has them."""
    return os.path.exists("/dev/xen/gntdev")


class XenFile:
    """An open /dev/xen/NAME. Raises UnavailableError (ENOENT, EACCES and others) with what is missing."""

    def __init__(self, name: str) -> None:
        self._name = name
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
        try:
            return int(fcntl.ioctl(self._fileno(), request, argument, True))
        except OSError as error:
            raise self._refused(error, f"ioctl({request:#x})") from None

    def read(self, size: int) -> bytes:
        """read(2), for evtchn."""
        try:
            return os.read(self._fileno(), size)
        except OSError as error:
            raise self._refused(error, f"read({size})") from None

    def write(self, data: bytes) -> int:
        """write(2), for evtchn."""
        try:
            return os.write(self._fileno(), data)
        except OSError as error:
            raise self._refused(error, f"write({len(data)} bytes)") from None

    def mmap(self, length: int, prot: int, flags: int, offset: int, kind: Any = Memory) -> Any:
        """mmap(2). The kernel keeps gntdev's mappings from forked children itself."""
        shared = bool(flags & _mmap.MAP_SHARED)
        try:
            run = [(self._fileno(), offset, length)]
            return kind(run, writable=bool(prot & _mmap.PROT_WRITE), shared=shared, inherit=self._name != "gntdev")
        except OSError as error:
            raise self._refused(error, f"mmap({length} bytes at {offset:#x})") from None

    def fileno(self) -> int:
        """The descriptor."""
        return self._fileno()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._descriptor < 0

    def close(self) -> None:
        """close(2)."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _needed(self, request: int, argument: bytearray | memoryview) -> int:  # noqa: ARG002 - of some it depends
        return request >> _SIZE_SHIFT & _SIZE_MASK

    def _fileno(self) -> int:
        if self._descriptor < 0:
            raise grant_refused(errno.EBADF, f"{self._name}: the file is closed: open a new one")
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
    """An open /dev/xen/gntdev."""

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
