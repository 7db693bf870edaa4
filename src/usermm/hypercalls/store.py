"""Payloads of STORE and WATCH. Message types have the numbers of Xen's public/io/xs_wire.h.

A path is ASCII and ends with a NUL byte, as do a name in a listing and a permission in a list of them.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from usermm.hypercalls import wire

HEADER = struct.Struct("=HHI")
"""u16 type, u16 0, u32 transaction (0: none); then what the type says."""


class Type(enum.IntEnum):
    """What follows the header, and what the reply is."""

    DIRECTORY = 1
    """path, then SKIP -> LISTING and names."""
    READ = 2
    """path -> the value."""
    GET_PERMS = 3
    """path -> permissions, each a letter and a decimal domid: `n5`, `r6`."""
    WATCH = 4
    """Not here: it is an operation of its own, since a descriptor comes back."""
    UNWATCH = 5
    """path, token -> nothing: the watch's descriptor comes to its end."""
    TRANSACTION_START = 6
    """nothing -> TRANSACTION."""
    TRANSACTION_END = 7
    """`T` commits, `F` forgets; and a NUL."""
    GET_DOMAIN_PATH = 10
    """DOMAIN -> the path of its home, without a NUL."""
    WRITE = 11
    """path, then the value to the end of the packet."""
    MKDIR = 12
    """path."""
    RM = 13
    """path."""
    SET_PERMS = 14
    """path, then permissions."""
    WATCH_EVENT = 15
    """Never asked for: on a watch's descriptor a packet is path, token, each with its NUL."""
    IS_DOMAIN_INTRODUCED = 17
    """DOMAIN -> `T` or `F`, and a NUL."""

    @property
    def call(self) -> str:
        """What the method for it is called, for messages."""
        return _METHODS.get(self.name, self.name.lower())


_METHODS = {"DIRECTORY": "list", "RM": "remove", "GET_PERMS": "permissions", "SET_PERMS": "set_permissions"}


TRANSACTION = struct.Struct("=I")
"""u32 number of the transaction, never 0."""

DOMAIN = struct.Struct("=H2x")
"""u16 domid."""

SKIP = struct.Struct("=I")
"""u32 number of names that the caller has already."""

LISTING = struct.Struct("=QI")
"""u64 generation of the list: names of two replies belong together if it is the same; u32 names left after these."""

INTRODUCE = "@introduceDomain"
"""Watched: a domain came."""
RELEASE = "@releaseDomain"
"""Watched: a domain went."""

LONGEST_ABSOLUTE_BYTES = 3072
"""XENSTORE_ABS_PATH_MAX."""
LONGEST_RELATIVE_BYTES = 2048
"""XENSTORE_REL_PATH_MAX."""
LONGEST_TOKEN_BYTES = 1024
LONGEST_ANSWER_BYTES = wire.LONGEST_REPLY_BYTES - wire.REPLY.size
MOST_PERMISSIONS = 32
"""In one node's list."""
MOST_TRANSACTION_NODES = 1024
"""Different paths that one transaction reads or changes (Xen's quota_trans_nodes)."""
MOST_WAITING_PATHS = 64
"""Different paths kept for a watch whose descriptor is full; one more ends the watch."""

HOMES = "/local/domain"
NAMES = "/names"

ACCESS_LETTERS = "nrwb"
"""none, read, write, both: a letter's place is its bits, 1 to read and 2 to write."""
READ = 1
WRITE = 2


class Permission(NamedTuple):
    """`access` is "n" (none), "r" (read), "w" (write) or "b" (both).

    The first of a node's list names its owner, who may do everything, and what all may who are not in the list.
    """

    domid: int
    access: str


def home(domid: int) -> str:
    """The directory of a domain; its relative paths are below."""
    return f"{HOMES}/{domid}"


def pack_permissions(permissions: tuple[Permission, ...]) -> bytes:
    """As GET_PERMS answers and SET_PERMS takes them."""
    return b"".join(b"%s%d\0" % (access.encode(), domid) for domid, access in permissions)


def unpack_permissions(data: bytes) -> tuple[Permission, ...]:
    """Raises ValueError for what is no list of them, each with a letter and a domid below DOMID_FIRST_RESERVED."""
    *entries, rest = data.split(b"\0")
    if rest or not entries:
        raise ValueError("permissions are a letter and a domid each, with a NUL byte after each")
    return tuple(_permission(entry.decode("ascii", "replace")) for entry in entries)


def _permission(text: str) -> Permission:
    letter, digits = text[:1], text[1:]
    if not letter or letter not in ACCESS_LETTERS:
        raise ValueError(f"{text[:16]!r} does not begin with n, r, w or b")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) < wire.DOMID_FIRST_RESERVED):
        raise ValueError(f"{text[:16]!r} does not end with a domain number below {wire.DOMID_FIRST_RESERVED}")
    return Permission(int(digits), letter)
