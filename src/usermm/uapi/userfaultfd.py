"""userfaultfd(2), /dev/userfaultfd and ioctl_userfaultfd(2): numbers, feature bits and layouts."""

from __future__ import annotations

import enum
from struct import Struct
from typing import Final

from usermm.uapi._ioctl import _IO, _IOR, _IOWR

DEVICE_NODE: Final = "/dev/userfaultfd"
"""Whoever may open it gets a userfaultfd with all rights from its USERFAULTFD_IOC_NEW (Linux 6.1)."""

UNPRIVILEGED_SYSCTL: Final = "/proc/sys/vm/unprivileged_userfaultfd"
"""0: without CAP_SYS_PTRACE only UFFD_USER_MODE_ONLY is allowed (Linux 5.2; the default is 0 since 5.11)."""

SYSTEM_CALL: Final[dict[str, int]] = {
    "x86_64": 323,
    "i686": 374,
    "armv7l": 388,
    "aarch64": 282,
    "riscv64": 282,
    "loongarch64": 282,
    "s390x": 355,
}
"""Number of the system call by `os.uname().machine` (Linux 4.3); 282 is the generic table's."""

UFFD_USER_MODE_ONLY: Final = 1
"""Flag of the system call: faults raised inside the kernel are not handled; needs no privilege (Linux
5.11)."""

UFFD_API: Final = 0xAA


API: Final = Struct("=3Q")
"""struct uffdio_api: api, features (asked, then available), ioctls (answered)."""
RANGE: Final = Struct("=2Q")
"""struct uffdio_range: start, length in bytes; both multiples of the page size."""
REGISTER: Final = Struct("=4Q")
"""struct uffdio_register: start, length, mode, ioctls (answered)."""
WRITEPROTECT: Final = Struct("=3Q")
"""struct uffdio_writeprotect: start, length, mode."""
CONTINUE: Final = Struct("=3Qq")
"""struct uffdio_continue: start, length, mode, mapped (answered)."""
MESSAGE: Final = Struct("=B7x3Q")
"""struct uffd_msg: event, then the three words of its argument: of REMAP from, to, length; of REMOVE and
UNMAP start and end (exclusive)."""

_LETTER: Final = chr(UFFD_API)

USERFAULTFD_IOC_NEW: Final = _IO(_LETTER, 0x00)
"""On DEVICE_NODE; its argument is the flags of the system call, by value."""
UFFDIO_API: Final = _IOWR(_LETTER, 0x3F, API.size)
UFFDIO_REGISTER: Final = _IOWR(_LETTER, 0x00, REGISTER.size)
UFFDIO_UNREGISTER: Final = _IOR(_LETTER, 0x01, RANGE.size)  # the header has _IOR where _IOW was meant
UFFDIO_WAKE: Final = _IOR(_LETTER, 0x02, RANGE.size)
UFFDIO_WRITEPROTECT: Final = _IOWR(_LETTER, 0x06, WRITEPROTECT.size)
UFFDIO_CONTINUE: Final = _IOWR(_LETTER, 0x07, CONTINUE.size)

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2


class Event(enum.IntEnum):
    """First byte of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class Feature(enum.IntFlag):
    """What UFFDIO_API offers; `SINCE` has the kernel version of each."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


SINCE: Final[dict[Feature, str]] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
}
"""Linux version that brought each feature. For people to read: programs ask UFFDIO_API."""
