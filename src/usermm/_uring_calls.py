"""The raw system calls behind `usermm.uring` and the io_uring registrar, and what to say when one is refused."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Protocol

from usermm.errors import ArgumentError, ArgumentTypeError, ClosedError, ForkedError, from_errno
from usermm.uapi import io_uring as abi

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_LIMIT_DESCRIPTORS = "close descriptors or raise the limit (ulimit -n)"
_NEXT_STEPS = {
    errno.ENOSYS: "this kernel has no io_uring: one built with CONFIG_IO_URING, 5.19 or newer, is needed",
    errno.EMFILE: _LIMIT_DESCRIPTORS,
    errno.ENFILE: _LIMIT_DESCRIPTORS,
    errno.ENOMEM: "pin less memory or raise the limit (ulimit -l; in a service LimitMEMLOCK=)",
    errno.EFAULT: "the whole range must be mapped, writable, and not a mapping of a file",
    errno.EINVAL: "sparse fixed buffers need Linux 5.19 or newer",
    errno.EEXIST: "the ring takes calls from its own thread only (IORING_SETUP_SINGLE_ISSUER): call from there",
    errno.ENXIO: "the ring has no table of fixed buffers (any more): register one",
}


def syscall(number: int, *arguments: int) -> int:
    """The system call's result, or its errno as a negative number (what the kernel itself returns)."""
    result: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))
    return -ctypes.get_errno() if result == -1 else result


def register_sparse_table(fd: int, slots: int) -> int:
    """Give ring `fd` a table of `slots` empty fixed buffers: 0 or a negative errno (EBUSY: it has one)."""
    table = abi.RSRC_REGISTER.pack(slots, abi.IORING_RSRC_REGISTER_SPARSE, 0, 0, 0)
    return _register(fd, abi.IORING_REGISTER_BUFFERS2, table)


def update_buffer(fd: int, slot: int, address: int, length: int, tag: int) -> int:
    """Make `length` bytes at `address` fixed buffer `slot` of ring `fd`; both 0 empty it. Not negative, or an errno.

    The kernel keeps what was there until no request uses it any more, then posts that one's tag (0: nothing). It locks
    by itself: any thread may call, whoever uses the queues meanwhile.
    """
    vector = ctypes.create_string_buffer(abi.IOVEC.pack(address, length), abi.IOVEC.size)
    tags = ctypes.c_uint64(tag)
    update = abi.RSRC_UPDATE2.pack(slot, 0, ctypes.addressof(vector), ctypes.addressof(tags), 1, 0)
    return _register(fd, abi.IORING_REGISTER_BUFFERS_UPDATE, update)


def table_slots(fd: int) -> int:
    """How many slots the table of ring `fd` has; no call tells. Raises DeviceError (ENXIO: there is none)."""
    inside, outside = -1, abi.IORING_MAX_REG_BUFFERS
    while outside - inside > 1:
        slot = (inside + outside) // 2
        # A byte at address 0 is refused before anything changes, with EINVAL where there is no such slot.
        result = update_buffer(fd, slot, 0, 1, 0)
        if result == -errno.EFAULT:
            inside = slot
        elif result == -errno.EINVAL:
            outside = slot
        else:
            checked(f"io_uring: the table of descriptor {fd}", result)
    return outside


def flush_overflow(fd: int) -> int:
    """Let the kernel move completions that did not fit into the queue of ring `fd` there, without waiting."""
    return syscall(abi.SYS_IO_URING_ENTER, fd, 0, 0, abi.IORING_ENTER_GETEVENTS, 0, 0)


def _register(fd: int, operation: int, argument: bytes) -> int:
    raw = ctypes.create_string_buffer(argument, len(argument))
    return syscall(abi.SYS_IO_URING_REGISTER, fd, operation, ctypes.addressof(raw), len(argument))


def checked(what: str, result: int) -> int:
    if result >= 0:
        return result
    number = -result
    raise from_errno(number, f"{what}: {os.strerror(number)}; {_next_step(number)}")


