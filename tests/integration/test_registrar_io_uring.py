"""`usermm.registrars.IoUring` against the real kernel: pins, slots, tags, and requests that are still under way."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.calls import refused_line
from support.pins import PAGE, Memory, settles_at, status_bytes, unprivileged
from support.processes import in_child
from support.rings import ForeignRing

from usermm._uring_calls import syscall
from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    DeviceError,
    ForkedError,
    LimitError,
    UnavailableError,
    WouldBlockError,
)
from usermm.registrars import IoUring, Overlap
from usermm.registrars import io_uring as module
from usermm.uapi import io_uring as abi
from usermm.uring import Ring

LENGTH = 4 * PAGE


@pytest.fixture(autouse=True)
def nothing_stays_pinned() -> Iterator[None]:
    try:
        Ring(1).close()
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    before = status_bytes("VmPin")
    yield
    assert settles_at("VmPin", before)


@pytest.fixture
def ring() -> Iterator[Ring]:
    with Ring(4) as ring:
        yield ring


@pytest.fixture
def foreign() -> Iterator[ForeignRing]:
    with ForeignRing() as ring:
        yield ring


@pytest.fixture
def content() -> bytes:
    return os.urandom(8 * PAGE)


@pytest.fixture
def file(content: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.fileno()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading end keeps a request under way for as long as the test likes."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read(ring: Ring, fd: int, part: module.SqeFields, offset: int) -> int:
    return ring.read_fixed(fd, part.buf_index, part.addr, part.len, offset)


def hand_over(foreign: ForeignRing, registrar: IoUring, count: int = 0) -> list[tuple[int, int]]:
    """One turn of a completion loop; returns the completions that are not the registrar's."""
    return [pair for pair in foreign.wait(count) if not registrar.completed(pair[0])]


# Pins, slots, data


def test_pages_are_pinned_from_register_to_deregister(ring: Ring) -> None:
    registrar, memory = IoUring(ring), Memory(LENGTH)
    before = status_bytes("VmPin")
    handle = registrar.register(memory.address, LENGTH)
    assert status_bytes("VmPin") == before + LENGTH
    registrar.deregister(handle)
    assert status_bytes("VmPin") == before


def test_data_arrives_in_the_slot_that_the_handle_names(ring: Ring, file: int, content: bytes) -> None:
    registrar, one, two = IoUring(ring), Memory(LENGTH), Memory(LENGTH)
    first, second = (registrar.register(memory.address, LENGTH) for memory in (one, two))
    assert read(ring, file, second.part(), 0) == LENGTH
    assert read(ring, file, first.part(one.address + 100, 50), LENGTH) == 50
    assert two.map[:] == content[:LENGTH]
    assert one.map[:] == bytes(100) + content[LENGTH : LENGTH + 50] + bytes(LENGTH - 150)


def test_overlapping_registrations_are_independent(ring: Ring, file: int, content: bytes) -> None:
    registrar, memory = IoUring(ring), Memory(LENGTH)
    whole = registrar.register(memory.address, LENGTH)
    part = registrar.register(memory.address + PAGE, PAGE)
    registrar.deregister(whole)
    assert read(ring, file, part.part(), 0) == PAGE
    assert memory.map[PAGE : 2 * PAGE] == content[:PAGE]


def test_a_part_is_inside_the_buffer() -> None:
    buffer = module.FixedBuffer(slot=3, address=1000, length=100, tag=1)
    assert buffer.part() == (3, 1000, 100)
    assert buffer.part(1010) == (3, 1010, 90)
    assert buffer.part(length=10) == (3, 1000, 10)
    assert buffer.part(1100) == (3, 1100, 0)
    for address, length in ((999, 1), (1101, 0), (1000, 101), (1099, 2), (1000, -1)):
        assert "it must be from" in refused_line(lambda a=address, n=length: buffer.part(a, n), ArgumentError)
    assert "not str" in refused_line(lambda: buffer.part("x"), ArgumentTypeError)  # type: ignore[arg-type]


