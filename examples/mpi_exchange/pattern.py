"""What every byte has to be: it follows from who wrote it, the serial number of what was written, and the offset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

LONGEST_BYTES = 1 << 21
_STARTS = 1 << 20
_NOISE = np.random.default_rng(0).integers(0, 256, _STARTS + LONGEST_BYTES, np.uint8)  # the same in every rank


def pattern(writer: int, serial: int, offset: int, length: int) -> Bytes:
    """`length` bytes from byte `offset` on of what `writer` wrote as number `serial`; read only."""
    start = (writer * 0x9E3779B1 + serial * 0x85EBCA77) % _STARTS
    piece = _NOISE[start + offset : start + offset + length]
    piece.flags.writeable = False
    return piece


def wrong_bytes(found: Bytes, expected: Bytes) -> int:
    """How many bytes are not what they have to be."""
    return int(np.count_nonzero(found != expected))
