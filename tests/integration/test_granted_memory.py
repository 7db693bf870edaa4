"""`_core.Memory`: pages of files side by side, and what is refused."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.growth import check_no_growth
from support.processes import in_child

from usermm import ArgumentError, DeviceError, ForkedError, GrantError, UsermmError
from usermm._core import Memory
from usermm.errors import ArgumentTypeError

PAGE = 4096
MAP_FIXED = 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def file() -> Iterator[int]:
    """Four pages, each filled with its number."""
    descriptor = os.memfd_create("memory")
    os.write(descriptor, b"".join(bytes([number]) * PAGE for number in range(4)))
    yield descriptor
    os.close(descriptor)


def whole(file: int, pages: int = 4, *, writable: bool = True, shared: bool = True, inherit: bool = True) -> Memory:
    return Memory([(file, 0, pages * PAGE)], writable=writable, shared=shared, inherit=inherit)


def test_runs_lie_side_by_side(file: int) -> None:
    other = os.memfd_create("other")
    os.write(other, b"x" * PAGE)
    runs = [(file, 2 * PAGE, PAGE), (other, 0, PAGE), (file, 0, PAGE)]
    memory = Memory(runs, writable=False, shared=True, inherit=False)
    os.close(other)
    assert len(memory) == 3 * PAGE
    with memoryview(memory) as view:
        assert (view[0], view[PAGE], view[2 * PAGE]) == (2, ord("x"), 0)
        assert view.readonly and view.format == "B"
        assert memory.exports == 1
    memory.close()
    assert memory.closed


def test_a_failing_run_leaves_nothing(file: int) -> None:
    def fail() -> None:
        with pytest.raises(DeviceError) as caught:
            Memory([(file, 0, PAGE), (10_000, 0, PAGE)], writable=False, shared=True, inherit=True)
        assert caught.value.errno == errno.EBADF

    check_no_growth(fail, times=200)


def test_writes_reach_the_file_only_when_shared(file: int) -> None:
    with memoryview(whole(file)) as view:
        view[0] = 9
    assert os.pread(file, 1, 0) == b"\x09"
    with memoryview(whole(file, shared=False)) as view:
        view[0] = 7
    assert os.pread(file, 1, 0) == b"\x09"


def test_a_buffer_keeps_it_mapped(file: int) -> None:
    memory = whole(file)
    view = memoryview(memory)
    with pytest.raises(BufferError):
        memory.close()
    assert view[PAGE] == 1
    view.release()
    memory.close()
    memory.close()
    with pytest.raises(BufferError):
        memoryview(memory)


def detach(memory: Memory, offset: int, length: int) -> None:
    """With a file of this process's own."""
    file = os.memfd_create("own")
    try:
        os.ftruncate(file, length)
        memory.detach(offset, length, file)
    finally:
        os.close(file)


def test_detaching_keeps_content_address_and_buffers(file: int) -> None:
    memory, peer = whole(file), whole(file)
    address = memory.address
    with memoryview(memory) as mine, memoryview(peer) as theirs:
        detach(memory, PAGE, 2 * PAGE)
        mine[PAGE] = 77
        assert (theirs[PAGE], mine[2 * PAGE], memory.address) == (1, 2, address)
        mine[0] = 55
        assert theirs[0] == 55
    os.ftruncate(file, 0)
    assert memory.read(PAGE, 2) == bytes([77, 1])
    with pytest.raises(GrantError) as caught:
        peer.read(PAGE, 2)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(GrantError):
        peer.write(0, b"x")


def test_detaching_what_is_gone_gives_zeros(file: int) -> None:
    memory = whole(file)
    os.ftruncate(file, PAGE)
    detach(memory, 0, 4 * PAGE)
    assert memory.read() == bytes(4 * PAGE)


def test_a_read_only_memory_stays_read_only_when_it_is_detached(file: int) -> None:
    memory = whole(file, writable=False, shared=False)
    detach(memory, 0, PAGE)
    with open("/proc/self/maps", encoding="ascii", errors="replace") as lines:
        line = next(line for line in lines if int(line.split("-")[0], 16) == memory.address)
    assert line.split()[1] == "r--p"


def test_a_part_keeps_its_whole(file: int) -> None:
    class Page(Memory):
        pass

    memory = whole(file)
    page = Page.part(memory, 2 * PAGE, PAGE)
    assert isinstance(page, Page)
    assert (page.address, len(page), page.read(0, 1)) == (memory.address + 2 * PAGE, PAGE, b"\x02")
    with pytest.raises(BufferError):
        memory.close()
    page.close()
    memory.close()
    second = whole(file)
    page = Page.part(second, 0, PAGE)
    del second
    assert page.read(0, 1) == b"\x00"
    page.abandon()
    assert page.closed


