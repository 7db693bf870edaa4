"""NumPy arrays that come and go at random, some on the heap and some in mappings of their own."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from pattern import Bytes, pattern

HEAP_BYTES = (3_000, 20_000, 60_000)
MAPPED_BYTES = (200_000, 300_000, 700_000)
BLOCKS = 12

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
_MAPPED_FROM_BYTES = 128 * 1024


@dataclass(slots=True)
class Block:
    """An array, and the serial number that its bytes follow from; no two of a rank have the same."""

    array: Bytes
    serial: int


class Blocks:
    """`BLOCKS` arrays of rank `owner`. Sizes come from short lists, so that the same address and size come again."""

    def __init__(self, owner: int, dice: random.Random) -> None:
        # glibc raises this limit by itself as mapped blocks are freed; set, it stays, and large arrays stay mappings.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        self.owner = owner
        self.dice = dice
        self.made = 0
        self.blocks = [self._new() for _ in range(BLOCKS)]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def renew(self, freed: Callable[[], None]) -> None:
        """Free some blocks, then make as many; `freed` is called in between."""
        some = self.dice.sample(range(BLOCKS), self.dice.randint(1, 4))
        self.blocks = [block for index, block in enumerate(self.blocks) if index not in some]
        freed()
        self.blocks += [self._new() for _ in some]

    def fill(self, block: Block) -> None:
        block.array[:] = pattern(self.owner, block.serial, 0, block.array.nbytes)

    def _new(self) -> Block:
        self.made += 1
        block = Block(np.empty(self._size(), np.uint8), self.made)
        self.fill(block)
        return block

    def _size(self) -> int:
        return self.dice.choice(self.dice.choice((HEAP_BYTES, MAPPED_BYTES)))
