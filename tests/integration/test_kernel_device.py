"""`Ummunotify` over a node: which monitor is taken, and what the Python half of the kernel's device adds.

Under the preload library, in processes of their own. The ABI itself is tested by tests/conformance.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.available import needs_userfaultfd
from support.calls import refused_line
from support.nodes import show_nodes
from support.preload import needs_preload
from support.processes import TESTS, run_quietly

import usermm
from usermm.uapi import ummunotify

HEADER = """
import asyncio, contextlib, ctypes, errno, gc, mmap, os, signal, tempfile, threading, time
import usermm
from support.processes import in_child

MEBIBYTE = 1 << 20

def refused(kind, call):
    try:
        answer = call()
    except kind as error:
        assert type(error) is kind and "\\n" not in str(error), error
        return str(error)
    raise SystemExit(f"accepted: {answer!r}")

def sees_a_free(device):
    block = mmap.mmap(-1, MEBIBYTE)
    cookie = device.register(block)
    seen = device.generation
    assert device.check(seen)
    block.close()
    hit = not device.check(seen) and device.generation > seen
    events = device.read(timeout=0)
    device.unregister(cookie)
    return hit and events[0].cookie == cookie and type(events[-1]) is usermm.Last
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """Runs a program under the preload library; its output. Nothing may come to its stderr."""
    show_nodes(monkeypatch)
    return lambda text: run_quietly(HEADER + textwrap.dedent(text), tmp_path)


# Which monitor


@needs_userfaultfd
def test_without_a_node_the_device_is_made_here() -> None:
    if os.path.exists(ummunotify.DEVICE_PATH):
        pytest.skip(f"there is a {ummunotify.DEVICE_PATH}: run it on a kernel without the driver")
    with usermm.Ummunotify() as device:
        assert device.monitor == "userfaultfd"
    line = refused_line(lambda: usermm.Ummunotify(monitor="kernel"), usermm.DeviceError, errno.ENOENT)
    assert ummunotify.DEVICE_PATH in line


@pytest.mark.parametrize("monitor", ["", "Kernel", None, 2])
def test_a_monitor_that_there_is_not(monitor: Any) -> None:
    assert "monitor" in refused_line(lambda: usermm.Ummunotify(monitor=monitor), usermm.ArgumentError)


def _file(path: Path) -> str:
    path.write_bytes(bytes(4096))
    return str(path)


def _fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


OTHERS: dict[str, Callable[[Path], str]] = {
    "a file": _file,
    "a pipe": _fifo,
    "a device that maps zeros": lambda _: "/dev/zero",
    "a device that does not map": lambda _: "/dev/null",
}


@needs_userfaultfd
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_at_the_path_and_is_not_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A page that never moves would mean that nothing ever changed: the device must answer before it is believed."""
    monkeypatch.setattr(ummunotify, "DEVICE_PATH", OTHERS[name](tmp_path / "node"))
    refused_line(lambda: usermm.Ummunotify(monitor="kernel"), usermm.DeviceError, errno.ENODEV)
    with usermm.Ummunotify() as device:
        assert device.monitor == "userfaultfd"


@needs_preload
def test_a_node_is_taken_where_there_is_one(run: Callable[[str], str]) -> None:
    text = """
    for abi in (1, 2):
        with usermm.Ummunotify(abi) as device:
            assert isinstance(device, usermm.Ummunotify)
            print(device.monitor, sees_a_free(device), device.generation)
        with usermm.Ummunotify(abi, monitor="userfaultfd") as device:
            print(device.monitor)
    """
    assert run(text).split("\n")[:-1] == ["kernel True 1", "userfaultfd"] * 2


@needs_preload
def test_a_subclass_of_a_user(run: Callable[[str], str]) -> None:
    text = """
    class Mine(usermm.Ummunotify):
        def read(self, timeout=None):
            return ["mine", *super().read(timeout)]

    for monitor in ("auto", "kernel", "userfaultfd"):
        with Mine(monitor=monitor) as device:
            device.note = type(device).__name__
            assert isinstance(device, Mine) and isinstance(device, usermm.Ummunotify)
            print(device.monitor, device.note, device.read(0))
    """
    assert run(text) == "kernel Mine ['mine']\nkernel Mine ['mine']\nuserfaultfd Mine ['mine']\n"


# Arguments, and what else is the same for every monitor: the tests of the other one


ELSEWHERE = (
    "takes_every_range",  # counts the regions of libusermm in this process
    "another_interface_version",
    "check too much",  # Python itself refuses it, by TypeError
    "check unknown",
    "check nothing",
    "watch too few",
    "unregister nothing",
    "test_select_and_poll",  # polls with nothing in between: docs/abi.md, difference 5
    "test_epoll_tells_when_there_is_something",
)


@needs_preload
def test_arguments_are_refused_as_by_the_other_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's tests, those of asyncio too."""
    show_nodes(monkeypatch)
    files = [TESTS / "unit" / "test_arguments.py", TESTS / "integration" / "test_asyncio.py"]
    chosen = " and ".join(f"not ({' and '.join(name.split())})" for name in ELSEWHERE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *map(str, files)]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


