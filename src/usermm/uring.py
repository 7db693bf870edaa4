"""A minimal io_uring by raw system calls: one table of fixed buffers and one read at a time.

It exists to show and to test what a registration with a device means, without any library: a fixed buffer
pins the pages that are mapped *when it is registered*, and a read into it goes to those pages, whatever is
mapped there by then.

A ring is used by one thread at a time. It needs Linux 5.19 (sparse buffer tables).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import warnings
from collections import deque
from types import TracebackType
from typing import Self

from usermm._uring_calls import checked, read_error, register_sparse_table, require, syscall, update_buffer
from usermm.errors import ClosedError, DeviceError, ForkedError, from_errno
from usermm.uapi import io_uring as abi

# One read is in flight at most; the kernel keeps completions that do not fit (IORING_FEAT_NODROP, since 5.5).
_ENTRIES = 4

# Completions of reads carry this bit in user_data, those of released registrations carry the caller's tag.
_READ = 1 << 63

_U64 = (1 << 64) - 1


class Ring:
    """An io_uring with a table of `slots` fixed buffers (1 to 16 384), all empty.

    Raises `UnavailableError` (ENOSYS, EPERM: the kernel or the container forbids io_uring), `LimitError`
    (EMFILE, ENFILE, ENOMEM), `DeviceError` with EINVAL (a kernel before 5.19), `ArgumentError` (slots out of
    range).
    """

    def __init__(self, slots: int) -> None:
        self._fd = -1
        require("slots", slots, 1, abi.IORING_MAX_REG_BUFFERS)
        self.slots = slots
        self._pid = os.getpid()
        self._sequence = 0
        self._released: deque[int] = deque()
        parameters = abi.Params()
        self._fd = checked(
            "io_uring_setup", syscall(abi.SYS_IO_URING_SETUP, _ENTRIES, ctypes.addressof(parameters))
        )
        try:
            self._map(parameters)
            checked(f"register a table of {slots} fixed buffers", register_sparse_table(self._fd, slots))
        except BaseException:
            self.close()
            raise

    def update(self, slot: int, address: int, length: int, tag: int = 0) -> None:
        """Pin `length` bytes (1 to 2^30) at `address` and make them fixed buffer `slot`, replacing what was
        there.

        With a non-zero `tag` (below 2^63) `released` reports that tag once this registration has been given
        up and no request uses it any more. Raises `DeviceError` with EFAULT (nothing mapped there, not
        writable, or file memory), `LimitError` (ENOMEM: RLIMIT_MEMLOCK is used up), `ArgumentError`,
        `ClosedError`, `ForkedError`.
        """
        require("address", address, 1, _U64)
        require("length", length, 1, abi.FIXED_BUFFER_MAX_BYTES)
        self._update(slot, address, length, tag)

    def clear(self, slot: int) -> None:
        """Give up what fixed buffer `slot` holds: its pages are unpinned as soon as no request uses them."""
        self._update(slot, 0, 0, 0)

    def read_fixed(self, fd: int, slot: int, address: int, length: int, offset: int) -> int:
        """Read up to `length` bytes of file `fd` from byte `offset` into fixed buffer `slot`; wait; return
        how many.

        `address` names the place as it was when the slot was registered; it must lie inside the slot. The
        kernel never looks at what is mapped there now. Raises `DeviceError` with EFAULT (slot empty, or the
        range is not inside it) or the errno of the read itself, `ArgumentError`, `ClosedError`,
        `ForkedError`.
        """
        self._require_live()
        require("slot", slot, 0, self.slots - 1)
        require("address", address, 0, _U64)
        require("length", length, 0, (1 << 32) - 1)
        require("offset", offset, 0, (1 << 63) - 1)
        require("fd", fd, 0, (1 << 31) - 1)
        self._sequence += 1
        wanted = _READ | self._sequence
        # From the head, not from the tail: an entry that Ctrl-C kept from being submitted is overwritten
        # here.
        head = self._sq_head.value
        entry = (head & self._sq_mask) * abi.SQE.size
        abi.SQE.pack_into(
            self._sqes,
            entry,
            abi.IORING_OP_READ_FIXED,
            0,
            0,
            fd,
            offset,
            address,
            length,
            0,
            wanted,
            slot,
            0,
            0,
            0,
            0,
        )
        self._sq_tail.value = head + 1
        checked("io_uring_enter", self._enter(1))
        while (result := self._reap(wanted)) is None:
            checked("io_uring_enter", self._enter(0))
        if result < 0:
            # Plain, not from_errno: EIO or EBUSY of a file says nothing about a monitor.
            raise DeviceError(-result, read_error(-result, fd, slot, address, length))
        return result

    def released(self) -> list[int]:
        """The tags of registrations given up since the last call: their memory is not pinned any more."""
        self._require_live()
        self._reap(None)
        tags = list(self._released)
        self._released.clear()
        return tags

    def fileno(self) -> int:
        """The ring's descriptor, for other io_uring calls. It stays the ring's own."""
        self._require_live()
        return self._fd

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Unpin everything and give the ring back. Closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if os.getpid() == self._pid:
            # By hand, because closing the descriptor unpins only later, in a kernel worker. No table: ENXIO,
            # ignored.
            syscall(abi.SYS_IO_URING_REGISTER, fd, abi.IORING_UNREGISTER_BUFFERS, 0, 0)
        # The words are views into the ring's memory, which cannot be unmapped under them.
        for name in ("_sq_head", "_sq_tail", "_cq_head", "_cq_tail"):
            self.__dict__.pop(name, None)
        for area in ("_ring", "_sqes"):
            if area in self.__dict__:
                self.__dict__.pop(area).close()
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._fd}"
        return f"<usermm.uring.Ring of {getattr(self, 'slots', 0)} slots, {state}>"

    def _map(self, parameters: abi.Params) -> None:
        """Map the two areas and find the queues' words in them."""
        sq, cq = parameters.sq_off, parameters.cq_off
        if not parameters.features & abi.IORING_FEAT_SINGLE_MMAP:
            raise from_errno(
                errno.EINVAL, "io_uring_setup: this kernel is older than 5.4; fixed buffers need Linux 5.19"
            )
        length = max(sq.array + 4 * parameters.sq_entries, cq.cqes + abi.CQE.size * parameters.cq_entries)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        try:
            self._ring = mmap.mmap(self._fd, length, flags=flags, offset=abi.IORING_OFF_SQ_RING)
            size = parameters.sq_entries * abi.SQE.size
            self._sqes = mmap.mmap(self._fd, size, flags=flags, offset=abi.IORING_OFF_SQES)
        except OSError as error:
            raise from_errno(error.errno or errno.ENOMEM, f"mmap of the io_uring: {error.strerror}") from None
        # ctypes stores a 32-bit word at once; struct would store byte by byte under the kernel's eyes. No
        # barriers: each word is handed over by a system call.
        self._sq_head = ctypes.c_uint32.from_buffer(self._ring, sq.head)
        self._sq_tail = ctypes.c_uint32.from_buffer(self._ring, sq.tail)
        self._cq_head = ctypes.c_uint32.from_buffer(self._ring, cq.head)
        self._cq_tail = ctypes.c_uint32.from_buffer(self._ring, cq.tail)
        self._sq_mask = parameters.sq_entries - 1
        self._cq_mask = parameters.cq_entries - 1
        self._cqes = cq.cqes
        for index in range(parameters.sq_entries):  # entry n of the queue is always entry n of the array
            ctypes.c_uint32.from_buffer(self._ring, sq.array + 4 * index).value = index

    def _update(self, slot: int, address: int, length: int, tag: int) -> None:
        self._require_live()
        require("slot", slot, 0, self.slots - 1)
        require("tag", tag, 0, _READ - 1)
        what = f"io_uring fixed buffer {slot} = {length} bytes at {address:#x}"
        checked(what, update_buffer(self._fd, slot, address, length, tag))
        self._reap(None)  # at most one tag each time, so that tags never fill the queue

    def _enter(self, submit: int) -> int:
        """Submit and wait for one completion; after a signal the caller looks and waits again."""
        result = syscall(abi.SYS_IO_URING_ENTER, self._fd, submit, 1, abi.IORING_ENTER_GETEVENTS, 0, 0)
        return 0 if result == -errno.EINTR else result

    def _reap(self, wanted: int | None) -> int | None:
        """Take all completions; return the result of the read `wanted`, None when it is not among them.

        A read that Ctrl-C took the caller from completes later: its completion is dropped here.
        """
        found = None
        while (head := self._cq_head.value) != self._cq_tail.value:
            entry = self._cqes + (head & self._cq_mask) * abi.CQE.size
            user_data, result, _ = abi.CQE.unpack_from(self._ring, entry)
            self._cq_head.value = head + 1
            if user_data == wanted:
                found = result
            elif not user_data & _READ:
                self._released.append(user_data)
        return found

    def _require_live(self) -> None:
        if self._fd < 0:
            raise ClosedError(errno.EBADF, "io_uring: the ring is closed; open a new usermm.uring.Ring")
        if os.getpid() != self._pid:
            raise ForkedError(
                errno.ECHILD, "io_uring: the ring belongs to the parent process; open one in the child"
            )