def test_what_it_says_of_itself(ring: Ring) -> None:
    traits = IoUring(ring).traits
    assert (traits.overlap, traits.granularity_bytes, traits.max_length_bytes) == (Overlap.ALLOWED, 1, 1 << 30)
    assert (traits.writes, traits.any_thread) == (True, True)
    assert not IoUring(ring, any_thread=False).traits.any_thread


def test_slots_are_used_again_and_run_out(ring: Ring) -> None:
    registrar, memory = IoUring(ring), Memory(LENGTH)
    handles = [registrar.register(memory.address, LENGTH) for _ in range(4)]
    assert sorted(handle.slot for handle in handles) == [0, 1, 2, 3]
    line = refused_line(lambda: registrar.register(memory.address, LENGTH), LimitError, errno.ENOSPC)
    assert "none of 4 slots is free" in line
    registrar.deregister(handles[2])
    assert registrar.register(memory.address, LENGTH).slot == 2


def test_the_slot_that_was_free_longest_is_used_first(ring: Ring) -> None:
    """So a handle that is kept too long names an empty slot, and a read into it fails, for as long as possible."""
    registrar, memory = IoUring(ring), Memory()
    slots = []
    for _ in range(8):
        handle = registrar.register(memory.address, PAGE)
        slots.append(handle.slot)
        registrar.deregister(handle)
    assert slots == [0, 1, 2, 3, 0, 1, 2, 3]


def test_more_tags_than_the_completion_queue_holds() -> None:
    memory = Memory()
    with Ring(200) as ring:
        registrar = IoUring(ring)
        for _ in range(3):
            handles = [registrar.register(memory.address, PAGE) for _ in range(200)]
            for handle in handles:
                registrar.deregister(handle)
        assert registrar.waiting


# Requests under way


def test_a_slot_waits_for_the_requests_on_what_it_held(foreign: ForeignRing, pipe: tuple[int, int]) -> None:
    registrar, old, new = IoUring(foreign, 1), Memory(), Memory()
    before = status_bytes("VmPin")
    handle = registrar.register(old.address, PAGE)
    foreign.read_fixed(pipe[0], handle.part(), user_data=5)
    registrar.deregister(handle)
    assert hand_over(foreign, registrar) == []
    assert status_bytes("VmPin") == before + PAGE, "the request needs the pages"
    assert registrar.waiting == 1
    line = refused_line(lambda: registrar.register(new.address, PAGE), WouldBlockError, errno.EAGAIN)
    assert "hand your loop's completions to completed()" in line
    os.write(pipe[1], b"late")
    assert hand_over(foreign, registrar, 2) == [(5, 4)]
    assert (old.map[:4], status_bytes("VmPin"), registrar.waiting) == (b"late", before, 0)
    assert registrar.register(new.address, PAGE).slot == 0


def test_without_waiting_old_requests_keep_their_buffer(foreign: ForeignRing, pipe: tuple[int, int]) -> None:
    registrar, old, new = IoUring(foreign, 1, wait_for_release=False), Memory(), Memory()
    handle = registrar.register(old.address, PAGE)
    foreign.read_fixed(pipe[0], handle.part(), user_data=5)
    registrar.deregister(handle)
    again = registrar.register(new.address, PAGE)
    assert (again.slot, registrar.waiting) == (0, 0)
    os.write(pipe[1], b"late")
    assert foreign.wait(1) == [(5, 4)], "no tags"
    assert (old.map[:4], new.map[:4]) == (b"late", bytes(4))


