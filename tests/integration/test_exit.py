"""The end of the interpreter with devices alive and threads busy, and interpreters inside the process.

Every program must end by itself, with its own status and nothing on stderr.
"""

from __future__ import annotations

import shutil
import signal
import textwrap
from pathlib import Path

import pytest
from support.processes import run_program, run_quietly

_HEAD = """
import atexit, gc, mmap, os, signal, sys, threading, time
import numpy as np
import usermm
from usermm import _core

def churn(device):
    while True:
        block = mmap.mmap(-1, 1 << 20)
        array = np.empty(33 << 20, np.uint8)
        cookies = [device.register(block), device.register(array)]
        block.close()
        del array
        for cookie in cookies:
            device.unregister(cookie)

def read_for_ever(device):
    while True:
        device.read()

def daemon(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread

"""

_BUSY = """
device = usermm.Ummunotify()
daemon(churn, device)
daemon(read_for_ever, device)
"""

_ENDS = {
    "a live device": """
        device = usermm.Ummunotify()
        array = np.empty(33 << 20, np.uint8)
        device.register(array)
    """,
    "a live device with watched memory in a cycle": """
        device = usermm.Ummunotify()
        cycle = [device, np.empty(33 << 20, np.uint8)]
        device.register(cycle[1])
        cycle.append(cycle)
    """,
    "a mapped page that outlives everything": """
        device = usermm.Ummunotify()
        page = device.mmap()
        sys.modules["usermm"].page = page
    """,
    "the whole heap watched": """
        device = usermm.Ummunotify()
        for line in open("/proc/self/maps"):
            if "[heap]" in line:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                device.register_range(start, end)
        junk = [bytearray(100_000) for _ in range(1000)]
    """,
    "every mapping watched that can be": """
        device = usermm.Ummunotify()
        for line in open("/proc/self/maps"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            try:
                device.register_range(start, end, accept_file_memory=True)
            except usermm.UsermmError:
                pass
        threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]
        for thread in threads:
            thread.start()
    """,
    "daemon threads that read": """
        device = usermm.Ummunotify()
        for _ in range(4):
            daemon(read_for_ever, device)
        time.sleep(0.05)
    """,
    "daemon threads that read with a timeout": """
        device = usermm.Ummunotify()
        def poll():
            while True:
                device.read(timeout=0.0005)
        for _ in range(4):
            daemon(poll)
        time.sleep(0.05)
    """,
    "daemon threads that register and free": """
        devices = [usermm.Ummunotify() for _ in range(3)]
        for device in devices:
            daemon(churn, device)
            daemon(read_for_ever, device)
        time.sleep(0.1)
    """,
    "daemon threads that open and drop": """
        def open_and_drop():
            while True:
                with usermm.Ummunotify() as device:
                    device.register(bytearray(1 << 20))
                usermm.Ummunotify()
        for _ in range(3):
            daemon(open_and_drop)
        time.sleep(0.1)
    """,
    "daemon threads that ask": """
        device = usermm.Ummunotify()
        def ask():
            while True:
                device.check(device.generation)
        for _ in range(3):
            daemon(ask)
        time.sleep(0.05)
    """,
    "sys.exit in a thread": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        thread = threading.Thread(target=lambda: sys.exit(3))
        thread.start()
        thread.join()
    """,
    "sys.exit in the main thread": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        daemon(read_for_ever, device)
        time.sleep(0.05)
        sys.exit(3)
    """,
    "a thread that is no daemon and is told to stop at exit": """
        device = usermm.Ummunotify()
        def read():
            try:
                device.read()
            except usermm.ClosedError:
                print("closed")
        threading.Thread(target=read).start()
        threading._register_atexit(device.close)
    """,
    "os._exit": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        daemon(read_for_ever, device)
        time.sleep(0.05)
        os._exit(3)
    """,
    "use at exit": """
        device = usermm.Ummunotify()
        daemon(churn, usermm.Ummunotify())
        def last():
            array = np.empty(33 << 20, np.uint8)
            seen = device.generation
            device.register(array, 1)
            del array
            assert not device.check(seen)
            assert device.read(timeout=0)[0].cookie == 1
            with usermm.Ummunotify() as another:
                assert another.check(0)
        atexit.register(last)
    """,
    "use by a finalizer after the modules went": """
        class Late:
            def __init__(self):
                self.device = usermm.Ummunotify()
                self.block = mmap.mmap(-1, 1 << 20)
                self.device.register(self.block)
            def __del__(self):
                self.block.close()
                if self.device.generation != 1:
                    os._exit(9)
                self.device.close()
        late = Late()
        late.me = late
    """,
    "an error that tells of itself": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        try:
            device.unregister(5)
        except usermm.CookieError as error:
            kept = error
    """,
    "a forked child that ends by itself": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """,
    "another program in its place": """
        device = usermm.Ummunotify()
        daemon(churn, device)
        daemon(read_for_ever, device)
        time.sleep(0.05)
        os.execv("/bin/sh", ["sh", "-c", "exit 3"])
    """,
}

_STATUS = {"sys.exit in the main thread": 3, "os._exit": 3, "another program in its place": 3}


@pytest.mark.parametrize("end", _ENDS)
def test_a_program_ends(tmp_path: Path, end: str) -> None:
    run_quietly(_HEAD + textwrap.dedent(_ENDS[end]), tmp_path, status=_STATUS.get(end, 0))


def test_an_unhandled_exception_is_all_that_is_seen(tmp_path: Path) -> None:
    done = run_program(_HEAD + _BUSY + "device.unregister(5)\n", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert done.stderr.splitlines()[-1].startswith("usermm.errors.CookieError: [Errno 22] unregister(5): ")
    assert done.stderr.count("Traceback") == 1


def test_a_fatal_signal_ends_it_as_any_program(tmp_path: Path) -> None:
    text = _HEAD + _BUSY + "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(20)\n"
    assert run_program(text, tmp_path).returncode == -signal.SIGTERM


def test_an_interrupt_ends_a_blocking_read(tmp_path: Path) -> None:
    interrupted = """
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        usermm.Ummunotify().read()
    """
    done = run_program(_HEAD + textwrap.dedent(interrupted), tmp_path)
    assert done.returncode in (1, -signal.SIGINT)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_limit_of_descriptors_lowered_meanwhile_does_not_hang_the_close(tmp_path: Path) -> None:
    """A descriptor number at or above RLIMIT_NOFILE cannot be replaced (dup3), and the reader's own stack is watched.

    The end of a thread discards its stack: the reader waited for itself, and close() for the reader.
    """
    text = """
        import resource, subprocess
        import usermm
        device = usermm.Ummunotify()
        for line in open("/proc/self/maps"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            try:
                device.register_range(start, end, accept_file_memory=True)
            except usermm.UsermmError:
                pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
        device.close()
    """
    run_quietly(text, tmp_path, timeout_s=5)


# Interpreters inside the process

_INSIDE = """
import sys

if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    def run(identifier, text):
        error = interpreters.run_string(identifier, text)
        if error is not None:
            raise RuntimeError(error.formatted)
else:
    import _xxsubinterpreters as interpreters
    run = interpreters.run_string

def create(isolated):
    if sys.version_info >= (3, 13):
        return interpreters.create("isolated" if isolated else "legacy")
    return interpreters.create(isolated=isolated)

use = '''
import mmap
try:
    import usermm
except ImportError as error:
    print("refused")
else:
    with usermm.Ummunotify() as device:
        block = mmap.mmap(-1, 1 << 20)
        device.register(block, 7)
        block.close()
        assert device.generation == 1 and not device.check(0), device.generation
        assert [event.cookie for event in device.read(timeout=0)[:1]] == [7]
        try:
            device.unregister(8)
        except usermm.CookieError:
            pass
    left = usermm.Ummunotify()
    left.register(mmap.mmap(-1, 1 << 20))
    print("works")
'''

def use_here():
    import mmap
    import usermm
    with usermm.Ummunotify() as device:
        block = mmap.mmap(-1, 1 << 20)
        device.register(block, 7)
        block.close()
        assert device.generation == 1
        try:
            device.unregister(8)
        except usermm.CookieError:
            pass

isolated = sys.argv[1:] != ["legacy"] and MODE != "legacy"
if FIRST == "main":
    use_here()
for _ in range(5):
    identifier = create(isolated)
    run(identifier, use)
    run(identifier, use)
    interpreters.destroy(identifier)
use_here()

import usermm
live = usermm.Ummunotify()
identifier = create(isolated)
run(identifier, use)
interpreters.destroy(identifier)
assert live.check(0)
live.close()
from usermm import _core
counts = _core.counts()
assert counts["devices"] == counts["regions"] == 0, counts
"""


# 3.12.1 aborts at its end with "free(): invalid pointer" after this, without any module of ours.
_CONTROL = """
import sys
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    identifier = interpreters.create("isolated")
else:
    import _xxsubinterpreters as interpreters
    identifier = interpreters.create()
interpreters.run_string(identifier, "import asyncio")
interpreters.destroy(identifier)
"""


def _pythons() -> list[str]:
    """Interpreters of 3.11 and later, under the names that distributions and pyenv give them."""
    names = ("3.11", "3.12", "3.13")
    found = {name: shutil.which(f"python{name}") for name in names}
    for name in names:
        for path in sorted((Path.home() / ".pyenv" / "versions").glob(f"{name}.*/bin/python{name}")):
            found[name] = str(path)
    return [f"{name}={path or ''}" for name, path in found.items()]


@pytest.mark.parametrize("first", ["main", "inside"])
@pytest.mark.parametrize("mode", ["isolated", "legacy"])
@pytest.mark.parametrize("python", _pythons(), ids=lambda text: text.split("=")[0])
def test_subinterpreters_work_or_are_refused(tmp_path: Path, python: str, mode: str, first: str) -> None:
    name, path = python.split("=")
    if not path:
        pytest.skip(f"no Python {name} here: install it as python{name}, or with pyenv")
    control = _CONTROL if mode == "isolated" else "print()"
    if run_program(control, tmp_path, python=path).returncode < 0:
        pytest.skip(f"this Python {name} dies by itself after `import asyncio` in an isolated interpreter")
    text = _INSIDE.replace("MODE", repr(mode)).replace("FIRST", repr(first))
    output = run_quietly(text, tmp_path, python=path, options=("-W", "ignore"))
    assert set(output.split()) <= {"works", "refused"}
    if mode == "legacy":
        assert set(output.split()) == {"works"}
