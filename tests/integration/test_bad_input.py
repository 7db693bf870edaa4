"""Refusals that come from the kernel: which error, one line, nothing changed, and the device goes on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.arena import Arena
from support.calls import PAGE_BYTES, refused_line
from support.foreign import foreign_userfaultfd
from support.processes import run_program, run_quietly

import usermm
from usermm import _core
from usermm.uapi import ummunotify as abi


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    """Must be as it was, and working, after the refusals of the test."""
    with usermm.Ummunotify() as device:
        yield device
        counts = _core.counts()
        assert counts["regions"] == 0
        seen = device.generation
        block = mmap.mmap(-1, PAGE_BYTES)
        device.register(block, 1)
        block.close()
        assert not device.check(seen)
        assert device.read(timeout=0)[0].cookie == 1


@pytest.fixture
def arena() -> Iterator[Arena]:
    with contextlib.closing(Arena()) as arena:
        yield arena


# Memory of another userfaultfd


def test_memory_that_another_userfaultfd_owns(device: usermm.Ummunotify, arena: Arena) -> None:
    start = arena.mmap(arena.start, 8 * PAGE_BYTES)
    end = start + 8 * PAGE_BYTES
    with foreign_userfaultfd(start + 2 * PAGE_BYTES, start + 4 * PAGE_BYTES):
        for first, last in ((start, end), (start + 2 * PAGE_BYTES, end), (start, start + 3 * PAGE_BYTES)):
            _check_elsewhere(device, first, last)
        device.unregister(device.register_range(start, start + 2 * PAGE_BYTES))
    device.register_range(start, end, 5)
    arena.munmap(start, PAGE_BYTES)
    assert device.generation == 1
    device.unregister(5)


def _check_elsewhere(device: usermm.Ummunotify, start: int, end: int) -> None:
    line = refused_line(lambda: device.register_range(start, end, 5), usermm.WatchedElsewhereError, errno.EBUSY)
    assert "another userfaultfd" in line
    argument = abi.REGISTER.pack(start, end, 5, 0, 0)
    by_ioctl = functools.partial(device.ioctl, abi.REGISTER_REGION, argument)
    refused_line(by_ioctl, usermm.WatchedElsewhereError, errno.EBUSY)
    assert _core.counts()["regions"] == 0


def test_both_may_watch_their_own_half(device: usermm.Ummunotify, arena: Arena) -> None:
    start = arena.mmap(arena.start, 8 * PAGE_BYTES)
    with foreign_userfaultfd(start, start + 4 * PAGE_BYTES):
        device.register_range(start + 4 * PAGE_BYTES, start + 8 * PAGE_BYTES, 5)
        arena.munmap(start, 8 * PAGE_BYTES)
        assert device.generation == 1
        device.unregister(5)


# Addresses that fault


def _faulting(arena: Arena) -> dict[str, int]:
    """Where a structure of 32 bytes cannot be read or written."""
    start = arena.mmap(arena.start, 3 * PAGE_BYTES)
    arena.munmap(start + PAGE_BYTES, PAGE_BYTES)
    arena.mprotect(start + 2 * PAGE_BYTES, PAGE_BYTES, 0)
    return {
        "unmapped": start + PAGE_BYTES,
        "its end unmapped": start + PAGE_BYTES - 31,
        "its beginning unmapped": start + 2 * PAGE_BYTES - 1,
        "protected": start + 2 * PAGE_BYTES,
        "null": 0,
        "the kernel's": 0xFFFF_8000_0000_0000,
        "around the end": 2**64 - 16,
    }


FAULTING = (
    "unmapped", "its end unmapped", "its beginning unmapped", "protected", "null", "the kernel's", "around the end"
)  # fmt: skip


@pytest.mark.parametrize("where", FAULTING)
def test_addresses_that_fault(device: usermm.Ummunotify, arena: Arena, where: str) -> None:
    address = _faulting(arena)[where]
    line = refused_line(lambda: device.ioctl(abi.REGISTER_REGION, address), usermm.DeviceError, errno.EFAULT)
    assert "ioctl" in line
    block = mmap.mmap(-1, PAGE_BYTES)
    device.register(block, 3)
    block.close()
    line = refused_line(lambda: device.readinto(address, 4096), usermm.DeviceError, errno.EFAULT)
    assert "the events are lost" in line
    assert device.read(timeout=0) == []
    assert device.generation == 1
    device.unregister(3)


def test_features_at_an_address_that_is_read_only(arena: Arena) -> None:
    start = arena.mmap(arena.start, PAGE_BYTES)
    arena.mprotect(start, PAGE_BYTES, mmap.PROT_READ)
    with usermm.Ummunotify() as device:
        refused_line(lambda: device.ioctl(abi.EXCHANGE_FEATURES, start), usermm.DeviceError, errno.EFAULT)
        refused_line(lambda: device.ioctl(abi.EXCHANGE_FEATURES, bytearray(4)), usermm.DeviceError, errno.EINVAL)


def test_a_structure_at_an_odd_address(device: usermm.Ummunotify, arena: Arena) -> None:
    start = arena.mmap(arena.start, 2 * PAGE_BYTES)
    argument = abi.REGISTER.pack(start, start + PAGE_BYTES, 3, 0, 0)
    odd = start + PAGE_BYTES - 13  # across two pages too
    ctypes.memmove(odd, argument, len(argument))
    device.ioctl(abi.REGISTER_REGION, odd)
    device.unregister(3)


# Holes


@pytest.mark.parametrize("hole", [0, 1, 3])
def test_python_refuses_a_hole_that_the_ioctl_takes(device: usermm.Ummunotify, arena: Arena, hole: int) -> None:
    start = arena.mmap(arena.start, 4 * PAGE_BYTES)
    end = start + 4 * PAGE_BYTES
    arena.munmap(start + hole * PAGE_BYTES, PAGE_BYTES)
    line = refused_line(lambda: device.register_range(start, end, 3), usermm.DeviceError, errno.EFAULT)
    assert f"nothing is mapped at {start + hole * PAGE_BYTES:#x}" in line
    device.ioctl(abi.REGISTER_REGION, abi.REGISTER.pack(start, end, 3, 0, 0))
    arena.munmap(start + 2 * PAGE_BYTES, PAGE_BYTES)
    assert device.generation == 1
    device.read(timeout=0)
    device.unregister(3)


def test_unmapped_memory_and_the_rest_of_the_address_space(device: usermm.Ummunotify, arena: Arena) -> None:
    for start, end in ((arena.start, arena.start + PAGE_BYTES), (PAGE_BYTES, arena.start), (1 << 47, 1 << 62)):
        with pytest.raises(usermm.DeviceError) as caught:
            device.register_range(start, end, 3)
        assert caught.value.errno in (errno.EFAULT, errno.EOPNOTSUPP)
        assert "\n" not in str(caught.value)
        assert _core.counts()["regions"] == 0


# Limits, each in a process of its own

_SWEEP = """
    import errno, mmap, os, resource
    import usermm
    from usermm import _core

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    first_free = os.dup(0)
    os.close(first_free)
    opened = registered = 0
    for room in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + room, hard))
        before = _core.counts()
        try:
            device = usermm.Ummunotify()
        except usermm.LimitError as error:
            assert error.errno == errno.EMFILE and "open" in str(error) and "ulimit -n" in str(error), error
            assert not registered, "it was enough before"
            assert _core.counts() == before
        else:
            opened += 1
            block = mmap.mmap(-1, 1 << 20)
            try:
                device.mmap()
            except usermm.LimitError as error:
                assert error.errno == errno.EMFILE and "mmap" in str(error), error
            try:
                device.register(block, 1)
            except usermm.LimitError as error:
                assert error.errno == errno.EMFILE and "register" in str(error), error
                assert _core.counts()["regions"] == 0
            else:
                registered += 1
                block.close()
                assert not device.check(0)
                assert device.read(timeout=0)[0].cookie == 1
                device.unregister(1)
            device.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        free = os.dup(0)
        os.close(free)
        assert free == first_free, "a descriptor was left behind"
    assert opened and registered
