"""`_core.Memory`: copies that the kernel does not make in one call."""

from __future__ import annotations

import contextlib
import os

import pytest

from usermm._core import Memory

PAGE = 4096


@pytest.mark.skipif(os.environ.get("USERMM_STRESS") != "1", reason="takes 7 GiB of memory: USERMM_STRESS=1 runs it")
def test_copies_longer_than_one_system_call_makes() -> None:
    """The kernel ends one after 2 GiB less a page (MAX_RW_COUNT)."""
    file = os.memfd_create("long")
    length = (2 << 30) + 2 * PAGE
    os.ftruncate(file, length)
    with contextlib.closing(Memory([(file, 0, length)], writable=True, shared=True, inherit=False)) as memory:
        data = bytearray(length)
        data[:4], data[-4:] = b"head", b"tail"
        memory.write(0, data)
        del data
        assert (memory.read(0, 4), memory.read(length - 4, 4)) == (b"head", b"tail")
        copy = memory.read()
        assert (len(copy), copy[:4], copy[-4:]) == (length, b"head", b"tail")
        memory.detach()
        os.ftruncate(file, 0)
        assert (memory.read(0, 4), memory.read(length - 4, 4)) == (b"head", b"tail")
    os.close(file)
