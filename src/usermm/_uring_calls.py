"""The raw system calls behind `usermm.uring`, and what to say when one is refused."""

from __future__ import annotations

import ctypes
import errno
import os

from usermm.errors import from_errno

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall(number: int, *arguments: int) -> int:
    """The system call's result, or its errno as a negative number (what the kernel itself returns)."""
    result: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))
    return -ctypes.get_errno() if result == -1 else result


def checked(what: str, result: int) -> int:
    if result >= 0:
        return result
    number = -result
    raise from_errno(number, f"{what}: {os.strerror(number)}; {_next_step(number)}")


def _next_step(number: int) -> str:
    match number:
        case errno.EPERM | errno.EACCES:
            return _permission()
        case errno.ENOSYS:
            return "this kernel has no io_uring: one built with CONFIG_IO_URING, 5.19 or newer, is needed"
        case errno.EMFILE | errno.ENFILE:
            return "close descriptors or raise the limit (ulimit -n)"
        case errno.ENOMEM:
            return "pin less memory or raise the limit (ulimit -l; in a service LimitMEMLOCK=)"
        case errno.EFAULT:
            return "the whole range must be mapped, writable, and not a mapping of a file"
        case errno.EINVAL:
            return "sparse fixed buffers need Linux 5.19 or newer"
        case _:
            return "see io_uring_register(2)"


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
