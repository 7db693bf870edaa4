"""What the device accepts and refuses on real mappings, and what its message says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import usermm
from usermm.ummunotify import seals
from usermm.ummunotify.memory import Kind, explain, judge
from usermm.ummunotify.seals import F_SEAL_FUTURE_WRITE
from usermm.uring import Ring

PAGE: Final = mmap.PAGESIZE
LENGTH: Final = 4 * PAGE
READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
IPC_RMID: Final = 0
CLONE_NEWIPC: Final = 0x08000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.shmat.restype = ctypes.c_void_p
_libc.shmdt.argtypes = [ctypes.c_void_p]

Map = Callable[..., int]


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    with usermm.Ummunotify() as device:
        yield device


@pytest.fixture
def map_pages() -> Iterator[Map]:
    """Four pages of a file or of anonymous memory, unmapped afterwards."""
    mapped = []

    def map_pages(descriptor: int = -1, flags: int = mmap.MAP_SHARED, prot: int = READ_WRITE) -> int:
        kind = flags | (mmap.MAP_ANONYMOUS if descriptor < 0 else 0)
        address = _libc.mmap(None, LENGTH, prot, kind, descriptor, 0)
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        mapped.append(address)
        return int(address)

    yield map_pages
    for address in mapped:
        _libc.munmap(address, LENGTH)


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """A file of four pages; `where` is a directory or "memfd"."""
    opened = []

    def open_file(where: Path | str = tmp_path, flags: int = os.O_RDWR) -> int:
        if where == "memfd":
            opened.append(os.memfd_create("usermm-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        else:
            path = Path(where) / f"usermm-test-{os.getpid()}"
            path.touch()
            os.truncate(path, LENGTH)
            opened.append(os.open(path, flags | os.O_CLOEXEC))
            path.unlink()
        if flags & os.O_RDWR:
            os.ftruncate(opened[-1], LENGTH)
        return opened[-1]

    yield open_file
    for descriptor in opened:
        os.close(descriptor)


def _refused(device: usermm.Ummunotify, address: int, **arguments: Any) -> str:
    """The message of the refusal; nothing may have been registered."""
    with pytest.raises(usermm.UnwatchableError) as caught:
        device.register_range(address, address + LENGTH, 7, **arguments)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(usermm.DeviceError):
        device.unregister(7)
    message = caught.value.strerror or ""
    assert "\n" not in message
    return message


def _watched(device: usermm.Ummunotify, address: int, **arguments: Any) -> None:
    cookie = device.register_range(address, address + LENGTH, **arguments)
    seen = device.generation
    _libc.munmap(address, LENGTH)
    assert not device.check(seen)
    device.unregister(cookie)


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_anonymous_memory_is_accepted(device: usermm.Ummunotify, map_pages: Map, kind: int) -> None:
    address = map_pages(flags=kind)
    assert explain(address, address + LENGTH) is None
    _watched(device, address)


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_dev_zero_is_anonymous_memory(device: usermm.Ummunotify, map_pages: Map, kind: int) -> None:
    with open("/dev/zero", "r+b", buffering=0) as zero:
        _watched(device, map_pages(zero.fileno(), kind))


def test_a_hole_is_refused_with_its_addresses(device: usermm.Ummunotify, map_pages: Map) -> None:
    address = map_pages()
    _libc.munmap(address + PAGE, PAGE)
    with pytest.raises(usermm.DeviceError, match=f"nothing is mapped at {address + PAGE:#x}-") as caught:
        device.register_range(address, address + LENGTH)
    assert caught.value.errno == errno.EFAULT


@pytest.fixture
def segment() -> Iterator[int]:
    identifier = _libc.shmget(0, LENGTH, 0o1600)  # IPC_PRIVATE; IPC_CREAT
    assert identifier >= 0
    address = _libc.shmat(identifier, None, 0)
    _libc.shmctl(identifier, IPC_RMID, None)  # it goes with its last attachment
    yield address
    _libc.shmdt(address)


def test_a_system_v_segment_is_refused(device: usermm.Ummunotify, segment: int) -> None:
    message = _refused(device, segment)
    assert "System V segment" in message
    assert "memfd" in message


def test_a_system_v_segment_is_no_file_memory_to_accept(device: usermm.Ummunotify, segment: int) -> None:
    """Found while writing: with UFFD_FEATURE_WP_ASYNC the kernel itself accepts the segment, and shmdt(2) is silent."""
    assert "System V segment" in _refused(device, segment, accept_file_memory=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a new IPC namespace needs root: run the tests as root")
def test_the_first_system_v_segment_of_a_container_is_refused() -> None:
    """Found while writing: its identifier is 0, which is the inode that /proc/self/maps shows for no file."""
    program = f"""
import ctypes, usermm
libc = ctypes.CDLL(None)
assert libc.unshare({CLONE_NEWIPC}) == 0
libc.shmat.restype = ctypes.c_void_p
identifier = libc.shmget(0, {LENGTH}, 0o1600)
assert identifier == 0
address = libc.shmat(identifier, None, 0)
libc.shmctl(identifier, {IPC_RMID}, None)
with usermm.Ummunotify() as device:
    try:
        device.register_range(address, address + {LENGTH})
    except usermm.UnwatchableError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "System V segment" in done.stdout


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_an_unsealed_memfd_is_a_blind_spot_to_accept(
    device: usermm.Ummunotify, map_pages: Map, open_file: Callable[..., int], kind: int
) -> None:
    address = map_pages(open_file("memfd"), kind)
    message = _refused(device, address)
    assert "/memfd:usermm-test" in message
    assert "F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE" in message
    _watched(device, address, accept_file_memory=True)


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_a_sealed_memfd_is_watchable(
    device: usermm.Ummunotify, map_pages: Map, open_file: Callable[..., int], kind: int
) -> None:
    memfd = open_file("memfd")
    address = map_pages(memfd, kind)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert "F_ADD_SEALS, F_SEAL_FUTURE_WRITE)" in _refused(device, address)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    _watched(device, address)


