"""Memory that can change unseen, or is somebody else's: refused by name, with nothing registered."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.arena import Arena
from support.caches import PAGE, cache_over
from support.calls import refused_line
from support.foreign import foreign_userfaultfd

import usermm
from usermm import UnwatchableError, WatchedElsewhereError
from usermm.testing import ScriptedRegistrar
from usermm.ummunotify.seals import F_SEAL_FUTURE_WRITE

Cache = usermm.RegistrationCache[object]


@pytest.fixture
def cache() -> Iterator[Cache]:
    """After the refusals of the test: nothing was registered, nothing is there, and other memory works."""
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        yield cache
        assert registrar.calls == []
        assert (cache.stats().pinned, cache.stats().registrations) == (0, 0)
        cache.get(bytearray(5000))



@contextlib.contextmanager
def _memfd(length: int, *seals: int) -> Iterator[int]:
    descriptor = os.memfd_create("usermm-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, length)
        for seal in seals:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
        yield descriptor
    finally:
        os.close(descriptor)


def test_file_memory_is_refused_by_name_unless_it_is_accepted(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(PAGE))
    mapped = np.memmap(path, np.uint8, "r+")
    line = refused_line(lambda: cache.get(mapped), UnwatchableError, errno.EOPNOTSUPP)
    assert str(path) in line
    assert "accept_file_memory=True" in line
    with cache_over(ScriptedRegistrar(), accept_file_memory=True) as accepting, accepting.get(mapped) as registration:
        assert registration.valid
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
        assert not registration.valid


def test_a_sealed_memfd_is_as_good_as_any_memory() -> None:
    with _memfd(PAGE) as descriptor, cache_over(ScriptedRegistrar()) as cache:
        mapped = mmap.mmap(descriptor, PAGE)
        assert "F_SEAL_SHRINK" in refused_line(lambda: cache.get(mapped), UnwatchableError)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)
        with cache.get(mapped) as registration:
            assert (registration.handle, registration.valid) == (1, True)
            mapped.madvise(mmap.MADV_DONTNEED)
            assert not registration.valid


@pytest.mark.parametrize("accept", [False, True])
def test_a_system_v_segment_is_refused_whatever_is_accepted(accept: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    identifier = libc.shmget(0, PAGE, 0o1600)
    address = libc.shmat(identifier, None, 0)
    libc.shmctl(identifier, 0, None)
    registrar = ScriptedRegistrar()
    with cache_over(registrar, accept_file_memory=accept) as cache:
        memory = SimpleNamespace(address=address, size=PAGE)
        assert "System V" in refused_line(lambda: cache.get(memory), UnwatchableError)
    assert registrar.calls == []
    libc.shmdt(ctypes.c_void_p(address))


def test_memory_of_which_a_part_is_a_file(cache: Cache) -> None:
    with contextlib.closing(Arena()) as arena, _memfd(PAGE) as descriptor:
        start = arena.mmap(arena.start, 4 * PAGE)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
        libc.mmap(ctypes.c_void_p(start + 2 * PAGE), ctypes.c_size_t(PAGE), 3, flags, descriptor, ctypes.c_long(0))
        memory = SimpleNamespace(address=start, size=4 * PAGE)
        assert "/memfd:usermm-test" in refused_line(lambda: cache.get(memory), UnwatchableError)
        memory.size = 2 * PAGE
        cache.explain(memory)
        arena.munmap(start + 2 * PAGE, PAGE)


def test_memory_of_another_userfaultfd(cache: Cache) -> None:
    with contextlib.closing(Arena()) as arena:
        start = arena.mmap(arena.start, 4 * PAGE)
        memory = SimpleNamespace(address=start, size=4 * PAGE)
        with foreign_userfaultfd(start + PAGE, start + 2 * PAGE):
            line = refused_line(lambda: cache.get(memory), WatchedElsewhereError, errno.EBUSY)
            assert "another userfaultfd" in line
