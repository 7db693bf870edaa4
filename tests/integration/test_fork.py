"""A forked child: the parent's devices say so, cost nothing, and do not stand in the way of its own."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.calls import CALLS, refused_line
from support.processes import fork, in_child, run_quietly

import usermm
from usermm import _core

MEBIBYTE = 1 << 20


@pytest.fixture
def device() -> Iterator[usermm.Ummunotify]:
    with usermm.Ummunotify() as device:
        yield device


def _sees_a_free(device: usermm.Ummunotify) -> bool:
    block = mmap.mmap(-1, MEBIBYTE)
    cookie = device.register(block)
    seen = device.generation
    block.close()
    # More than one once another thread was given the address, since the region is still registered.
    hit = not device.check(seen) and device.generation > seen
    events = device.read(timeout=0)
    device.unregister(cookie)
    return hit and [type(event) for event in events] == [usermm.Invalidation, usermm.Last]


@pytest.mark.parametrize("name", CALLS)
def test_every_method_raises_forked_error_in_a_child(device: usermm.Ummunotify, name: str) -> None:
    line = in_child(lambda: refused_line(lambda: CALLS[name](device), usermm.ForkedError, errno.ECHILD))
    assert "open a new one in this child" in line


def test_the_child_may_close_the_parents_device(device: usermm.Ummunotify) -> None:
    def close_twice() -> None:
        device.close()
        device.close()

    in_child(close_twice)
    assert not device.closed
    assert _sees_a_free(device)


def test_a_with_block_may_end_in_the_child(device: usermm.Ummunotify) -> None:
    def leave() -> None:
        with device:
            pass

    in_child(leave)
    assert _sees_a_free(device)


def test_closed_tells_in_the_child_whether_close_was_called(device: usermm.Ummunotify) -> None:
    def close_and_ask() -> tuple[bool, bool]:
        before = device.closed
        device.close()
        return before, device.closed

    assert in_child(close_and_ask) == (False, True)


def test_a_device_closed_before_the_fork_is_closed_in_the_child() -> None:
    device = usermm.Ummunotify()
    device.close()
    assert in_child(lambda: device.closed)


def test_the_child_may_drop_the_parents_device() -> None:
    devices = [usermm.Ummunotify()]
    assert in_child(devices.clear) is None
    assert _sees_a_free(devices[0])
    devices[0].close()


def _links() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return links


def test_the_childs_copies_of_the_monitors_descriptors_are_closed(device: usermm.Ummunotify) -> None:
    before = _links()
    assert "anon_inode:[userfaultfd]" in before
    links = in_child(_links)
    assert "anon_inode:[userfaultfd]" not in links
    assert f"/proc/{os.getpid()}/maps" not in links
    assert not device.closed


def test_closing_in_the_child_closes_the_childs_descriptors(device: usermm.Ummunotify) -> None:
    number = device.fileno()

    def close_and_look() -> bool:
        device.close()
        return os.path.exists(f"/proc/self/fd/{number}")

    assert in_child(close_and_look) is False


def test_closing_in_the_child_does_so_also_when_a_thread_of_the_parent_was_reading(device: usermm.Ummunotify) -> None:
    """The reading thread does not exist in the child: nobody else would ever close the descriptor that it waited on."""
    number = device.fileno()
    thread = threading.Thread(target=lambda: device.read(timeout=5))
    thread.start()
    time.sleep(0.05)

    def close_and_look() -> bool:
        device.close()
        return os.path.exists(f"/proc/self/fd/{number}")

    left = in_child(close_and_look)
    assert _sees_a_free_by_reader(device, thread)
    assert left is False


def _sees_a_free_by_reader(device: usermm.Ummunotify, reader: threading.Thread) -> bool:
    block = mmap.mmap(-1, MEBIBYTE)
    device.register(block)
    block.close()
    reader.join(5)
    return not reader.is_alive()


def test_the_parents_unmaps_do_not_wait_for_the_child(device: usermm.Ummunotify) -> None:
    read_end, write_end = os.pipe()
    child = fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)  # stands still, with whatever it inherited, until the parent is done
        os._exit(0)
    try:
        started = time.monotonic()
        for _ in range(200):
            assert _sees_a_free(device)
        assert time.monotonic() - started < 5
    finally:
        os.close(read_end)
        os.close(write_end)
        os.waitpid(child, 0)


def test_the_childs_unmaps_neither_wait_nor_reach_the_parent(device: usermm.Ummunotify) -> None:
    blocks = [np.empty(64 * MEBIBYTE, np.uint8) for _ in range(4)]
    for block in blocks:
        device.register(block)
    seen = device.generation
    del block

    def free_all() -> float:
        started = time.monotonic()
        blocks.clear()
        return time.monotonic() - started

    assert in_child(free_all) < 1
    assert device.check(seen)
    assert device.read(timeout=0) == []


def test_the_childs_own_device_works_beside_the_inherited_one(device: usermm.Ummunotify) -> None:
    def own() -> bool:
        with usermm.Ummunotify() as mine:
            good = _sees_a_free(mine)
            refused_line(lambda: device.generation, usermm.ForkedError, errno.ECHILD)
            return good and _core.counts()["devices"] == 1

    assert in_child(own)
    assert _core.counts()["devices"] == 1
    assert _sees_a_free(device)


def test_a_grandchild_starts_anew_too(device: usermm.Ummunotify) -> None:
    def child() -> bool:
        with usermm.Ummunotify() as mine:
            line = in_child(lambda: refused_line(lambda: mine.generation, usermm.ForkedError, errno.ECHILD))
            refused_line(lambda: device.check(0), usermm.ForkedError, errno.ECHILD)
            return "child" in line and in_child(_child_of_its_own) and _sees_a_free(mine)

    assert in_child(child)


def _child_of_its_own() -> bool:
    with usermm.Ummunotify() as own:
        return _sees_a_free(own)


def test_forks_among_busy_threads(device: usermm.Ummunotify) -> None:
    """Another thread may hold any of the monitor's locks at the moment of the fork."""
    stop = threading.Event()

    def churn() -> None:
        with usermm.Ummunotify() as own:
            while not stop.is_set():
                assert _sees_a_free(own)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert in_child(_child_of_its_own)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert _sees_a_free(device)