def test_the_seals_do_stop_what_is_not_notified(map_pages: Map, open_file: Callable[..., int]) -> None:
    """The rule behind the verdict, asked of the kernel: ftruncate, PUNCH_HOLE, MADV_REMOVE through another mapping."""
    memfd = open_file("memfd")
    first, second = map_pages(memfd), map_pages(memfd)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)
    ctypes.memset(first, 7, LENGTH)
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, 0)
    assert _libc.fallocate(memfd, 3, ctypes.c_long(0), ctypes.c_long(LENGTH)) == -1  # PUNCH_HOLE | KEEP_SIZE
    assert _libc.madvise(ctypes.c_void_p(second), ctypes.c_size_t(LENGTH), 9) == -1  # MADV_REMOVE
    assert ctypes.string_at(first, LENGTH) == b"\7" * LENGTH


def test_seals_are_found_through_any_descriptor(map_pages: Map, open_file: Callable[..., int]) -> None:
    """As an unprivileged process must: without /proc/self/map_files."""
    memfd = open_file("memfd")
    address = map_pages(memfd)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)
    mapping = judge(address, address + LENGTH).mapping
    assert mapping is not None
    assert list(seals._own_descriptors(mapping)) == [memfd]
    assert seals.seals_of(mapping) == fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
@pytest.mark.parametrize("where", ["disk", "/dev/shm"])
def test_a_file_is_a_blind_spot_to_accept(
    device: usermm.Ummunotify, map_pages: Map, open_file: Callable[..., int], kind: int, where: str
) -> None:
    address = map_pages(open_file() if where == "disk" else open_file(where), kind)
    message = _refused(device, address)
    assert f"usermm-test-{os.getpid()}" in message
    assert "accept_file_memory=True" in message
    _watched(device, address, accept_file_memory=True)


@pytest.mark.parametrize("accept", [False, True])
def test_a_shared_mapping_of_a_read_only_descriptor_is_refused(
    device: usermm.Ummunotify, map_pages: Map, open_file: Callable[..., int], accept: bool
) -> None:
    address = map_pages(open_file(flags=os.O_RDONLY), prot=mmap.PROT_READ)
    message = _refused(device, address, accept_file_memory=accept)
    assert "without write permission" in message
    assert "MAP_PRIVATE" in message


@pytest.mark.parametrize("name", ["[vdso]", "[vvar]"])
def test_pages_of_the_kernel_are_refused(device: usermm.Ummunotify, name: str) -> None:
    starts = [line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    if not starts:
        pytest.skip(f"this kernel maps no {name}")
    with pytest.raises(usermm.UnwatchableError, match="kernel's own page"):
        device.register_range(int(starts[0], 16), int(starts[0], 16) + PAGE)


def test_an_io_uring_is_refused(device: usermm.Ummunotify) -> None:
    try:
        ring = Ring(1)
    except usermm.DeviceError as error:
        pytest.skip(f"no io_uring here: {error.strerror}")
    with ring, open("/proc/self/maps", encoding="utf-8") as maps:
        start, end = next(line.split()[0].split("-") for line in maps if "[io_uring]" in line)
        with pytest.raises(usermm.UnwatchableError, match="ring of io_uring"):
            device.register_range(int(start, 16), int(end, 16))


def test_secret_memory_is_refused(device: usermm.Ummunotify, map_pages: Map) -> None:
    secret = _libc.syscall(447, os.O_CLOEXEC)  # memfd_secret, the same number everywhere (Linux 5.14)
    if secret < 0:
        pytest.skip("no memfd_secret(2) here: boot with secretmem.enable=1 (the default since Linux 6.5)")
    try:
        os.ftruncate(secret, LENGTH)
        address = map_pages(secret)
    finally:
        os.close(secret)
    assert "memfd_secret" in _refused(device, address)


def test_droppable_memory_is_refused(device: usermm.Ummunotify) -> None:
    address = _libc.mmap(None, LENGTH, READ_WRITE, 0x08 | mmap.MAP_ANONYMOUS, -1, 0)  # MAP_DROPPABLE
    if address == ctypes.c_void_p(-1).value:
        pytest.skip("no MAP_DROPPABLE here: Linux 6.11")
    assert "MAP_DROPPABLE" in _refused(device, address)
    _libc.munmap(address, LENGTH)


def test_the_worst_of_several_mappings_is_named(map_pages: Map, open_file: Callable[..., int]) -> None:
    address = map_pages()
    placed = _libc.mmap(address + PAGE, PAGE, READ_WRITE, mmap.MAP_SHARED | 0x10, open_file("memfd"), 0)  # MAP_FIXED
    assert placed == address + PAGE
    verdict = judge(address, address + LENGTH)
    assert verdict.kind is Kind.BLIND_SPOT
    assert verdict.mapping is not None
    assert verdict.mapping.start == placed


def test_judging_leaves_no_descriptor(map_pages: Map, open_file: Callable[..., int]) -> None:
    address = map_pages(open_file("memfd"))
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(10):
        judge(address, address + LENGTH)
    assert sorted(os.listdir("/proc/self/fd")) == before
