"""An opened device node: its calls, and a descriptor that stays open as long as a call is inside.

Closing a descriptor wakes nobody who waits on it, and its number may be another file's a moment later. So who waits
waits on `ended` too, and the last call that leaves a closed node closes the numbers.

ctypes, where fcntl, os and mmap cannot: fcntl.ioctl takes no address of 64 bits, os.read none at all, and mmap.mmap
keeps a copy of the descriptor, by which the device would outlive its close().
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import threading
import weakref
from typing import Final

from usermm.errors import refused

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_read = _libc.read
_read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_read.restype = ctypes.c_ssize_t
_mmap = _libc.mmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# Reentrant, since a signal handler may close a device; one for all, so that a forked child renews just one.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it at the fork, and does not exist in the child
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Node:
    """Opened for reading. Raises DeviceError with open's errno."""

    __slots__ = ("_fd", "_inside", "closed", "emulated", "ended", "opener")

    def __init__(self, path: str) -> None:
        # Even a device that may block does not: its reads wait in poll(2), where close() can end them.
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise refused(error.errno or errno.EIO, "open", f"{path}: {error.strerror}") from None
        try:
            self.emulated = stat.S_ISFIFO(os.fstat(self._fd).st_mode)
            """Whether libusermm-preload.so made it, which sees what a userfaultfd sees."""
            self.ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            """Readable for good once the node is closed."""
        except OSError as error:
            os.close(self._fd)
            raise refused(error.errno or errno.EIO, "open") from None
        self._inside = 0
        self.opener = os.getpid()
        self.closed = False

    def enter(self, call: str) -> int:
        """The descriptor, which stays what it is until leave(). Raises ClosedError."""
        with _lock:
            self._inside += 1  # first, so that a signal handler that closes leaves the descriptor to us
        if self.closed:
            self.leave()
            raise refused(errno.EBADF, call)
        return self._fd

    def leave(self) -> None:
        with _lock:
            self._inside -= 1
            if self.closed and self._inside == 0:
                self._give_back()

    def number(self, call: str) -> int:
        """The descriptor, for who looks after it himself. Raises ClosedError."""
        if self.closed:
            raise refused(errno.EBADF, call)
        return self._fd

    def readiness(self, fd: int) -> tuple[int, int]:
        """Two new descriptors: the first polls readable with an event of `fd`, and for good once the node is closed.

        No copy of `fd`, by which the device would live on. The second one keeps `ended` watched after close().
        """
        ended = os.dup(self.ended)
        try:
            with select.epoll() as poller:
                poller.register(fd, select.EPOLLIN)
                poller.register(ended, select.EPOLLIN)
                return os.dup(poller.fileno()), ended
        except OSError:
            os.close(ended)
            raise

    def close(self) -> None:
        """Ends every wait. In a child, where those who were inside do not exist, it waits for nobody."""
        with _lock:
            if self.closed:
                return
            self.closed = True
            forked = os.getpid() != self.opener
            if not forked:
                os.eventfd_write(self.ended, 1)  # the child's would end the parent's waits
            if forked or self._inside == 0:
                self._give_back()

    def _give_back(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            os.close(self.ended)


def read(fd: int, size: int) -> bytes:
    """read(2). Like all that follow: raises OSError with the call's errno."""
    return os.read(fd, size)


def read_to(fd: int, address: int, size: int) -> int:
    done = int(_read(fd, address, size))
    if done < 0:
        raise _last_error()
    return done


def ioctl(fd: int, request: int, address: int) -> None:
    if _ioctl(fd, request, address) < 0:
        raise _last_error()


def ioctl_buffer(fd: int, request: int, argument: bytearray) -> None:
    """Whatever the request writes back is in `argument` afterwards."""
    room = (ctypes.c_char * len(argument)).from_buffer(argument)
    ioctl(fd, request, ctypes.addressof(room))


def map_page(fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
    """A read-only view of the mapping, which is unmapped with its last user."""
    address = _mmap(None, length, prot, flags, fd, offset)
    if address == _MAP_FAILED:
        raise _last_error()
    page = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(page, _munmap, address, length).atexit = False
    return memoryview(page).toreadonly().cast("B")


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
