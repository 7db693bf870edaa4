"""`usermm.uring.Ring` against the real kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator

import pytest

from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    DeviceError,
    ForkedError,
    UnavailableError,
)
from usermm.uapi import io_uring as abi
from usermm.uring import Ring

PAGE = mmap.PAGESIZE
LENGTH = 16 * PAGE


class Memory:
    """Private anonymous pages and their address."""

    def __init__(self, length: int = LENGTH) -> None:
        self.map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.length = length


def pinned_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPin:"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test gives back its descriptors and its pins."""
    before = len(os.listdir("/proc/self/fd")), pinned_bytes()  # autouse: before the other fixtures
    yield
    assert (len(os.listdir("/proc/self/fd")), pinned_bytes()) == before


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(8)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    with ring:
        yield ring


@pytest.fixture
def content() -> bytes:
    return os.urandom(2 * LENGTH)


@pytest.fixture
def fd(content: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def test_a_read_lands_in_the_registered_memory(ring: Ring, fd: int, content: bytes) -> None:
    memory = Memory()
    ring.update(3, memory.address, LENGTH)
    assert ring.read_fixed(fd, 3, memory.address, LENGTH, PAGE) == LENGTH
    assert memory.map[:] == content[PAGE : PAGE + LENGTH]


def test_a_read_can_fill_a_part_of_a_slot(ring: Ring, fd: int, content: bytes) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    assert ring.read_fixed(fd, 0, memory.address + 100, 50, 7) == 50
    assert memory.map[:] == bytes(100) + content[7:57] + bytes(LENGTH - 150)


def test_a_read_at_the_end_of_the_file_is_short(ring: Ring, fd: int, content: bytes) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    assert ring.read_fixed(fd, 0, memory.address, LENGTH, len(content) - 10) == 10
    assert ring.read_fixed(fd, 0, memory.address, LENGTH, len(content)) == 0


def test_registered_pages_are_pinned_until_the_slot_changes(ring: Ring) -> None:
    memory, smaller = Memory(), Memory(PAGE)
    ring.update(0, memory.address, LENGTH)
    assert pinned_bytes() == LENGTH
    ring.update(0, smaller.address, PAGE)
    assert pinned_bytes() == PAGE
    ring.clear(0)
    assert pinned_bytes() == 0


def test_the_hazard_itself(ring: Ring, fd: int, content: bytes) -> None:
    """Memory is unmapped and the address used again: the read succeeds and the new memory does not change."""
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    address = memory.address
    memory.map.close()
    assert pinned_bytes() == LENGTH
    again = Memory()
    if again.address != address:
        pytest.skip("the kernel gave another address")
    assert ring.read_fixed(fd, 0, address, LENGTH, 0) == LENGTH
    assert again.map[:] == bytes(LENGTH) != content[:LENGTH]


def test_a_tag_is_reported_when_its_registration_is_given_up(ring: Ring) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH, tag=71)
    assert ring.released() == []
    ring.update(0, memory.address, LENGTH, tag=72)
    assert ring.released() == [71]
    ring.clear(0)
    assert ring.released() == [72]
    assert ring.released() == []


def test_more_tags_than_the_completion_queue_holds(ring: Ring, fd: int) -> None:
    memory = Memory()
    for tag in range(1, 101):
        ring.update(0, memory.address, LENGTH, tag=tag)
    assert ring.read_fixed(fd, 0, memory.address, LENGTH, 0) == LENGTH
    assert ring.released() == list(range(1, 100))


def test_an_empty_slot_and_a_range_outside_a_slot_are_refused(ring: Ring, fd: int) -> None:
    memory = Memory()
    with pytest.raises(DeviceError, match=r"slot 5 .*update\(5, \.\.\.\) first") as caught:
        ring.read_fixed(fd, 5, memory.address, PAGE, 0)
    assert caught.value.errno == errno.EFAULT
    ring.update(5, memory.address, LENGTH)
    start, end = memory.address, memory.address + LENGTH
    for address, length in ((start, LENGTH + 1), (start - 1, 1), (end, 1)):
        with pytest.raises(DeviceError) as caught:
            ring.read_fixed(fd, 5, address, length, 0)
        assert caught.value.errno == errno.EFAULT
    assert memory.map[:] == bytes(LENGTH)


