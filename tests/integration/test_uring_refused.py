"""What `usermm.uring.Ring` says when the kernel, the container or a limit refuses."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from usermm import uring
from usermm.errors import DeviceError, LimitError, UnavailableError
from usermm.uapi import io_uring as abi
from usermm.uring import Ring


@pytest.fixture
def ring() -> Iterator[Ring]:
    """Here the kernel allows it; and what was refused left no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    try:
        ring = Ring(8)
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    with ring:
        yield ring
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_without_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such system call: what a kernel built without it, or gVisor, answers."""
    monkeypatch.setattr(abi, "SYS_IO_URING_SETUP", 0x7FFF_FFF0)
    with pytest.raises(UnavailableError, match="CONFIG_IO_URING") as caught:
        Ring(1)
    assert caught.value.errno == errno.ENOSYS


def test_a_kernel_that_forbids_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uring, "syscall", lambda *_: -errno.EPERM)
    with pytest.raises(UnavailableError, match=r"seccomp|kernel\.io_uring_disabled=0") as caught:
        Ring(1)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("ring")
def test_a_table_that_is_refused_leaves_no_ring_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.19 sets up the ring and refuses the sparse table."""
    monkeypatch.setattr(abi, "IORING_RSRC_REGISTER_SPARSE", 1 << 31)
    with pytest.raises(DeviceError, match=r"5\.19") as caught:
        Ring(1)
    assert caught.value.errno == errno.EINVAL


def test_no_descriptor_left(ring: Ring) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(ring.fileno())
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(LimitError, match="ulimit -n") as caught:
            Ring(1)
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


MEMLOCK = """
import ctypes, mmap, os, resource, sys
from usermm.errors import LimitError
from usermm.uring import Ring
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
os.setgroups([]), os.setgid(61234), os.setuid(61234)
memory = mmap.mmap(-1, 1 << 19, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with Ring(4) as ring:
    ring.update(0, address, 1 << 19)
    try:
        for slot in (1, 2, 3):
            ring.update(slot, address, 1 << 19)
    except LimitError as error:
        sys.exit(0 if "ulimit -l" in str(error) and error.errno == 12 else str(error))
sys.exit("pinned more than RLIMIT_MEMLOCK")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become a user whose pins are limited")
@pytest.mark.usefixtures("ring")
def test_an_unprivileged_user_meets_the_limit_of_locked_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMLOCK], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