def test_words(file: int) -> None:
    memory = whole(file)
    memory.store(8, 0xFFFF_FFFF)
    assert memory.load(8) == 0xFFFF_FFFF
    assert memory.exchange(8, 3) == 0xFFFF_FFFF
    assert memory.add(8, -4) == 0xFFFF_FFFF
    assert memory.add(8, 2) == 1
    memory.fence()


def test_additions_of_threads_are_all_counted(file: int) -> None:
    memory = whole(file)
    memory.store(0, 0)

    def add() -> None:
        for _ in range(5000):
            memory.add(0, 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.load(0) == 20_000


def test_a_child_does_not_touch_what_it_has_not(file: int) -> None:
    memory = whole(file, inherit=False)

    def child() -> tuple[list[str], bytes]:
        LIBC.mmap.restype = ctypes.c_void_p
        place, flags = ctypes.c_void_p(memory.address), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        moved = LIBC.mmap(place, ctypes.c_size_t(4 * PAGE), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert moved == memory.address
        ctypes.memmove(moved, b"mine", 4)
        refused = []
        calls: list[Callable[[], Any]] = [
            lambda: memory.read(0, 4),
            lambda: memory.write(0, b"theirs"),
            lambda: memory.load(0),
            lambda: memory.store(0, 1),
            lambda: memory.exchange(0, 1),
            lambda: memory.add(0, 1),
            lambda: memory.detach(0, PAGE, 0),
            lambda: Memory.part(memory, 0, PAGE),
            lambda: memoryview(memory),
        ]
        for call in calls:
            try:
                call()
            except (ForkedError, BufferError) as error:
                refused.append(type(error).__name__)
        memory.close()
        return refused, ctypes.string_at(moved, 4)

    refused, content = in_child(child)
    assert refused == ["ForkedError"] * 8 + ["BufferError"]
    assert content == b"mine"
    assert memory.read(PAGE, 1) == b"\x01"


def test_a_child_has_what_it_inherits(file: int) -> None:
    memory = whole(file)
    in_child(lambda: memory.store(0, 42))
    assert memory.load(0) == 42


REFUSED: dict[str, Callable[[Memory], Any]] = {
    "no run": lambda _: Memory([], writable=False, shared=True, inherit=True),
    "not a tuple": lambda _: Memory([3], writable=False, shared=True, inherit=True),  # type: ignore[list-item]
    "length 0": lambda _: Memory([(0, 0, 0)], writable=False, shared=True, inherit=True),
    "descriptor -1": lambda _: Memory([(-1, 0, PAGE)], writable=False, shared=True, inherit=True),
    "too long": lambda _: Memory([(0, 0, 2**62), (0, 0, 2**62)], writable=False, shared=True, inherit=True),
    "read outside": lambda memory: memory.read(PAGE * 4, 1),
    "read far outside": lambda memory: memory.read(10**30),
    "read before": lambda memory: memory.read(-1, 1),
    "read of words": lambda memory: memory.read("a"),  # type: ignore[arg-type]
    "read with three": lambda memory: memory.read(0, 1, 2),  # type: ignore[call-arg]
    "write too long": lambda memory: memory.write(4 * PAGE - 1, b"ab"),
    "write without data": lambda memory: memory.write(0),  # type: ignore[call-arg]
    "detach half a page": lambda memory: memory.detach(1, 2, 0),
    "detach without a file": lambda memory: memory.detach(0, PAGE, "a"),  # type: ignore[arg-type]
    "fill beside a page": lambda memory: memory.fill(1, [(0, 0, PAGE)]),
    "fill outside": lambda memory: memory.fill(3 * PAGE, [(0, 0, 2 * PAGE)]),
    "fill with none": lambda memory: memory.fill(0, []),
    "fill with one argument": lambda memory: memory.fill(0),  # type: ignore[call-arg]
    "not said how": lambda _: Memory([(0, 0, PAGE)], writable=False, shared=True),  # type: ignore[call-arg]
    "part outside": lambda memory: Memory.part(memory, PAGE * 4, 1),
    "load between words": lambda memory: memory.load(2),
    "load outside": lambda memory: memory.load(PAGE * 4 - 2),
    "load of words": lambda memory: memory.load("a"),  # type: ignore[arg-type]
    "store of 33 bits": lambda memory: memory.store(0, 1 << 32),
    "store below 0": lambda memory: memory.store(0, -1),
    "store of words": lambda memory: memory.store(0, "a"),  # type: ignore[arg-type]
    "exchange of 33 bits": lambda memory: memory.exchange(0, 1 << 32),
    "add of 33 bits": lambda memory: memory.add(0, 1 << 32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_named_and_change_nothing(name: str, file: int) -> None:
    memory = whole(file)
    before = memory.read()
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        REFUSED[name](memory)
    assert isinstance(caught.value, UsermmError)
    assert "\n" not in str(caught.value)
    assert memory.read() == before


@pytest.mark.parametrize("call", ["read", "load", "store", "exchange", "add", "write", "detach", "address"])
def test_closed_memory_refuses(call: str, file: int) -> None:
    memory = whole(file)
    memory.close()
    words = dict.fromkeys(("store", "exchange", "add"), (0, 1))
    arguments: tuple[Any, ...] = {"load": (0,), "write": (0, b""), "detach": (0, PAGE, 0), **words}.get(call, ())
    with pytest.raises(ArgumentError, match="unmapped"):
        attribute = getattr(memory, call)
        attribute(*arguments)


@pytest.mark.parametrize("call", ["read", "load", "store", "exchange", "add", "write", "detach", "fill"])
def test_an_index_that_closes_the_memory(call: str, file: int) -> None:
    """It was looked at before, and the address was none any more."""

    class Closing:
        def __init__(self, memory: Memory) -> None:
            self.memory = memory

        def __index__(self) -> int:
            self.memory.close()
            return 0

    memory = whole(file)
    rest: dict[str, tuple[Any, ...]] = {
        "read": (4,), "load": (), "write": (b"x",), "detach": (PAGE, file), "fill": ([(file, 0, PAGE)],)
    }
    with pytest.raises(ArgumentError, match="unmapped"):
        getattr(memory, call)(Closing(memory), *rest.get(call, (1,)))


def test_runs_that_come_later(file: int) -> None:
    """What is not filled cannot be touched; a run that cannot be mapped leaves the rest as it was."""
    memory = Memory([(file, 0, PAGE)], writable=True, shared=True, inherit=False, length=4 * PAGE)
    with pytest.raises(GrantError):
        memory.read(PAGE, 1)
    memory.fill(PAGE, [(file, 2 * PAGE, PAGE), (file, PAGE, PAGE)])
    assert [memory.read(page * PAGE, 1)[0] for page in range(3)] == [0, 2, 1]
    with pytest.raises(DeviceError):
        memory.fill(3 * PAGE, [(10_000, 0, PAGE)])
    memory.fill(3 * PAGE, [(file, 3 * PAGE, PAGE)])
    assert memory.read(3 * PAGE, 1) == b"\3"
    assert in_child(lambda: memory.closed) is False  # and nothing of it is mapped in a child
    page = Memory.part(memory, 0, PAGE)
    with pytest.raises(ArgumentError):
        page.fill(0, [(file, 0, PAGE)])
    page.close()
    memory.close()


def test_read_only_memory_is_not_written(file: int) -> None:
    memory = whole(file, writable=False)
    for call in (lambda: memory.store(0, 1), lambda: memory.add(0, 1), lambda: memory.write(0, b"x")):
        with pytest.raises(ArgumentError, match="read-only"):
            call()
    assert os.pread(file, 1, 0) == b"\x00"


def test_no_mapping_is_left_for_more(file: int) -> None:
    """vm.max_map_count; what was mapped before stays."""
    limit = mmap.mmap(-1, PAGE)
    memories = []
    with pytest.raises(DeviceError) as caught:
        for number in range(100_000):
            memories.append(Memory([(file, number % 2 * 2 * PAGE, PAGE)], writable=False, shared=True, inherit=True))
    assert caught.value.errno == errno.ENOMEM
    assert memories[-1].read(0, 1) in (b"\x00", b"\x02")
    limit.close()


def test_every_call_leaks_nothing(file: int) -> None:
    def calls() -> None:
        memory = whole(file)
        page = Memory.part(memory, 0, PAGE)
        page.write(0, page.read(0, 8))
        page.store(0, page.exchange(4, page.add(8, 1)))
        page.fence()
        with memoryview(page):
            pass
        page.close()
        detach(memory, 0, PAGE)

    check_no_growth(calls, times=300)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_leaks_nothing(name: str, file: int) -> None:
    memory = whole(file)

    def call() -> None:
        try:
            REFUSED[name](memory)
        except UsermmError:
            return
        raise AssertionError("accepted")

    check_no_growth(call, times=300)