def test_a_ring_of_ours_is_asked_for_its_tags(ring: Ring, pipe: tuple[int, int], file: int) -> None:
    """A read that a signal took the caller from is still under way: its slot is the one that stays away."""
    registrar, memory = IoUring(ring, 2), Memory()
    stuck, other = registrar.register(memory.address, PAGE), registrar.register(memory.address, PAGE)

    def handler(_number: int, _frame: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError):
            read(ring, pipe[0], stuck.part(), 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    registrar.deregister(stuck)
    registrar.deregister(other)
    again = registrar.register(memory.address, PAGE)
    assert again.slot == other.slot
    refused_line(lambda: registrar.register(memory.address, PAGE), LimitError, errno.ENOSPC)
    os.write(pipe[1], b"late")
    assert read(ring, file, again.part(), 0) == PAGE
    assert registrar.register(memory.address, PAGE).slot == stuck.slot


# Tags


def test_completions_of_others_are_not_the_registrars(foreign: ForeignRing) -> None:
    registrar, memory = IoUring(foreign, 2), Memory()
    handle = registrar.register(memory.address, PAGE)
    strangers = (0, 1, memory.address, (1 << 64) - 1, -1, handle.tag + 1, handle.tag ^ 1 << 50, handle.tag)
    assert not any(registrar.completed(user_data) for user_data in strangers)
    registrar.deregister(handle)
    (pair,) = foreign.wait(1)
    assert pair == (handle.tag, 0)
    assert [registrar.completed(handle.tag), registrar.completed(handle.tag)] == [True, False]


def test_tags_are_unique_and_fit_the_rings(ring: Ring, foreign: ForeignRing) -> None:
    registrars, memory = [IoUring(ring), IoUring(foreign, 4)], Memory()
    tags = {registrar.register(memory.address, PAGE).tag for registrar in registrars for _ in range(4)}
    assert len(tags) == 8
    assert all(1 << 56 < tag < 1 << 63 for tag in tags), "no pointers, no small numbers, no reads of usermm.uring"


def test_registrars_that_share_a_ring_share_its_tags(ring: Ring) -> None:
    one, two, memory = IoUring(ring, range(2)), IoUring(ring, range(2, 3)), Memory()
    ring.update(3, memory.address, PAGE, tag=77)
    ring.clear(3)
    for _ in range(5):
        for handle in [one.register(memory.address, PAGE), two.register(memory.address, PAGE)]:
            (one if handle.slot < 2 else two).deregister(handle)
    assert [*one.unclaimed, *two.unclaimed] == [77], "a tag of the ring's user is kept for him"


# Rings and tables


def test_a_ring_is_named_in_three_ways() -> None:
    memory = Memory()
    for name in (lambda ring: ring, lambda ring: ring.ring_fd, lambda ring: os.fdopen(ring.ring_fd, closefd=False)):
        with ForeignRing() as foreign:
            registrar = IoUring(name(foreign), 2)
            handle = registrar.register(memory.address, PAGE)
            registrar.deregister(handle)
            assert hand_over(foreign, registrar, 1) == []


def test_a_table_that_is_there_is_used_only_where_it_is_ours(foreign: ForeignRing) -> None:
    first = IoUring(foreign, 5)
    assert first.slots == range(5)
    del first
    line = refused_line(lambda: IoUring(foreign), ArgumentError)
    assert "slots=range(first, end)" in line
    registrar, memory = IoUring(foreign, range(2, 5, 2)), Memory()
    assert {registrar.register(memory.address, PAGE).slot for _ in range(2)} == {2, 4}
    refused_line(lambda: registrar.register(memory.address, PAGE), LimitError, errno.ENOSPC)
    for slots in (range(3, 6), range(0), range(-1, 2), range(4, 1, -1)):
        assert "the table has slots 0 to 4" in refused_line(lambda s=slots: IoUring(foreign, s), ArgumentError)


def test_a_table_of_our_ring_is_used_from_its_start(ring: Ring) -> None:
    assert IoUring(ring).slots == range(4)
    assert IoUring(ring, 3).slots == range(3)
    assert "slots 0 to 3" in refused_line(lambda: IoUring(ring, 5), ArgumentError)


def test_a_slot_belongs_to_one_registrar(ring: Ring) -> None:
    registrar = IoUring(ring, range(2))
    assert "another registrar's" in refused_line(lambda: IoUring(ring), ArgumentError)
    assert "another registrar's" in refused_line(lambda: IoUring(ring.fileno(), range(1, 3)), ArgumentError)
    IoUring(ring, range(2, 4))
    del registrar
    IoUring(ring)


def test_any_size_of_table_is_found_out() -> None:
    for slots in (1, 2, 3, 1000, 16383, 16384):
        with ForeignRing() as foreign:
            assert IoUring(foreign, slots).slots == range(slots)
            assert IoUring(foreign, range(slots)).slots == range(slots)
            line = refused_line(lambda ring=foreign, n=slots: IoUring(ring, range(n + 1)), ArgumentError)
            assert f"the table has slots 0 to {slots - 1}" in line


def test_what_is_no_ring_is_refused(pipe: tuple[int, int]) -> None:
    assert "is not an io_uring" in refused_line(lambda: IoUring(pipe[0]), ArgumentError)
    assert "not str" in refused_line(lambda: IoUring("ring"), ArgumentTypeError)  # type: ignore[arg-type]
    assert "descriptor is -1" in refused_line(lambda: IoUring(-1), ArgumentError)
    refused_line(lambda: IoUring(1 << 31), ArgumentError)
    assert "is not an io_uring" in refused_line(lambda: IoUring(pipe[0], range(4)), ArgumentError)
    with ForeignRing() as foreign:
        for slots in (0, -1, 16385):
            assert "slots is" in refused_line(lambda s=slots: IoUring(foreign, s), ArgumentError)
        refused_line(lambda: IoUring(foreign, "4"), ArgumentTypeError)  # type: ignore[arg-type]
        assert "no table" in refused_line(lambda: IoUring(foreign, range(4)), DeviceError, errno.ENXIO)
    assert "is closed" in refused_line(lambda: IoUring(foreign), ClosedError)


# Bad input


def test_bad_ranges_leave_the_slot_free(ring: Ring, file: int) -> None:
    registrar, memory = IoUring(ring, 1), Memory()
    for address, length in ((0, 1), (-1, 1), (memory.address, 0), (memory.address, (1 << 30) + 1), ((1 << 64) - 1, 2)):
        refused_line(lambda a=address, n=length: registrar.register(a, n), ArgumentError)
    refused_line(lambda: registrar.register("x", 1), ArgumentTypeError)  # type: ignore[arg-type]
    refused_line(lambda: registrar.register(memory.address, 1.5), ArgumentTypeError)  # type: ignore[arg-type]
    gone = Memory()
    gone.map.close()
    line = refused_line(lambda: registrar.register(gone.address, PAGE), DeviceError, errno.EFAULT)
    assert "mapped, writable" in line
    handle = registrar.register(memory.address, PAGE)
    assert read(ring, file, handle.part(), 0) == PAGE


def test_a_handle_is_taken_once(ring: Ring) -> None:
    registrar, memory = IoUring(ring, range(2)), Memory()
    handle, kept = registrar.register(memory.address, PAGE), registrar.register(memory.address, PAGE)
    registrar.deregister(handle)
    pinned = status_bytes("VmPin")
    assert "(any more)" in refused_line(lambda: registrar.deregister(handle), ArgumentError)
    assert "(any more)" in refused_line(lambda: IoUring(ring, range(2, 4)).deregister(kept), ArgumentError)
    assert "not int" in refused_line(lambda: registrar.deregister(0), ArgumentTypeError)  # type: ignore[arg-type]
    assert "not str" in refused_line(lambda: registrar.completed("5"), ArgumentTypeError)  # type: ignore[arg-type]
    assert status_bytes("VmPin") == pinned


def test_memory_that_is_gone_is_deregistered(ring: Ring) -> None:
    registrar, memory, before = IoUring(ring), Memory(LENGTH), status_bytes("VmPin")
    handle = registrar.register(memory.address, LENGTH)
    memory.map.close()
    assert status_bytes("VmPin") == before + LENGTH
    registrar.deregister(handle)
    assert status_bytes("VmPin") == before


def test_the_limit_of_an_unprivileged_user_is_a_limit_error() -> None:
    def child() -> tuple[str, int | None, int]:
        try:
            ring = Ring(8)
        except DeviceError as error:  # forbidden, or this user's other rings are near the limit
            return str(error), None, 0
        with ring:
            registrar, memory = IoUring(ring), Memory(LENGTH)
            handles = []
            try:
                while True:
                    handles.append(registrar.register(memory.address, LENGTH))
            except LimitError as error:
                message, number = str(error), error.errno
            registrar.deregister(handles.pop())
            registrar.register(memory.address, LENGTH)
            return message, number, len(handles)

    message, number, others = unprivileged(child, 3 * LENGTH + PAGE)
    if number is None:
        pytest.skip(f"needs io_uring as a user without rings, root can become one: {message}")
    assert number == errno.ENOMEM
    assert "ulimit -l" in message
    assert 1 <= others <= 2


# Closed rings


@pytest.mark.parametrize("name", ["ours", "ring_fd", "number", "fileno"])
def test_a_closed_ring_takes_nothing_and_loses_nothing(name: str) -> None:
    memory = Memory()
    with Ring(4) if name == "ours" else ForeignRing() as ring:
        names = {"number": lambda: ring.ring_fd, "fileno": lambda: Numbered(ring)}
        registrar = IoUring(names.get(name, lambda: ring)())
        handle = registrar.register(memory.address, PAGE)
        ring.close()
        registrar.deregister(handle)
        line = refused_line(lambda: registrar.register(memory.address, PAGE), ClosedError, errno.EBADF)
        assert "open a new" in line


class Numbered:
    """A ring by fileno() that answers -1 when it is closed, as sockets do."""

    def __init__(self, ring: ForeignRing) -> None:
        self.ring = ring

    def fileno(self) -> int:
        return -1 if self.ring.queues.closed else self.ring.ring_fd


def test_an_object_that_says_it_is_closed_is_believed(foreign: ForeignRing) -> None:
    """Its number may be open again, as a ring that no inode tells from the old one."""
    name = Named(foreign.ring_fd)
    registrar, memory = IoUring(name, 2), Memory()
    handle, pinned = registrar.register(memory.address, PAGE), status_bytes("VmPin")
    name.closed = True
    registrar.deregister(handle)
    assert status_bytes("VmPin") == pinned
    refused_line(lambda: registrar.register(memory.address, PAGE), ClosedError)


class Named:
    def __init__(self, ring_fd: int) -> None:
        self.ring_fd = ring_fd
        self.closed = False


def test_a_strangers_descriptor_is_not_touched(file: int, content: bytes) -> None:
    """The number of a closed ring is given to another ring; only a plain number or a stale `ring_fd` can be fooled."""
    memory, other = Memory(), Memory()
    foreign = ForeignRing()
    registrar = IoUring(foreign.ring_fd, 2)
    handle = registrar.register(memory.address, PAGE)
    foreign.close()
    with Ring(2) as stranger:
        assert stranger.fileno() == foreign.ring_fd, "the test needs the number"
        if os.fstat(stranger.fileno()).st_ino == registrar._ring._identity[1]:
            pytest.skip("on this kernel all rings share one inode; one with an inode for each ring would run it")
        stranger.update(handle.slot, other.address, PAGE)
        registrar.deregister(handle)
        refused_line(lambda: registrar.register(memory.address, PAGE), ClosedError)
        assert stranger.read_fixed(file, handle.slot, other.address, PAGE, 0) == PAGE
        assert other.map[:] == content[:PAGE]


def test_a_table_that_was_taken_away(foreign: ForeignRing) -> None:
    registrar, memory = IoUring(foreign), Memory()
    handle = registrar.register(memory.address, PAGE)
    assert syscall(abi.SYS_IO_URING_REGISTER, foreign.ring_fd, abi.IORING_UNREGISTER_BUFFERS, 0, 0) == 0
    registrar.deregister(handle)
    assert "no table" in refused_line(lambda: registrar.register(memory.address, PAGE), DeviceError, errno.ENXIO)


# Processes and threads


def test_a_forked_child_is_refused_and_disturbs_nobody(ring: Ring, file: int, content: bytes) -> None:
    registrar, memory = IoUring(ring), Memory()
    handle, waiting = registrar.register(memory.address, PAGE), registrar.register(memory.address, PAGE)
    registrar.deregister(waiting)

    def child() -> tuple[str, bool]:
        registrar.deregister(handle)
        line = refused_line(lambda: registrar.register(memory.address, PAGE), ForkedError, errno.ECHILD)
        return line, registrar.completed(waiting.tag)

    line, completed = in_child(child)
    assert "open one in the child" in line
    assert not completed
    assert read(ring, file, handle.part(), 0) == PAGE
    assert memory.map[:] == content[:PAGE]


def test_a_ring_of_one_thread() -> None:
    """Another thread's registration is refused; its deregistration is made up for by the next registration."""
    with single_issuer_ring() as foreign:
        registrar, memory = IoUring(foreign, 2, any_thread=False), Memory()
        handle, before = registrar.register(memory.address, PAGE), status_bytes("VmPin")
        lines: list[str] = []

        def elsewhere() -> None:
            lines.append(refused_line(lambda: registrar.register(memory.address, PAGE), DeviceError, errno.EEXIST))
            registrar.deregister(handle)

        in_thread(elsewhere)
        assert "SINGLE_ISSUER" in lines[0]
        assert status_bytes("VmPin") == before
        assert registrar.register(memory.address, PAGE).slot == 1
        assert status_bytes("VmPin") == before
        assert hand_over(foreign, registrar, 1) == []
        assert registrar.register(memory.address, PAGE).slot == 0


@contextlib.contextmanager
def single_issuer_ring() -> Iterator[ForeignRing]:
    try:
        foreign = ForeignRing(abi.IORING_SETUP_SINGLE_ISSUER)
    except DeviceError as error:
        pytest.skip(f"needs IORING_SETUP_SINGLE_ISSUER (Linux 6.0): {error.strerror}")
    with foreign:
        yield foreign


def in_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_many_threads_and_one_completion_loop(foreign: ForeignRing) -> None:
    registrar, before = IoUring(foreign, 6), status_bytes("VmPin")
    held: list[set[int]] = [set()]
    failures: list[str] = []
    done = threading.Event()

    def work(memory: Memory) -> None:
        for _ in range(400):
            try:
                handle = registrar.register(memory.address, PAGE)
            except (LimitError, WouldBlockError):
                continue
            if handle.slot in held[0]:
                failures.append(f"slot {handle.slot} given out twice")
            held[0].add(handle.slot)
            held[0].discard(handle.slot)
            registrar.deregister(handle)

    def loop() -> None:
        while not done.is_set():
            failures.extend(map(str, hand_over(foreign, registrar)))

    memories = [Memory() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(memory,)) for memory in memories]
    reaper = threading.Thread(target=loop)
    for thread in (reaper, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reaper.join()
    failures.extend(map(str, hand_over(foreign, registrar)))
    assert failures == []
    assert (registrar.waiting, status_bytes("VmPin")) == (0, before)
    assert sorted(registrar._free) == list(range(6))


def test_deregister_from_a_finalizer_inside_register(ring: Ring) -> None:
    """The collector runs finalizers wherever something is allocated, also in the middle of `register`."""
    registrar, memory, before = IoUring(ring), Memory(), status_bytes("VmPin")
    taken_back: list[module.FixedBuffer] = []

    class Owner:
        def __init__(self) -> None:
            self.itself = self
            self.handles = [registrar.register(memory.address, PAGE)]

        def __del__(self) -> None:
            for handle in getattr(self, "handles", ()):
                registrar.deregister(handle)
                taken_back.append(handle)

    thresholds = gc.get_threshold()
    gc.freeze()  # everything older is out of the way, so that collections are complete and quick
    gc.collect()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(500):
            with contextlib.suppress(LimitError):  # not yet collected
                Owner()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()
    assert len(taken_back) > 100
    assert status_bytes("VmPin") == before
    for _ in range(4):
        registrar.register(memory.address, PAGE)


@pytest.mark.parametrize("done", [True, False], ids=["after the call", "before the call"])
def test_an_interrupted_registration_leaves_nothing(ring: Ring, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    registrar, memory, before = IoUring(ring, 1), Memory(), status_bytes("VmPin")
    real = module.update_buffer

    def interrupted(fd: int, slot: int, address: int, length: int, tag: int) -> int:
        monkeypatch.setattr(module, "update_buffer", real)
        if done:
            real(fd, slot, address, length, tag)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "update_buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registrar.register(memory.address, PAGE)
    assert (status_bytes("VmPin"), registrar.waiting) == (before, 0)
    registrar.deregister(registrar.register(memory.address, PAGE))
    registrar.register(memory.address, PAGE)
    assert not registrar.unclaimed, "its tag is known"
