"""A system call filter like that of a container, for this process and all its children: see seccomp(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from usermm.uapi.userfaultfd import SYSTEM_CALL

_IOCTL = {"x86_64": 16, "aarch64": 29}
_NEW_USERFAULTFD = 0xAA00  # USERFAULTFD_IOC_NEW of /dev/userfaultfd
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _SECOND_ARGUMENT_AT = 0, 24

_SET_SECCOMP, _MODE_FILTER, _SET_NO_NEW_PRIVS = 22, 2, 38


def forbid_userfaultfd() -> None:
    """Answers EPERM to both ways of getting one. It cannot be taken back: call it in a child."""
    machine = os.uname().machine
    code = [
        (_LOAD, 0, 0, _NUMBER_AT),
        (_EQUAL, 4, 0, SYSTEM_CALL[machine]),
        (_EQUAL, 0, 2, _IOCTL[machine]),
        (_LOAD, 0, 0, _SECOND_ARGUMENT_AT),
        (_EQUAL, 1, 0, _NEW_USERFAULTFD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_SET_SECCOMP, _MODE_FILTER, program) == 0, os.strerror(ctypes.get_errno())