def test_memory_that_cannot_be_registered_leaves_the_slot_alone(ring: Ring, fd: int, content: bytes) -> None:
    memory, gone = Memory(), Memory()
    ring.update(1, memory.address, LENGTH)
    gone.map.close()
    with mmap.mmap(fd, LENGTH) as shared:
        of_a_file = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        for address in (gone.address, 1 << 62, of_a_file):
            with pytest.raises(DeviceError, match="mapped, writable, and not a mapping of a file") as caught:
                ring.update(1, address, LENGTH)
            assert caught.value.errno == errno.EFAULT
    assert ring.read_fixed(fd, 1, memory.address, LENGTH, 0) == LENGTH
    assert memory.map[:] == content[:LENGTH]


def test_values_out_of_range_never_reach_the_kernel(ring: Ring, fd: int) -> None:
    memory = Memory()
    for slot in (-1, 8):
        with pytest.raises(ArgumentError, match="slot is"):
            ring.update(slot, memory.address, LENGTH)
        with pytest.raises(ArgumentError, match="slot is"):
            ring.clear(slot)
        with pytest.raises(ArgumentError, match="slot is"):
            ring.read_fixed(fd, slot, memory.address, LENGTH, 0)
    too_long = (memory.address, (1 << 30) + 1)
    for address, length in ((0, 1), (1 << 64, 1), (memory.address, 0), too_long):
        with pytest.raises(ArgumentError):
            ring.update(0, address, length)
    for tag in (-1, 1 << 63):
        with pytest.raises(ArgumentError, match="tag is"):
            ring.update(0, memory.address, LENGTH, tag=tag)
    for bad_fd, length, offset in ((-1, 1, 0), (fd, 1 << 32, 0), (fd, 1, -1)):
        with pytest.raises(ArgumentError):
            ring.read_fixed(bad_fd, 0, memory.address, length, offset)
    with pytest.raises(ArgumentTypeError, match="slot must be an integer, not str"):
        ring.clear("0")  # type: ignore[arg-type]
    for slots in (0, abi.IORING_MAX_REG_BUFFERS + 1):
        with pytest.raises(ArgumentError, match="slots is"):
            Ring(slots)


def test_errors_of_the_read_itself_are_reported(ring: Ring) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    closed = os.open("/", os.O_RDONLY)
    os.close(closed)
    with pytest.raises(DeviceError, match=f"READ_FIXED of descriptor {closed}") as caught:
        ring.read_fixed(closed, 0, memory.address, PAGE, 0)
    assert caught.value.errno == errno.EBADF
    directory = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(DeviceError) as caught:
            ring.read_fixed(directory, 0, memory.address, PAGE, 0)
        assert caught.value.errno in (errno.EISDIR, errno.EINVAL, errno.EOPNOTSUPP)
    finally:
        os.close(directory)


def test_a_closed_ring_says_so(ring: Ring, fd: int) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    ring.close()
    assert ring.closed
    assert pinned_bytes() == 0
    ring.close()
    for call in (
        lambda: ring.update(0, memory.address, LENGTH),
        lambda: ring.clear(0),
        lambda: ring.read_fixed(fd, 0, memory.address, LENGTH, 0),
        ring.released,
        ring.fileno,
    ):
        with pytest.raises(ClosedError, match="the ring is closed"):
            call()
    assert "closed" in repr(ring)


def test_a_forgotten_ring_warns_and_closes_itself() -> None:
    ring = Ring(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ring
    assert [warning.category for warning in caught] == [ResourceWarning]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # 3.12: the monitor's thread
def test_a_forked_child_is_refused_and_disturbs_nobody(ring: Ring, fd: int, content: bytes) -> None:
    memory = Memory()
    ring.update(0, memory.address, LENGTH)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ring.clear(0)
        except ForkedError:
            ring.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ring.read_fixed(fd, 0, memory.address, LENGTH, 0) == LENGTH
    assert memory.map[:] == content[:LENGTH]


def test_a_read_that_a_signal_ended_does_not_answer_the_next_one(ring: Ring, fd: int, content: bytes) -> None:
    """As Ctrl-C does: the handler raises while the read of an empty pipe waits; the pipe is filled later."""
    memory, other = Memory(), Memory()
    ring.update(0, memory.address, LENGTH)
    ring.update(1, other.address, LENGTH)

    def handler(_number: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, handler)
    reader, writer = os.pipe()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError):
            ring.read_fixed(reader, 0, memory.address, PAGE, 0)
        os.write(writer, b"late")
        assert ring.read_fixed(fd, 1, other.address, LENGTH, 0) == LENGTH
        assert other.map[:] == content[:LENGTH]
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(reader)
        os.close(writer)
