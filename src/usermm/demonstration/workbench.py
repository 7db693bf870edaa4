"""What both halves work with: a known file, buffers that come and go, what the process has pinned."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import tempfile
from types import TracebackType
from typing import Self

from usermm.errors import DeviceError, LimitError
from usermm.uring import Ring

SECTOR_BYTES = 512
LABEL_BYTES = 16  # each sector starts with its number in plain text
FILE_BYTES = 8 << 20
LARGEST_BYTES = 1 << 20
SMALLEST_BYTES = 8 * mmap.PAGESIZE  # eight different sizes, a page apart

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


def label(sector: int) -> bytes:
    """What a sector of the file starts with."""
    return b"sector %08d " % sector


class Buffer:
    """Private anonymous memory from mmap, as an allocator takes it for large blocks; `length` in bytes."""

    def __init__(self, length: int) -> None:
        self.memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.length = length
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        # The kernel charges a whole huge page to VmPin and RLIMIT_MEMLOCK when it pins a part of one; the
        # figures shall be those of the buffers. A kernel without huge pages answers EINVAL.
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)

    def close(self) -> None:
        """Unmap it. From here on the kernel may give the address to anybody."""
        self.memory.close()


class KnownFile:
    """A temporary file in which no two sectors are equal. It has no name, so that nothing of it can stay
    behind.

    Reads go through the page cache, which every file system has; where they end up is the same with O_DIRECT.
    """

    def __init__(self, directory: str | None, seed: int) -> None:
        self._expected = ctypes.create_string_buffer(LARGEST_BYTES)
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed by __exit__)
            self._write(seed)
        except OSError as error:
            where = directory or tempfile.gettempdir()
            what = f"write {FILE_BYTES >> 20} MiB in {where}"
            message = f"{what}: {error.strerror}; choose another place with --directory"
            raise DeviceError(error.errno or errno.EIO, message) from None

    def _write(self, seed: int) -> None:
        noise = random.Random(seed)
        filler = SECTOR_BYTES - LABEL_BYTES
        with memoryview(
            b"".join(label(n) + noise.randbytes(filler) for n in range(FILE_BYTES // SECTOR_BYTES))
        ) as rest:
            written = 0
            while written < len(rest):
                written += self._file.write(rest[written:])

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def matches(self, buffer: Buffer, sector: int) -> bool:
        """Whether the program finds in its buffer what the file has from `sector` on."""
        expected = memoryview(self._expected)[: buffer.length]
        count = os.preadv(self.fileno(), [expected], sector * SECTOR_BYTES)
        return count == buffer.length and not _memcmp(buffer.address, ctypes.addressof(self._expected), count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def pinned_bytes() -> int:
    """What devices have pinned of this process: VmPin of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmPin:"):
                return int(line.split()[1]) * 1024
    return 0


def largest_buffer(slots: int) -> int:
    """How large buffers may be so that `slots` of them can be pinned at once: up to 1 MiB, in bytes; tried,
    not guessed.

    RLIMIT_MEMLOCK counts per user, not per process, and not at all for some: only the kernel knows what is
    left. Raises `LimitError` (ENOMEM) when not even the smallest buffers fit.
    """
    length = LARGEST_BYTES
    while length >= SMALLEST_BYTES:
        if _fits(slots, length):
            return length
        length //= 2
    raise LimitError(
        errno.ENOMEM,
        f"io_uring: less than {slots * SMALLEST_BYTES >> 10} KiB can be pinned; raise the limit (ulimit -l)",
    )


def _fits(slots: int, length: int) -> bool:
    """Register a buffer in every slot and once more: each is charged, and the new before the old."""
    buffer = Buffer(length)
    try:
        with Ring(slots) as ring:
            for slot in (*range(slots), 0):
                ring.update(slot, buffer.address, length)
        return True
    except LimitError:
        return False
    finally:
        buffer.close()
