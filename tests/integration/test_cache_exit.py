"""The end of the interpreter with caches alive; event loops, pools of processes, and interpreters inside the process.

Every program must end by itself, with its own status and nothing on stderr.
"""

from __future__ import annotations

import asyncio
import shutil
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from support.caches import Block, cache_over
from support.processes import run_program, run_quietly

from usermm.testing import ScriptedRegistrar

_HEAD = """
import atexit, gc, mmap, os, signal, sys, threading, time
import numpy as np
import usermm
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

class Registrar:
    traits = Traits()

    def __init__(self, name=""):
        self.name, self.live = name, set()

    def register(self, address, length):
        self.live.add(address)
        return address

    def deregister(self, handle, write=os.write):  # when modules go their names are gone
        self.live.remove(handle)
        write(1, f"{self.name}deregistered ".encode())

def daemon(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread

def churn(cache):
    while True:
        block = mmap.mmap(-1, 1 << 20)
        with cache.get(block) as registration:
            assert registration.handle  # at exit the cache is closed meanwhile, and nothing is valid then
        block.close()

array = np.zeros(1 << 20, np.uint8)

"""

# What the program does, and what it prints.
_ENDS: dict[str, tuple[str, str]] = {
    "nothing asked": ("cache = usermm.RegistrationCache(Registrar())", ""),
    "a cache": (
        """
        cache = usermm.RegistrationCache(Registrar())
        cache.get(array)
        """,
        "deregistered ",
    ),
    "a held registration": (
        """
        cache = usermm.RegistrationCache(Registrar())
        registration = cache.get(array)
        """,
        "deregistered ",
    ),
    "a held registration of a cache that nobody has": (
        "registration = usermm.RegistrationCache(Registrar()).get(array)",
        "deregistered ",
    ),
    "a held registration in another module": (
        """
        sys.registration = usermm.RegistrationCache(Registrar()).get(array)
        usermm.errors.registration = usermm.RegistrationCache(Registrar()).get(array)
        """,
        None,
    ),
    "caches in cycles": (
        """
        for held in (False, True):
            cache = usermm.RegistrationCache(Registrar())
            cycle = [cache, cache.get(array) if held else cache.get(array).address]
            cycle.append(cycle)
            cache.cycle = cycle
            cache.registrar.cycle = cycle
        del cache, cycle
        """,
        None,
    ),
    "a finalizer that uses its cache after the modules went": (
        """
        class Late:
            def __init__(self):
                self.cache, self.array = usermm.RegistrationCache(Registrar()), array
                self.held = self.cache.get(array)
                self.write, self.closed = os.write, usermm.ClosedError
            def __del__(self):
                try:
                    self.cache.get(self.array)
                except self.closed:
                    self.write(1, b"closed ")
                self.held.release()
        late = Late()
        late.me = late
        """,
        "closed deregistered ",
    ),
    "a finalizer that makes its first cache after the modules went": (
        """
        class Late:
            def __init__(self):
                self.make, self.registrar, self.array = usermm.RegistrationCache, Registrar(), array
                self.me = self
            def __del__(self):
                cache = self.make(self.registrar)
                cache.get(self.array).release()
                cache.close()
        late = Late()
        """,
        "deregistered ",
    ),
    "atexit, before the cache closes itself": (
        """
        cache = usermm.RegistrationCache(Registrar())
        @atexit.register
        def last():
            assert cache.get(array).valid
            assert usermm.RegistrationCache(Registrar("new ")).get(array).valid
        """,
        "new deregistered deregistered ",
    ),
    "daemon threads that get": (
        """
        for _ in range(3):
            daemon(churn, usermm.RegistrationCache(ScriptedRegistrar(), max_count=5))
        time.sleep(0.1)
        """,
        "",
    ),
    "a daemon thread inside register": (
        """
        registrar = ScriptedRegistrar()
        cache = usermm.RegistrationCache(registrar)
        registrar.at_register(1, runs=lambda: time.sleep(60))
        daemon(cache.get, array)
        daemon(cache.get, array)
        daemon(cache.get, memoryview(array)[5:9])
        time.sleep(0.1)
        """,
        "",
    ),
    "a daemon thread inside deregister": (
        """
        registrar = ScriptedRegistrar()
        cache = usermm.RegistrationCache(registrar, max_count=1)
        registrar.at_deregister(1, runs=lambda: time.sleep(60))
        cache.get(array)
        daemon(cache.clear)
        time.sleep(0.05)
        daemon(cache.get, bytearray(5000))
        time.sleep(0.05)
        """,
        "",
    ),
    "a daemon thread that never stops unmapping": (
        """
        cache = usermm.RegistrationCache(ScriptedRegistrar(), linger_s=0.01)
        blocks = [mmap.mmap(-1, 4096) for _ in range(2000)]
        for block in blocks:
            cache.get(block)
        def unmap():
            for block in blocks:
                block.close()
        daemon(unmap)
        """,
        "",
    ),
    "sys.exit in the main thread": (
        """
        cache = usermm.RegistrationCache(Registrar())
        cache.get(array)
        daemon(churn, usermm.RegistrationCache(ScriptedRegistrar()))
        time.sleep(0.05)
        sys.exit(3)
        """,
        "deregistered ",
    ),
    "os._exit": (
        """
        cache = usermm.RegistrationCache(Registrar())
        registration = cache.get(array)
        os._exit(3)
        """,
        "",
    ),
    "another program in its place": (
        """
        cache = usermm.RegistrationCache(Registrar())
        registration = cache.get(array)
        os.execv("/bin/sh", ["sh", "-c", "exit 3"])
        """,
        "",
    ),
    "a forked child that ends by itself": (
        """
        cache = usermm.RegistrationCache(Registrar())
        cache.get(array)
        registration = cache.get(memoryview(bytearray(5000)))
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        "deregistered deregistered ",
    ),
    "a forked child with registrations of its own": (
        """
        cache = usermm.RegistrationCache(Registrar())
        cache.get(array)
        child = os.fork()
        if child == 0:
            cache.registrar.name = "child "
            cache.registrar.live.clear()
            cache.get(array)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        "child deregistered deregistered ",
    ),
    "a registrar of another thread": (
        """
        Registrar.traits = Traits(any_thread=False)
        def make():
            global cache
            cache = usermm.RegistrationCache(Registrar())
            cache.get(array)
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        """,
        "",
    ),
    "memory that goes before the cache": (
        """
        cache = usermm.RegistrationCache(Registrar())
        block = mmap.mmap(-1, 1 << 20)
        registration = cache.get(block)
        block.close()
        """,
        "deregistered ",
    ),
}
_STATUS = {"sys.exit in the main thread": 3, "os._exit": 3, "another program in its place": 3}


