"""The part of <linux/io_uring.h> that fixed buffers need: numbers and layouts, no behaviour.

Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2). "Since" says which kernel brought what.
"""

from __future__ import annotations

import ctypes
import struct

# System calls: the same numbers on every 64-bit architecture but mips and alpha, which add their own base.
SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426
SYS_IO_URING_REGISTER = 427

# Offsets at which mmap(2) of the ring descriptor finds its two areas. Since 5.4 (IORING_FEAT_SINGLE_MMAP) the
# first one holds both queues.
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000

IORING_FEAT_SINGLE_MMAP = 1 << 0

IORING_ENTER_GETEVENTS = 1 << 0

IORING_SETUP_SINGLE_ISSUER = 1 << 12  # since 6.0: one thread alone may enter or change the ring

# io_uring_register(2) operations.
IORING_UNREGISTER_BUFFERS = 1
IORING_REGISTER_BUFFERS2 = 15  # since 5.13
IORING_REGISTER_BUFFERS_UPDATE = 16  # since 5.13

IORING_RSRC_REGISTER_SPARSE = 1 << 0  # since 5.19: every slot starts empty

IORING_MAX_REG_BUFFERS = 1 << 14  # slots in one table, since 5.13
FIXED_BUFFER_MAX_BYTES = 1 << 30  # one slot

IORING_OP_READ_FIXED = 4

# struct io_uring_sqe, 64 bytes: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, buf_index,
# personality, file_index, addr3, pad.
SQE = struct.Struct("=BBHiQQIIQHHIQQ")

# struct io_uring_cqe, 16 bytes: user_data, res (a negative errno, or what the operation returns), flags.
CQE = struct.Struct("=QiI")

# struct io_uring_rsrc_register, 32 bytes: nr, flags, resv2, data, tags.
RSRC_REGISTER = struct.Struct("=IIQQQ")

# struct io_uring_rsrc_update2, 32 bytes: offset (the first slot), resv, data (struct iovec[nr]), tags
# (u64[nr]), nr, resv2.
RSRC_UPDATE2 = struct.Struct("=IIQQII")

# struct iovec of a 64-bit process: base, length in bytes.
IOVEC = struct.Struct("=QQ")


class SqringOffsets(ctypes.Structure):
    """struct io_sqring_offsets: where in the first area the submission queue keeps its words (bytes)."""

    _fields_ = (
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dropped", ctypes.c_uint32),
        ("array", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("user_addr", ctypes.c_uint64),
    )


class CqringOffsets(ctypes.Structure):
    """struct io_cqring_offsets: the same for the completion queue."""

    _fields_ = (
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("overflow", ctypes.c_uint32),
        ("cqes", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("user_addr", ctypes.c_uint64),
    )


class Params(ctypes.Structure):
    """struct io_uring_params, 120 bytes: in the wishes, out what the kernel gave."""

    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", SqringOffsets),
        ("cq_off", CqringOffsets),
    )