"""


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """With every number of free descriptors from none to enough."""
    run_quietly(_SWEEP, tmp_path)


def test_a_refusal_is_ours_also_when_no_descriptor_is_left(tmp_path: Path) -> None:
    text = """
        import resource
        import usermm
        device = usermm.Ummunotify()
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
        try:
            device.register_range(4096, 8192, 2)
        except usermm.UsermmError as error:
            print("ours")
        except OSError as error:
            print(repr(error))
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
    """
    assert run_quietly(text, tmp_path).strip() == "ours"


def test_no_thread_can_be_started(tmp_path: Path) -> None:
    """Without room for the reader's stack nothing may be left of the attempt."""
    text = """
        import errno, mmap, os, resource
        import usermm
        from usermm import _core
        before = sorted(os.listdir("/proc/self/fd"))
        pages = int(open("/proc/self/statm").read().split()[0])
        junk = [bytes(100) for _ in range(10_000)]
        del junk
        resource.setrlimit(resource.RLIMIT_AS, ((pages + 64) * 4096, resource.RLIM_INFINITY))
        for _ in range(20):
            try:
                device = usermm.Ummunotify()
            except usermm.LimitError as error:
                assert error.errno == errno.ENOMEM and "open" in str(error), error
                print("refused")
            else:
                print("opened")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert sorted(os.listdir("/proc/self/fd")) == before
        counts = _core.counts()
        assert counts["devices"] == counts["monitors"] == 0, counts
        with usermm.Ummunotify() as device:
            block = mmap.mmap(-1, 1 << 20)
            device.register(block)
            block.close()
            assert device.generation == 1
    """
    assert set(run_quietly(text, tmp_path).split()) == {"refused"}