def test_async_iteration_over_the_parents_device_is_refused_in_the_child(device: usermm.Ummunotify) -> None:
    def iterate() -> str:
        return refused_line(lambda: device.__aiter__().__anext__().send(None), usermm.ForkedError, errno.ECHILD)

    assert in_child(iterate)


def test_programs_start_beside_a_live_device(device: usermm.Ummunotify) -> None:
    block = mmap.mmap(-1, MEBIBYTE)
    device.register(block)
    seen = device.generation
    listing = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    plain = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    inheriting = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True, close_fds=False
    )
    assert inheriting.stderr == ""
    assert len(eval(inheriting.stdout)) <= len(eval(plain.stdout)) + _inheritable()
    running = subprocess.Popen(["sleep", "30"])
    try:
        assert device.check(seen)
        assert _sees_a_free(device)
    finally:
        running.kill()
        running.wait()
    block.close()


def _inheritable() -> int:
    """Descriptors that this process got from its own starter and hands on."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                count += os.get_inheritable(int(name))
            except OSError:
                continue
    return count


_POOLS = """
    import multiprocessing
    import sys
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)

    import mmap

    import usermm
    from usermm import _core

    inherited = None


    def free_one(number):
        with usermm.Ummunotify() as device:
            block = mmap.mmap(-1, 1 << 20)
            device.register(block, number)
            seen = device.generation
            block.close()
            assert not device.check(seen)
            assert device.read(timeout=0)[0].cookie == number
            assert _core.counts()["devices"] == 1
        return number


    def ask_the_inherited(queue):
        try:
            queue.put(inherited.generation if inherited else "none")
        except usermm.ForkedError as error:
            queue.put(error.errno)


    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1] if len(sys.argv) > 1 else METHOD)
        with usermm.Ummunotify() as inherited:
            free_one_here = mmap.mmap(-1, 1 << 20)
            inherited.register(free_one_here, 5)
            with context.Pool(2) as pool:
                assert pool.map(free_one, range(12)) == list(range(12))
                pool.close()
                pool.join()
            queue = context.Queue()
            process = context.Process(target=ask_the_inherited, args=(queue,))
            process.start()
            answer = queue.get(timeout=20)
            process.join(20)
            assert process.exitcode == 0, process.exitcode
            queue.close()
            queue.join_thread()
            assert inherited.generation == 0
            free_one_here.close()
            assert inherited.generation == 1
            print(answer)
"""


@pytest.mark.parametrize(
    ("method", "answer"), [("fork", str(errno.ECHILD)), ("spawn", "none"), ("forkserver", "none")]
)
def test_multiprocessing(tmp_path: Path, method: str, answer: str) -> None:
    text = _POOLS.replace("METHOD", repr(method))
    assert run_quietly(text, tmp_path, timeout_s=60).strip() == answer
