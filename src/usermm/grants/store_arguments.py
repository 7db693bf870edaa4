"""What a program hands to the store, checked and as it goes over the wire."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from usermm.errors import ArgumentError, ArgumentTypeError, grant_refused
from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Permission, Type
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED


def path_bytes(kind: Type, path: str) -> bytes:
    """What would not be a path at the other end, or end too early there, is refused here in the same way."""
    if not isinstance(path, str):
        raise ArgumentTypeError(f"{kind.call}: path must be a str, not {type(path).__name__}")
    if not path.isascii() or "\0" in path or len(path) > layout.LONGEST_ABSOLUTE_BYTES:
        reason = "this is no path: use letters, digits and -_@ between single slashes"
        raise grant_refused(errno.EINVAL, f"{kind.call}({path[:64]!r}): {reason}")
    return path.encode()


def value_bytes(value: bytes | bytearray | memoryview | str) -> bytes:
    """Text as UTF-8. Raises ArgumentTypeError, ArgumentError."""
    if isinstance(value, str):
        return utf8("write", value)
    try:
        return memoryview(value).tobytes()
    except (TypeError, BufferError) as error:
        raise ArgumentTypeError(f"write: value must be bytes or a str: {error}") from None


def utf8(call: str, text: str) -> bytes:
    """Raises ArgumentError for text with lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{call}: the text has no UTF-8: {error}: pass bytes") from None


def given_permissions(given: Iterable[tuple[int, str]]) -> tuple[Permission, ...]:
    """Raises ArgumentError for none at all and for another letter than n, r, w and b, ArgumentTypeError."""
    try:
        wanted = tuple(Permission(*entry) for entry in given)
    except TypeError:
        raise ArgumentTypeError(f"set_permissions({given!r:.60}): pass (domid, letter) each") from None
    if not wanted:
        raise ArgumentError("set_permissions: give the owner's entry first: (domid, what everybody else may)")
    for domid, access in wanted:
        if access not in (*layout.ACCESS_LETTERS,):
            raise ArgumentError(f"set_permissions: {access!r} is not one of n, r, w and b")
        checked_domid(domid)
    return wanted


def checked_domid(domid: int) -> int:
    """Raises ArgumentTypeError, ArgumentError."""
    if not isinstance(domid, int):
        raise ArgumentTypeError(f"domid must be an int, not {type(domid).__name__}")
    if not 0 <= domid < DOMID_FIRST_RESERVED:
        raise ArgumentError(f"domid must be in 0..{DOMID_FIRST_RESERVED - 1}, not {domid}")
    return domid