def test_the_limit_of_mappings_is_reached(tmp_path: Path) -> None:
    """vm.max_map_count: what cannot be split is watched whole, or refused; in both cases exactly."""
    text = """
        import ctypes, errno, mmap
        import usermm
        from usermm import _core

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        PAGE, PRIVATE_ANONYMOUS = 4096, 0x22
        limit = int(open("/proc/sys/vm/max_map_count").read())
        if limit > 200_000:
            raise SystemExit("skip")
        device = usermm.Ummunotify()
        single = [libc.mmap(None, 8 * PAGE, 3, PRIVATE_ANONYMOUS, -1, 0) for _ in range(1)][0]
        room = bytearray(1 << 20)
        window = libc.mmap(None, (limit + 100) * 2 * PAGE, 0, PRIVATE_ANONYMOUS, -1, 0)
        del room  # for Python's own needs
        filled = 0
        while libc.mprotect(ctypes.c_void_p(window + 2 * filled * PAGE), PAGE, 3) == 0:
            filled += 1
        assert ctypes.get_errno() == errno.ENOMEM
        results = set()
        before = _core.counts()["regions"]
        for page in range(0, 200, 2):
            for start in (window + page * PAGE, window + (page + 1) * PAGE, single + PAGE):
                try:
                    device.register_range(start, start + PAGE, 7)
                except usermm.LimitError as error:
                    assert error.errno == errno.ENOMEM and "max_map_count" in str(error), error
                    results.add("refused")
                    assert _core.counts()["regions"] == before
                else:
                    results.add("registered")
                    seen = device.generation
                    assert libc.madvise(ctypes.c_void_p(start), PAGE, mmap.MADV_DONTNEED) == 0
                    assert device.generation == seen + 1
                    other = start + 2 * PAGE
                    libc.madvise(ctypes.c_void_p(other), PAGE, mmap.MADV_DONTNEED)
                    assert device.generation == seen + 1
                    device.unregister(7)
        try:
            second = usermm.Ummunotify()
            second.close()
            device.close()
            third = usermm.Ummunotify()
            third.close()
        except usermm.LimitError as error:
            assert error.errno == errno.ENOMEM, error
        libc.munmap(ctypes.c_void_p(window), ctypes.c_size_t((limit + 100) * 2 * PAGE))
        with usermm.Ummunotify() as after:
            after.register_range(single + PAGE, single + 2 * PAGE, 7)
            libc.munmap(ctypes.c_void_p(single), ctypes.c_size_t(8 * PAGE))
            assert after.generation == 1
        print(*sorted(results))
    """
    assert run_quietly(text, tmp_path, timeout_s=60).split() in (["refused"], ["registered"], ["refused", "registered"])


_FAILING_ALLOCATIONS = """
    import gc, mmap, os, sys
    import _testcapi
    from support.calls import ADDRESS, CALLS, COOKIE, PAGE_BYTES, memory
    import usermm
    from usermm import _core

    def count(function):
        before = _core.counts()["devices"], _core.counts()["regions"]
        for nth in range(60):
            with usermm.Ummunotify(flags=os.O_NONBLOCK) as device:
                if PREPARE:
                    device.register_range(ADDRESS, ADDRESS + PAGE_BYTES, COOKIE)
                regions = _core.counts()["regions"]
                failure = None
                _testcapi.set_nomemory(nth, nth + 1)
                try:
                    function(device)
                except (MemoryError, usermm.UsermmError) as error:
                    failure = error
                except SystemError as error:
                    # CPython 3.11 answers so for plain Python functions too when it cannot allocate while it raises.
                    assert "without exception set" in str(error)
                    failure = MemoryError()
                finally:
                    _testcapi.remove_mem_hooks()
                if failure is not None and not isinstance(failure, MemoryError):
                    assert "\\n" not in str(failure)
                if failure is not None:
                    assert _core.counts()["regions"] == regions, (nth, failure)
                assert device.check(0)
                if _core.counts()["regions"]:
                    device.unregister(COOKIE)
            del failure
        gc.collect()
        assert (_core.counts()["devices"], _core.counts()["regions"]) == before, _core.counts()

    for name, function in CALLS.items():
        if name not in ("read", "read_within"):
            count(function)
            print(name)
    for arguments in ({}, {"abi": 3}, {"abi": 1}):
        for nth in range(40):
            _testcapi.set_nomemory(nth, nth + 1)
            try:
                usermm.Ummunotify(**arguments).close()
            except (MemoryError, usermm.UsermmError):
                pass
            except SystemError as error:
                assert "without exception set" in str(error)
            finally:
                _testcapi.remove_mem_hooks()
    assert _core.counts()["devices"] == 0
"""


