"""Numbers that programs pass: refused in one line before anything is packed."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from usermm.errors import ArgumentError, ArgumentTypeError


def unsigned(value: SupportsIndex, bits: int, name: str) -> int:
    """An int of 0..2**bits-1. Raises ArgumentTypeError, ArgumentError; `name` names the call and the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an int, not {type(value)!r}") from None
    if not 0 <= number < 1 << bits:
        raise ArgumentError(f"{name} must be in 0..2**{bits}-1")
    return number