def _next_step(number: int) -> str:
    return (
        _permission()
        if number in (errno.EPERM, errno.EACCES)
        else _NEXT_STEPS.get(number, "see io_uring_register(2)")
    )


def _permission() -> str:
    """Who forbids io_uring: the sysctl (since 6.6), or else a seccomp filter."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled", encoding="ascii") as file:
            disabled = file.read().strip()
    except OSError:
        disabled = "0"
    if disabled == "0":
        return (
            "a seccomp filter forbids io_uring: run outside it (docker run --security-opt seccomp=unconfined)"
        )
    return f"as root: sysctl -w kernel.io_uring_disabled=0 (now {disabled})"


def read_error(number: int, fd: int, slot: int, address: int, length: int) -> str:
    what = f"io_uring READ_FIXED of descriptor {fd} into slot {slot} ({length} bytes at {address:#x})"
    if number == errno.EFAULT:
        step = f"the slot is empty or the range is not inside it: update({slot}, ...) first"
        return f"{what}: {os.strerror(number)}; {step}"
    return f"{what}: {os.strerror(number)}"


def require(name: str, value: int, lowest: int, highest: int) -> None:
    """Refuse what no kernel can take, before it is cut to 32 or 64 bits."""
    if not isinstance(value, int):
        raise ArgumentTypeError(f"io_uring: {name} must be an integer, not {type(value).__name__}")
    if not lowest <= value <= highest:
        raise ArgumentError(f"io_uring: {name} is {value}; it must be from {lowest} to {highest}")


class HasFileno(Protocol):
    """`usermm.uring.Ring`, or anything else with the ring's descriptor; if it has `closed`, that is looked at, too."""

    def fileno(self) -> int: ...


class HasRingFd(Protocol):
    """An object that shows liburing's struct io_uring."""

    @property
    def ring_fd(self) -> int: ...


class RingDescriptor:
    """Somebody else's ring: its descriptor for as long as that is the ring's, in the process that the ring is of."""

    def __init__(self, ring: int | HasFileno | HasRingFd) -> None:
        self._ring = ring
        self._pid = os.getpid()
        self._identity = self._identify(self._ask())

    def __str__(self) -> str:
        return f"descriptor {self._ring}" if isinstance(self._ring, int) else repr(self._ring)

    def is_parents(self) -> bool:
        return os.getpid() != self._pid

    def number(self) -> int:
        """Raises ClosedError (also when the number is another file's by now), ForkedError."""
        if self.is_parents():
            raise ForkedError(errno.ECHILD, f"io_uring: {self} belongs to the parent process; open one in the child")
        number = self._ask()
        if self._identify(number) != self._identity:
            raise self._closed()
        return number

    def is_same(self, other: RingDescriptor) -> bool:
        """By number and inode: a duplicate of the descriptor is not recognized."""
        try:
            return (self.number(), self._identity) == (other.number(), other._identity)
        except (ClosedError, ForkedError):
            return False

    def _ask(self) -> int:
        if isinstance(self._ring, int):
            require("the ring's descriptor", self._ring, 0, (1 << 31) - 1)
            return self._ring
        if getattr(self._ring, "closed", False):
            raise self._closed()
        try:
            return _number_in(self._ring)
        except (OSError, ValueError):  # what sockets and files say when they are closed
            raise self._closed() from None

    def _identify(self, number: int) -> tuple[int, int]:
        """Each ring has an inode of its own. Where a kernel lets them share one, any ring passes for ours."""
        try:
            status = os.fstat(number)
        except OSError:
            raise self._closed() from None
        return status.st_dev, status.st_ino

    def _closed(self) -> ClosedError:
        return ClosedError(errno.EBADF, f"io_uring: {self} is closed; open a new ring, and make a registrar for it")


def _number_in(ring: HasFileno | HasRingFd) -> int:
    if hasattr(ring, "ring_fd"):
        return ring.ring_fd
    if hasattr(ring, "fileno"):
        return ring.fileno()
    raise ArgumentTypeError(f"io_uring: pass a descriptor or an object with fileno(), not {type(ring).__name__}")
