"""The raw system calls behind `usermm.uring`, and what to say when one is refused."""

from __future__ import annotations

import ctypes
import errno
import os

from usermm.errors import ArgumentError, ArgumentTypeError, from_errno

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
}


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