@needs_preload
def test_memory_with_blind_spots_is_refused_where_a_userfaultfd_is_behind(run: Callable[[str], str]) -> None:
    """A driver would see the file shrink. The preload library does not, so the promise of register() needs a look."""
    text = """
    with usermm.Ummunotify() as device, tempfile.TemporaryFile() as file:
        file.write(bytes(4096))
        file.flush()
        memory = mmap.mmap(file.fileno(), 4096)
        assert "accept_file_memory" in refused(usermm.UnwatchableError, lambda: device.register(memory, 5))
        refused(usermm.CookieError, lambda: device.unregister(5))
        device.unregister(device.register(memory, 5, accept_file_memory=True))
        assert "nothing is mapped" in refused(usermm.DeviceError, lambda: device.register_range(4096, 8192))
        refused(usermm.CookieError, lambda: device.unregister(5))
        print("ok")
    """
    assert run(text) == "ok\n"


# Closing


@needs_preload
def test_close_ends_every_wait(run: Callable[[str], str]) -> None:
    """Closing a descriptor wakes nobody who waits on it: that takes a second one."""
    text = """
    def wait_in(call):
        device = usermm.Ummunotify()
        ended = []
        def wait():
            try:
                call(device)
            except usermm.ClosedError as error:
                ended.append(error.errno)
        threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        device.close()
        for thread in threads:
            thread.join(5)
        return ended == [errno.EBADF] * 3

    room = ctypes.create_string_buffer(4096)
    print(wait_in(lambda device: device.read()), wait_in(lambda device: device.read_bytes(0)))
    print(wait_in(lambda device: device.readinto(ctypes.addressof(room), 4096)))

    async def iterate(device):
        async for _ in device:
            pass

    async def close_meanwhile():
        device = usermm.Ummunotify()
        task = asyncio.create_task(iterate(device))
        await asyncio.sleep(0.05)
        device.close()
        await asyncio.wait_for(task, 5)
        return True

    print(asyncio.run(close_meanwhile()))

    device = usermm.Ummunotify()
    signal.signal(signal.SIGALRM, lambda *_: device.close())
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    refused(usermm.ClosedError, device.read)
    """
    assert run(text).split() == ["True"] * 4


@needs_preload
def test_nothing_is_left_behind(run: Callable[[str], str]) -> None:
    text = """
    def look():
        gc.collect()
        return sorted(os.listdir("/proc/self/fd")), len(open("/proc/self/maps").readlines())

    def use():
        with usermm.Ummunotify() as device:
            assert sees_a_free(device)
            page = device.mmap(8)
        assert page[0] == 1, "the mapping outlives the device"
        usermm.Ummunotify().register(bytearray(8192))  # dropped open
        refused(usermm.DeviceError, lambda: usermm.Ummunotify(flags=os.O_RDWR))

    for _ in range(20):
        use()
    before = look()
    for _ in range(200):
        use()
    descriptors, mappings = look()
    assert descriptors == before[0], (descriptors, before[0])
    assert mappings <= before[1] + 20, (mappings, before[1])
    """
    run(text)


# Children


@needs_preload
def test_a_child_opens_its_own(run: Callable[[str], str]) -> None:
    """The preload library answers ECHILD for the parent's device; what the page would tell is about other memory."""
    text = """
    device = usermm.Ummunotify(flags=os.O_NONBLOCK)
    memory = mmap.mmap(-1, 4096)
    device.register(memory, 1)

    def child():
        from usermm.uapi import ummunotify
        argument = ummunotify.COOKIE.pack(1)
        for call in (
            lambda: device.generation,
            lambda: device.check(0),
            lambda: device.register(memory),
            lambda: device.unregister(1),
            lambda: device.read(0),
            lambda: device.read_bytes(),
            lambda: device.ioctl(ummunotify.UNREGISTER_REGION, argument),
            lambda: device.__aiter__().__anext__().send(None),
        ):
            assert "open a new one in this child" in refused(usermm.ForkedError, call)
        with usermm.Ummunotify() as own:
            good = own.monitor == "kernel" and sees_a_free(own)
        assert not device.closed
        device.close()
        device.close()
        return good and device.closed

    assert in_child(child)
    assert not device.closed and sees_a_free(device)

    waiting = usermm.Ummunotify()
    thread = threading.Thread(target=waiting.read, daemon=True)
    thread.start()
    time.sleep(0.05)
    number = waiting.fileno()
    def close_and_look():
        waiting.close()
        return os.path.exists(f"/proc/self/fd/{number}")
    assert in_child(close_and_look) is False
    assert thread.is_alive(), "the child ended a wait of the parent"
    print("ok")
    """
    assert run(text) == "ok\n"


@needs_preload
def test_forks_among_busy_threads(run: Callable[[str], str]) -> None:
    """A thread may hold the lock of node.py at the moment of the fork."""
    text = """
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            with usermm.Ummunotify() as own:
                for _ in range(20):
                    assert sees_a_free(own)

    def child():
        with usermm.Ummunotify() as own:
            return sees_a_free(own)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    print(all(in_child(child) for _ in range(30)))
    stop.set()
    for thread in threads:
        thread.join()
    """
    assert run(text) == "True\n"


@needs_preload
def test_a_device_is_neither_copied_nor_pickled(run: Callable[[str], str]) -> None:
    text = """
    import copy, pickle
    with usermm.Ummunotify() as device:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            assert "copy" in refused(TypeError, lambda: call(device))
    """
    run(text)


# The doctor


@needs_preload
def test_the_doctor_names_it_and_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    show_nodes(monkeypatch)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src")}
    command = [sys.executable, "-m", "usermm", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    part = done.stdout.partition("monitor kernel")[2].partition("io_uring")[0]
    assert f"yes  {ummunotify.DEVICE_PATH}" in part
    assert "NO" not in part
    assert "MISSED" not in part
