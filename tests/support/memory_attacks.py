"""What a process may try to write to pages that it was given only to read. Each returns how that ended."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable

from support.attackers import DONE, PAGE_BYTES, outcome
from support.processes import in_child
from support.rings import ForeignRing
from usermm._uring_calls import checked, syscall
from usermm.uapi import io_uring as ring_abi

TEXT = b"overwritten"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value
_READ, _WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_AT_EMPTY_PATH = 0x1000
_PTRACE_ATTACH = 16
_SYS_USERFAULTFD, _SYS_PIDFD_GETFD, _SYS_PKEY_MPROTECT = 323, 438, 329
_MADV_REMOVE = 9
_CLONE_NEWUSER = 0x10000000
_FS_IOC_SETFLAGS, _FS_IMMUTABLE = 0x40086602, 0x10
_OP_READ, _OP_WRITE = 22, 23  # linux/io_uring.h
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00  # linux/userfaultfd.h


def libc(name: str, *arguments: object) -> int:
    """A call of the C library; OSError where it says -1."""
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def mapped(descriptor: int, prot: int, flags: int, length: int = PAGE_BYTES) -> int:
    """The address. Raises OSError."""
    address: int = _libc.mmap(None, ctypes.c_size_t(length), prot, flags, descriptor, ctypes.c_long(0))
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def protect(address: int, prot: int) -> int:
    """mprotect(2) of one page."""
    return libc("mprotect", ctypes.c_void_p(address), ctypes.c_size_t(PAGE_BYTES), prot)


def _shared(descriptor: int) -> int:
    return mapped(descriptor, _READ, mmap.MAP_SHARED)


def _private(descriptor: int) -> int:
    return mapped(descriptor, _READ, mmap.MAP_PRIVATE)


# By mapping


def map_it_writable(descriptor: int) -> str:
    def attempt() -> None:
        ctypes.memmove(mapped(descriptor, _READ | _WRITE, mmap.MAP_SHARED), TEXT, len(TEXT))

    return outcome(attempt)


def make_a_shared_mapping_writable(descriptor: int) -> str:
    address = _shared(descriptor)
    found = outcome(protect, address, _READ | _WRITE)
    if found == DONE:
        ctypes.memmove(address, TEXT, len(TEXT))
    return found


def make_a_shared_mapping_writable_by_key(descriptor: int) -> str:
    pages = ctypes.c_void_p(_shared(descriptor)), ctypes.c_size_t(PAGE_BYTES)
    return outcome(libc, "syscall", _SYS_PKEY_MPROTECT, *pages, _READ | _WRITE, -1)


def make_a_private_mapping_writable(descriptor: int) -> str:
    """This works, and what is written is the writer's own copy."""
    address = _private(descriptor)
    protect(address, _READ | _WRITE)
    ctypes.memmove(address, TEXT, len(TEXT))
    assert ctypes.string_at(address, len(TEXT)) == TEXT
    return DONE


def rearrange_its_mapping(descriptor: int) -> str:
    """remap_file_pages(2) takes no file that is open to read only."""
    size, none = ctypes.c_size_t(PAGE_BYTES), ctypes.c_size_t(0)
    return outcome(libc, "remap_file_pages", ctypes.c_void_p(_shared(descriptor)), size, 0, none, 0)


def map_it_again_writable_from_the_mapping(descriptor: int) -> str:
    """mremap(2) of length 0 makes a second mapping of a shared one."""
    address = ctypes.c_void_p(_shared(descriptor))
    _libc.mremap.restype = ctypes.c_void_p
    second = _libc.mremap(address, ctypes.c_size_t(0), ctypes.c_size_t(PAGE_BYTES), 1)
    return outcome(protect, second, _READ | _WRITE)


def punch_through_the_mapping(descriptor: int) -> str:
    return outcome(
        libc, "madvise", ctypes.c_void_p(_shared(descriptor)), ctypes.c_size_t(PAGE_BYTES), _MADV_REMOVE
    )


def write_own_memory_file(descriptor: int) -> str:
    """/proc/self/mem writes through a mapping's protection, but not through a shared file's."""
    return _write_memory_of(os.getpid(), _shared(descriptor))


def write_own_memory_file_privately(descriptor: int) -> str:
    """This works, and what is written is the writer's own copy."""
    return _write_memory_of(os.getpid(), _private(descriptor))