@pytest.mark.parametrize("end", _ENDS)
def test_a_program_ends(tmp_path: Path, end: str) -> None:
    text, output = _ENDS[end]
    printed = run_quietly(_HEAD + textwrap.dedent(text), tmp_path, status=_STATUS.get(end, 0), timeout_s=15)
    assert output is None or printed == output


def test_a_registrar_that_fails_at_the_end_is_heard(tmp_path: Path) -> None:
    """Logging without any configuration prints to stderr."""
    text = """
        registrar = ScriptedRegistrar()
        registrar.at_deregister(None, raises=ValueError("stuck"))
        caches = [usermm.RegistrationCache(registrar) for _ in range(2)]
        for cache in caches:
            cache.get(array)
    """
    done = run_program(_HEAD + textwrap.dedent(text), tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("failed: the device may still use that memory") == 2
    assert done.stderr.count("ValueError: stuck") == 2


# Event loops


def test_an_event_loop_goes_on_while_a_thread_registers() -> None:
    registrar, block, quick = ScriptedRegistrar(), Block(), Block()
    entered, opened = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        opened.wait(10)

    async def main() -> list[Any]:
        cache.get(quick)
        waiting = [asyncio.create_task(asyncio.to_thread(cache.get, block)) for _ in range(4)]
        while not entered.is_set():
            await asyncio.sleep(0.001)
        for _ in range(20):
            with cache.get(quick) as registration:
                await asyncio.sleep(0)
                assert registration.handle == 1
        waiting.pop().cancel()
        opened.set()
        found = await asyncio.gather(*waiting)
        handles = [registration.handle for registration in found]
        for registration in found:
            registration.release()
        return handles

    with cache_over(registrar) as cache:
        registrar.at_register(2, runs=slow)
        assert asyncio.run(main()) == [2, 2, 2]
        assert len([call for call in registrar.calls if call.name == "register"]) == 2


def test_a_task_that_is_cancelled_lets_go() -> None:
    registrar, block = ScriptedRegistrar(), Block()

    async def hold() -> None:
        with cache.get(block):
            await asyncio.sleep(60)

    async def main() -> None:
        tasks = [asyncio.create_task(hold()) for _ in range(10)]
        await asyncio.sleep(0)
        assert cache.stats().held == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert cache.stats().held == 0

    with cache_over(registrar) as cache:
        asyncio.run(main())


# Pools of processes

_POOLS = """
    import multiprocessing, os, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    import numpy as np
    import usermm
    from usermm.testing import ScriptedRegistrar

    registrar = ScriptedRegistrar()
    cache = usermm.RegistrationCache(registrar)
    shared = np.zeros(1 << 20, np.uint8)


    def work(number):
        own = np.zeros(1 << 20, np.uint8)
        for _ in range(5):
            with cache.get(own) as registration, cache.get(shared) as other:
                assert registration.valid and other.valid
        if METHOD == "fork":
            assert not [call for call in registrar.calls if call.name == "deregister" and call.handle == 1]
        assert cache.stats().hits >= 8
        return os.getpid()


    if __name__ == "__main__":
        with cache.get(shared) as held:
            with multiprocessing.get_context(METHOD).Pool(2) as pool:
                print(os.getpid() in pool.map(work, range(8)))
                pool.close()
                pool.join()
            assert held.valid and held.handle == 1
        assert [call.name for call in registrar.calls] == ["register"]
        try:
            multiprocessing.get_context("spawn").Process(target=print, args=(cache,)).start()
        except TypeError as error:
            print("a cache cannot be sent")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    text = _POOLS.replace("METHOD", repr(method))
    assert run_quietly(text, tmp_path, timeout_s=60) == "False\na cache cannot be sent\n"


# Interpreters inside the process

_INSIDE = """
import sys

if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    def run(identifier, text):
        error = interpreters.run_string(identifier, text)
        if error is not None:
            raise RuntimeError(error.formatted)
    def create():
        return interpreters.create("legacy")
else:
    import _xxsubinterpreters as interpreters
    run = interpreters.run_string
    def create():
        return interpreters.create(isolated=False)

use = '''
import gc, mmap
import usermm
from usermm.testing import ScriptedRegistrar
registrar = ScriptedRegistrar()
with usermm.RegistrationCache(registrar) as cache:
    block = mmap.mmap(-1, 1 << 20)
    with cache.get(block) as registration, cache.get(block):
        block.madvise(mmap.MADV_DONTNEED)
        assert not registration.valid
    assert cache.get(block).handle == 2
registrar.check(empty=True)
left = usermm.RegistrationCache(registrar)
held = left.get(block)
left.get(bytearray(5000))
'''

exec(use)
for _ in range(3):
    identifier = create()
    run(identifier, use)
    run(identifier, use)
    interpreters.destroy(identifier)
exec(use)
left.close()
del held, left
from usermm import _core
assert _core.counts()["devices"] == 0, _core.counts()
print("works")
"""


def _pythons() -> list[str]:
    """Interpreters of 3.11 and later, under the names that distributions and pyenv give them."""
    names = ("3.11", "3.12", "3.13")
    found = {name: shutil.which(f"python{name}") for name in names}
    for name in names:
        for path in sorted((Path.home() / ".pyenv" / "versions").glob(f"{name}.*/bin/python{name}")):
            found[name] = str(path)
    return [f"{name}={path or ''}" for name, path in found.items()]


@pytest.mark.parametrize("python", _pythons(), ids=lambda text: text.split("=")[0])
def test_subinterpreters_end_with_caches_alive(tmp_path: Path, python: str) -> None:
    """A thread for the upkeep would keep one from ending, and end the whole process instead."""
    name, path = python.split("=")
    if not path:
        pytest.skip(f"no Python {name} here: install it as python{name}, or with pyenv")
    assert run_quietly(_INSIDE, tmp_path, python=path, options=("-W", "ignore")) == "works\n"