@pytest.mark.parametrize("prepared", [False, True])
def test_every_allocation_of_python_fails_in_turn(tmp_path: Path, prepared: bool) -> None:
    pytest.importorskip("_testcapi", reason="this Python is built without its test modules")
    run_quietly(_FAILING_ALLOCATIONS.replace("PREPARE", str(prepared)), tmp_path, timeout_s=60)


def test_a_descriptor_closed_behind_the_monitor_fails_closed(tmp_path: Path) -> None:
    text = _LOST + """
        page = device.mmap(8)
        os.close(number)
        refused(lambda: device.check(0))
        assert page[0] == 1, "the generation did not move"
        refused(lambda: device.generation)
        refused(lambda: other.register(block))
        refused(usermm.Ummunotify)
        other.close()
        device.close()
        block.close()
        with usermm.Ummunotify() as fresh:
            block = mmap.mmap(-1, 1 << 20)
            fresh.register(block)
            block.close()
            assert fresh.generation == 1
    """
    run_quietly(text, tmp_path)


_LOST = """
        import errno, mmap, os, socket, threading, time
        import usermm

        def refused(call):
            try:
                call()
            except usermm.MonitorFailedError as error:
                assert error.errno == errno.EIO and "\\n" not in str(error)
            else:
                raise SystemExit("accepted")

        def read():
            try:
                other.read()
            except (usermm.MonitorFailedError, usermm.ClosedError) as error:
                ended.append(error.errno)

        def links(name):
            return os.path.exists(f"/proc/self/fd/{name}") and os.readlink(f"/proc/self/fd/{name}")

        ended = []
        device, other = usermm.Ummunotify(), usermm.Ummunotify()
        block = mmap.mmap(-1, 1 << 20)
        device.register(block)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        time.sleep(0.05)
        ours = [int(name) for name in os.listdir("/proc/self/fd") if links(name) == "anon_inode:[userfaultfd]"]
        number, gate = sorted(ours)
"""

@pytest.mark.parametrize("then", ["by itself", "after close"])
def test_a_waiting_read_ends_when_the_monitor_fails(tmp_path: Path, then: str) -> None:
    text = _LOST + """
        os.close(number)
        refused(lambda: device.check(0))
        THEN
        thread.join(2)
        print("hangs" if thread.is_alive() else "ended", flush=True)
        os._exit(0)
    """.replace("THEN", "other.close()" if "close" in then else "")
    assert run_quietly(text, tmp_path) == "ended\n"


@pytest.mark.parametrize(
    "loss",
    [
        "os.dup2(os.pipe()[0], number)",
        "os.closerange(3, 64); sockets = [socket.socketpair() for _ in range(8)]",
        "os.close(number); device.close(); other.close(); fresh = usermm.Ummunotify()",
        "os.close(number); thread = [os.pipe() for _ in range(8)]",
        "page = device.mmap(); os.close(gate); thread = [os.pipe() for _ in range(8)]",
    ],
)
def test_freeing_after_the_number_became_another_file_neither_hangs_nor_goes_unnoticed(
    tmp_path: Path, loss: str
) -> None:
    """A program that becomes a daemon closes every descriptor, and opens others, before it frees anything.

    The reader's poll(2) kept the closed userfaultfd alive but looked again by number, which was another file by then:
    nobody read the message, and the thread that unmapped waited for ever.
    """
    text = _LOST + """
        LOSS
        block.close()
        try:
            noticed = device.closed or not device.check(0)
        except usermm.MonitorFailedError:
            noticed = True
        print("noticed" if noticed else "unnoticed", flush=True)
        os._exit(0)
    """.replace("LOSS", loss)
    assert run_program(text, tmp_path, timeout_s=5).stdout == "noticed\n"


@pytest.mark.parametrize("flags", ["0x11", "0x22", "2**32 + 1"], ids=["MAP_FIXED", "MAP_ANONYMOUS", "above 32 bits"])
def test_flags_that_would_map_another_page(tmp_path: Path, flags: str) -> None:
    """With MAP_FIXED the page landed at address 0; with MAP_ANONYMOUS its generation would never move."""
    text = f"""
        import usermm
        device = usermm.Ummunotify()
        try:
            view = device.mmap(8, flags={flags})
        except usermm.UsermmError:
            print("refused", flush=True)
    """
    assert run_program(text, tmp_path).stdout == "refused\n"