def read_a_file_into_it(descriptor: int) -> str:
    with open("/dev/zero", "rb") as zero:
        address = ctypes.c_void_p(_shared(descriptor))
        return outcome(libc, "read", zero.fileno(), address, ctypes.c_size_t(PAGE_BYTES))


def fill_it_by_userfaultfd(descriptor: int) -> str:
    """A shared mapping that cannot be written cannot be registered either."""
    monitor = libc("syscall", _SYS_USERFAULTFD, os.O_CLOEXEC | 1)  # UFFD_USER_MODE_ONLY
    try:
        fcntl.ioctl(monitor, _UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
        argument = bytearray(struct.pack("=QQQQ", _shared(descriptor), PAGE_BYTES, 1, 0))
        return outcome(fcntl.ioctl, monitor, _UFFDIO_REGISTER, argument)
    finally:
        os.close(monitor)


# By the descriptor


def write_it(descriptor: int) -> str:
    return outcome(os.pwrite, descriptor, TEXT, 0)


def write_it_after_setting_flags(descriptor: int) -> str:
    """F_SETFL does not change how a file is open, and does not say so."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK)
    return write_it(descriptor)


def truncate_it(descriptor: int) -> str:
    return outcome(os.ftruncate, descriptor, 0)


def punch_a_hole(descriptor: int) -> str:
    start, length = ctypes.c_int64(0), ctypes.c_int64(PAGE_BYTES)
    return outcome(libc, "fallocate", descriptor, 3, start, length)


def seal_it(descriptor: int) -> str:
    return outcome(fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def send_a_file_into_it(descriptor: int) -> str:
    with open("/etc/passwd", "rb") as file:
        return outcome(os.sendfile, descriptor, file.fileno(), 0, 16)


def splice_into_it(descriptor: int) -> str:
    reader, writer = os.pipe()
    try:
        os.write(writer, TEXT)
        return outcome(os.splice, reader, descriptor, len(TEXT))
    finally:
        os.close(reader)
        os.close(writer)


def write_to_its_page_in_a_pipe(descriptor: int) -> str:
    """splice(2) puts the very page into the pipe; what is written after it must not go into the page."""
    reader, writer = os.pipe()
    try:
        os.splice(descriptor, writer, 8, offset_src=0)
        os.write(writer, TEXT)
        return DONE
    finally:
        os.close(reader)
        os.close(writer)


def gift_its_page_to_a_pipe(descriptor: int) -> str:
    """vmsplice(2) with SPLICE_F_GIFT, and splice(2) with SPLICE_F_MOVE from the pipe into a file of one's own."""
    reader, writer = os.pipe()
    own = os.memfd_create("own")
    try:
        vector = (ctypes.c_uint64 * 2)(_shared(descriptor), PAGE_BYTES)
        libc("vmsplice", writer, vector, ctypes.c_size_t(1), 8)
        libc("splice", reader, None, own, None, ctypes.c_size_t(PAGE_BYTES), 1)
        os.pwrite(own, TEXT, 0)
        return DONE
    finally:
        for each in (reader, writer, own):
            os.close(each)


def copy_a_range_into_it(descriptor: int) -> str:
    own = os.memfd_create("own")
    try:
        os.write(own, TEXT)
        return outcome(os.copy_file_range, own, descriptor, len(TEXT), 0, 0)
    finally:
        os.close(own)


def write_it_by_io_uring(descriptor: int) -> str:
    text = ctypes.create_string_buffer(TEXT)
    return _by_ring(_OP_WRITE, descriptor, ctypes.addressof(text), len(TEXT))


def read_into_it_by_io_uring(descriptor: int) -> str:
    with open("/dev/zero", "rb") as zero:
        return _by_ring(_OP_READ, zero.fileno(), _shared(descriptor), PAGE_BYTES)


def _by_ring(operation: int, descriptor: int, address: int, length: int) -> str:
    try:
        ring = ForeignRing()
    except OSError as error:
        return outcome(_raise, error)
    ring_abi.SQE.pack_into(ring.entries, 0, operation, 0, 0, descriptor, 0, address, length, 0, 7, 0, 0, 0, 0, 0)
    ring._word(ring.sq.array).value = 0
    ring._word(ring.sq.tail).value += 1
    checked("enter", syscall(ring_abi.SYS_IO_URING_ENTER, ring.ring_fd, 1, 0, 0, 0, 0))
    ((_, result),) = ring.wait(1)
    return DONE if result >= 0 else outcome(_raise, OSError(-result, ""))


def _raise(error: OSError) -> None:
    raise error


# By opening it anew


def reopen_it(descriptor: int) -> str:
    return _reopen(f"/proc/self/fd/{descriptor}")


def reopen_it_to_read(descriptor: int) -> str:
    """A second open file would not have the lock that tells who holds it."""
    return outcome(os.open, f"/proc/self/fd/{descriptor}", os.O_RDONLY)


def reopen_it_by_its_mapping(descriptor: int) -> str:
    address = _shared(descriptor)
    return _reopen(f"/proc/self/map_files/{address:x}-{address + PAGE_BYTES:x}")


def reopen_it_by_a_handle(descriptor: int) -> str:
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128), 136)
    mount = ctypes.c_int()
    libc("name_to_handle_at", descriptor, b"", handle, ctypes.byref(mount), _AT_EMPTY_PATH)
    return outcome(libc, "open_by_handle_at", descriptor, handle, os.O_RDWR)


