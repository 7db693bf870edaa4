"""What programs pass: refused in one line before anything is packed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import SupportsIndex, TypeVar

from usermm.errors import ArgumentError, ArgumentTypeError
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED

Item = TypeVar("Item")


def unsigned(value: SupportsIndex, bits: int, name: str) -> int:
    """An int of 0..2**bits-1. Raises ArgumentTypeError, ArgumentError; `name` names the call and the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an int, not {type(value)!r}") from None
    if not 0 <= number < 1 << bits:
        raise ArgumentError(f"{name} must be in 0..2**{bits}-1")
    return number


def each_of(values: Iterable[Item], name: str) -> Iterator[Item]:
    """One after the other. Raises ArgumentTypeError, at once."""
    try:
        return iter(values)
    except TypeError:
        raise ArgumentTypeError(f"{name}: pass an iterable, not {type(values)!r}") from None


def ioctl_bytes(argument: object, call: str) -> memoryview:
    """The bytes of a buffer. Raises ArgumentTypeError."""
    try:
        return memoryview(argument).cast("B")  # type: ignore[arg-type] # if it is one
    except (TypeError, ValueError, BufferError) as error:
        raise ArgumentTypeError(f"{call}: pass a buffer of the request's bytes, contiguous: {error}") from None


def domain_number(value: SupportsIndex, name: str) -> int:
    """A number that a domain can have. Raises as above."""
    number = unsigned(value, 64, name)
    if number >= DOMID_FIRST_RESERVED:
        raise ArgumentError(f"{name} {number} must be from 0 to {DOMID_FIRST_RESERVED - 1}")
    return number
