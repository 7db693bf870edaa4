"""How Linux packs an ioctl number: direction, argument size, driver letter, call number.

The layout is the one of x86-64, arm64 and riscv64 (asm-generic/ioctl.h): 2 bits of direction, 14 of size, 8 of type,
8 of number. mips, powerpc and sparc pack it differently; userfaultfd's write-protect mode does not exist there.
"""

from __future__ import annotations

_NUMBER_BITS = 8
_TYPE_BITS = 8
_SIZE_BITS = 14

_TYPE_SHIFT = _NUMBER_BITS
_SIZE_SHIFT = _TYPE_SHIFT + _TYPE_BITS
_DIRECTION_SHIFT = _SIZE_SHIFT + _SIZE_BITS

NONE = 0
WRITE = 1
READ = 2


def _IOC(direction: int, letter: str, number: int, size_bytes: int) -> int:  # noqa: N802
    """The request number; `direction` is as user space sees it: WRITE hands the argument in, READ gets it back."""
    if len(letter) != 1 or not 0 <= number < 1 << _NUMBER_BITS or not 0 <= size_bytes < 1 << _SIZE_BITS:
        raise ValueError(f"_IOC({direction}, {letter!r}, {number}, {size_bytes}): a field does not fit")
    return direction << _DIRECTION_SHIFT | size_bytes << _SIZE_SHIFT | ord(letter) << _TYPE_SHIFT | number


def _IO(letter: str, number: int) -> int:  # noqa: N802
    return _IOC(NONE, letter, number, 0)


def _IOR(letter: str, number: int, size_bytes: int) -> int:  # noqa: N802
    return _IOC(READ, letter, number, size_bytes)


def _IOW(letter: str, number: int, size_bytes: int) -> int:  # noqa: N802
    return _IOC(WRITE, letter, number, size_bytes)


def _IOWR(letter: str, number: int, size_bytes: int) -> int:  # noqa: N802
    return _IOC(READ | WRITE, letter, number, size_bytes)


def ioctl_size(request: int) -> int:
    """The size in bytes of the argument that the number `request` speaks of."""
    return request >> _SIZE_SHIFT & (1 << _SIZE_BITS) - 1
