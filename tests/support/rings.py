"""A ring that is not `usermm.uring.Ring`: its user submits without waiting and reads the completion queue himself."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import Self

from usermm._uring_calls import checked, flush_overflow, syscall
from usermm.registrars.io_uring import SqeFields
from usermm.uapi import io_uring as abi

_ENTRIES = 8


class ForeignRing:
    """No fixed buffers at first. Like the struct of liburing it shows its descriptor as `ring_fd`, also when closed."""

    def __init__(self, flags: int = 0) -> None:
        parameters = abi.Params(flags=flags)
        self.ring_fd = checked("setup", syscall(abi.SYS_IO_URING_SETUP, _ENTRIES, ctypes.addressof(parameters)))
        self.sq, self.cq = parameters.sq_off, parameters.cq_off
        self.cq_entries = parameters.cq_entries
        length = max(self.sq.array + 4 * _ENTRIES, self.cq.cqes + abi.CQE.size * self.cq_entries)
        self.queues = mmap.mmap(self.ring_fd, length, offset=abi.IORING_OFF_SQ_RING)
        self.entries = mmap.mmap(self.ring_fd, _ENTRIES * abi.SQE.size, offset=abi.IORING_OFF_SQES)

    def read_fixed(self, fd: int, part: SqeFields, user_data: int) -> None:
        """Submits a read of `fd` and returns while it is under way."""
        tail = self._word(self.sq.tail)
        index = tail.value % _ENTRIES
        entry = (abi.IORING_OP_READ_FIXED, 0, 0, fd, (1 << 64) - 1, part.addr, part.len, 0, user_data, part.buf_index)
        abi.SQE.pack_into(self.entries, index * abi.SQE.size, *entry, 0, 0, 0, 0)
        self._word(self.sq.array + 4 * index).value = index
        tail.value += 1
        checked("enter", syscall(abi.SYS_IO_URING_ENTER, self.ring_fd, 1, 0, 0, 0, 0))

    def completions(self) -> list[tuple[int, int]]:
        """(user_data, result) of all that completed since the last call."""
        found = []
        while True:
            head, tail = self._word(self.cq.head), self._word(self.cq.tail)
            while head.value != tail.value:
                at = self.cq.cqes + head.value % self.cq_entries * abi.CQE.size
                found.append(abi.CQE.unpack_from(self.queues, at)[:2])
                head.value += 1
            flush_overflow(self.ring_fd)
            if head.value == tail.value:
                return found

    def wait(self, count: int, timeout_s: float = 10) -> list[tuple[int, int]]:
        """At least `count` completions."""
        until, found = time.monotonic() + timeout_s, self.completions()
        while len(found) < count and time.monotonic() < until:
            time.sleep(0.001)
            found += self.completions()
        assert len(found) >= count, found
        return found

    def close(self) -> None:
        if not self.queues.closed:
            self.queues.close()
            self.entries.close()
            syscall(abi.SYS_IO_URING_REGISTER, self.ring_fd, abi.IORING_UNREGISTER_BUFFERS, 0, 0)
            os.close(self.ring_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _word(self, offset: int) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_buffer(self.queues, offset)