def reopen_it_in_a_user_namespace(descriptor: int) -> str:
    """As its root, who may do everything to whatever belongs to users of the namespace."""

    def attempt() -> str:
        uid = os.getuid()
        libc("unshare", _CLONE_NEWUSER)
        with open("/proc/self/uid_map", "w", encoding="utf-8") as file:
            file.write(f"0 {uid} 1")
        assert os.getuid() == 0
        return reopen_it(descriptor)

    return str(in_child(attempt))


def reopen_it_after_changing_its_mode(descriptor: int) -> str:
    return outcome(os.chmod, f"/proc/self/fd/{descriptor}", 0o666) + "," + outcome(os.fchmod, descriptor, 0o666)


def take_it_into_possession(descriptor: int) -> str:
    return outcome(os.fchown, descriptor, os.getuid(), -1)


def _reopen(path: str) -> str:
    def attempt() -> None:
        opened = os.open(path, os.O_RDWR)
        try:
            os.pwrite(opened, TEXT, 0)
        finally:
            os.close(opened)

    return outcome(attempt)


def set_its_attributes(descriptor: int) -> str:
    """Immutable, extended attributes, times, a lease: each would be seen by the others."""
    flags = bytearray(struct.pack("=l", _FS_IMMUTABLE))
    tried: dict[str, Callable[[], object]] = {
        "flags": lambda: fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags),
        "xattr": lambda: os.setxattr(descriptor, "user.x", b"1"),
        "times": lambda: os.utime(descriptor),
        "lease": lambda: fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    }
    worked = [name for name, attempt in tried.items() if outcome(attempt) == DONE]
    return ",".join(worked) or "refused"


def in_a_forked_child(descriptor: int) -> str:
    """The child has the same descriptor and no more rights."""

    def attempt() -> str:
        return ",".join([map_it_writable(descriptor), reopen_it(descriptor), write_it(descriptor)])

    return str(in_child(attempt))


# By the process that may write


def _write_memory_of(pid: int, address: int) -> str:
    def attempt() -> None:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(TEXT)

    return outcome(attempt)


def write_by_its_memory_file(pid: int, address: int, _: int) -> str:
    return _write_memory_of(pid, address)


def write_by_process_vm_writev(pid: int, address: int, _: int) -> str:
    text = ctypes.create_string_buffer(TEXT)
    mine = (ctypes.c_uint64 * 2)(ctypes.addressof(text), len(TEXT))
    theirs = (ctypes.c_uint64 * 2)(address, len(TEXT))
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    return outcome(libc, "process_vm_writev", pid, mine, one, theirs, one, none)


def trace_it(pid: int, _: int, __: int) -> str:
    def attempt() -> None:
        libc("ptrace", _PTRACE_ATTACH, pid, None, None)
        os.waitpid(pid, 0)
        libc("ptrace", 17, pid, None, None)  # PTRACE_DETACH

    return outcome(attempt)


def take_its_descriptor(pid: int, _: int, descriptor: int) -> str:
    pidfd = os.pidfd_open(pid)
    try:
        return outcome(lambda: os.close(libc("syscall", _SYS_PIDFD_GETFD, pidfd, descriptor, 0)))
    finally:
        os.close(pidfd)


def open_its_descriptor(pid: int, _: int, descriptor: int) -> str:
    return _reopen(f"/proc/{pid}/fd/{descriptor}")


def open_its_mapping(pid: int, address: int, _: int) -> str:
    return _reopen(f"/proc/{pid}/map_files/{address:x}-{address + PAGE_BYTES:x}")
