"""An account of the truth that needs no notifications: after each free the kernel is asked what is still mapped.

What MPI attached and the kernel then unmapped is stale, for as long as it stays attached; whatever is mapped there next
is other memory. A network card would go on using the old pages. MPICH without one copies in software, through the
address, so no byte is wrong; that is why attachments are counted, too.
"""

from __future__ import annotations

import ctypes
from typing import Any

from usermm.registrars import MpiWindow
from usermm.registrars.mpi import Attachment

_PAGE_BYTES = 4096
_MS_ASYNC = 1

_libc = ctypes.CDLL(None)
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def mapped(start: int, end: int) -> bool:
    """Whether all of [start, end) is: msync(2) of memory without a file does nothing, but fails at a hole."""
    first = start - start % _PAGE_BYTES
    return bool(_libc.msync(first, end - first, _MS_ASYNC) == 0)


class WitnessedWindow(MpiWindow):
    """An MpiWindow that knows which of its attachments are stale."""

    def __init__(self, comm: Any) -> None:
        super().__init__(comm)
        self.stale: set[int] = set()  # displacements
        self.attachments = 0
        self.stale_ever = 0
        self.stale_handed_out = 0

    def register(self, address: int, length: int) -> Attachment:
        attachment = super().register(address, length)
        self.stale.discard(attachment.displacement)
        self.attachments += 1
        return attachment

    def look(self) -> None:
        """To be called whenever memory was freed, before any is allocated."""
        for start, end in self.attached:
            if start not in self.stale and not mapped(start, end):
                self.stale.add(start)
                self.stale_ever += 1

    def hand_out(self, part: Attachment) -> None:
        """To be called with all that is sent to a peer. Stale is also what is not attached at all."""
        end = part.displacement + part.length
        around = [start for start, stop in self.attached if start <= part.displacement and end <= stop]
        self.stale_handed_out += not around or around[0] in self.stale
