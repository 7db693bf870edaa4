"""The registrar of MPI windows: its promises, and every error that it documents.

MPI runs in programs of their own: it starts threads, opens descriptors and can be initialized once only. Each program
is one rank by itself.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.processes import run_program, run_quietly

with_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not in this environment: pip install usermm[mpi]"
)

HEAD = """
from mpi4py import MPI
import numpy as np
import usermm
from usermm.registrars.mpi import Attachment, MpiWindow

def refused(kind, call, *words):
    try:
        answer = call()
    except usermm.UsermmError as error:
        line = str(error)
        assert type(error) is kind, repr(error)
        assert "\\n" not in line and all(word in line for word in words), line
    else:
        raise AssertionError(f"accepted: {answer!r}")

"""


def run(body: str, path: Path) -> str:
    return run_quietly(HEAD + body, path)


@with_mpi
def test_a_handle_reaches_the_memory_and_travels(tmp_path: Path) -> None:
    run(
        """
import pickle
registrar = MpiWindow(MPI.COMM_SELF)
array = np.arange(5000, dtype=np.uint8)
handle = registrar.register(array.ctypes.data, array.nbytes)
assert registrar.attached == [(array.ctypes.data, array.ctypes.data + 5000)]
sent = pickle.loads(pickle.dumps(handle))
assert sent == handle == Attachment(MPI.Get_address(array), 5000) and hash(sent) == hash(handle)
part = sent.part(1000, 256)
window, got = registrar.window, np.empty(256, np.uint8)
window.Lock(0)
window.Get([got, MPI.BYTE], 0, (part.displacement, part.length, MPI.BYTE))
window.Flush(0)
window.Put([got[::-1].copy(), MPI.BYTE], 0, (part.displacement, part.length, MPI.BYTE))
window.Unlock(0)
assert (got == np.arange(1000, 1256).astype(np.uint8)).all()
assert (array[1000:1256] == got[::-1]).all()
registrar.deregister(handle)
assert registrar.attached == []
for offset, length in ((-1, 1), (0, 0), (0, 5001), (4999, 2), (5000, 1)):
    refused(usermm.ArgumentError, lambda: handle.part(offset, length), "5000")
registrar.close()
registrar.close()
assert registrar.window == MPI.WIN_NULL
""",
        tmp_path,
    )


@with_mpi
def test_overlaps_are_refused_although_mpich_takes_them(tmp_path: Path) -> None:
    run(
        """
registrar = MpiWindow(MPI.COMM_SELF)
assert registrar.traits.overlap is usermm.registrars.Overlap.REFUSED
array = np.zeros(1000, np.uint8)
start = array.ctypes.data
middle = registrar.register(start + 100, 100)
for offset, length in ((100, 100), (0, 101), (199, 1), (120, 10), (0, 1000)):
    refused(usermm.OverlapError, lambda: registrar.register(start + offset, length), "deregister", hex(start + 100))
neighbours = registrar.register(start, 100), registrar.register(start + 200, 800)
assert registrar.attached == [(start, start + 100), (start + 100, start + 200), (start + 200, start + 1000)]
registrar.deregister(middle)
registrar.deregister(middle)  # nothing, also for memory that is attached again by others
registrar.deregister(neighbours[0].part(0, 50))
wider = registrar.register(start + 110, 90)
registrar.deregister(middle)
assert len(registrar.attached) == 3
for handle in (*neighbours, wider):
    registrar.deregister(handle)
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_a_window_of_the_caller_stays_the_callers(tmp_path: Path) -> None:
    run(
        """
window = MPI.Win.Create_dynamic(comm=MPI.COMM_SELF)
registrar = MpiWindow(window)
assert registrar.window is window
registrar.close()
assert window != MPI.WIN_NULL
array = np.zeros(100, np.uint8)
handle = registrar.register(array.ctypes.data, 100)
window.Free()
registrar.deregister(handle)
assert registrar.attached == []
refused(usermm.ClosedError, lambda: registrar.register(array.ctypes.data, 100), "freed")
refused(usermm.ClosedError, lambda: MpiWindow(window), "freed")
fixed = MPI.Win.Create(array, comm=MPI.COMM_SELF)
refused(usermm.ArgumentError, lambda: MpiWindow(fixed), "Create_dynamic")
fixed.Free()
refused(usermm.ArgumentTypeError, lambda: MpiWindow("world"), "str")
refused(usermm.ArgumentTypeError, lambda: MpiWindow(MPI.GROUP_EMPTY), "Group")
refused(usermm.ArgumentError, lambda: MpiWindow(MPI.Intracomm(MPI.COMM_NULL)), "COMM_NULL")
""",
        tmp_path,
    )


@with_mpi
def test_after_finalize_nothing_is_called(tmp_path: Path) -> None:
    """MPICH ends a process that calls it then: the deregistrations of a cache at exit must not."""
    run(
        """
window = MPI.Win.Create_dynamic(comm=MPI.COMM_SELF)
registrar = MpiWindow(window)
array = np.zeros(100, np.uint8)
handle = registrar.register(array.ctypes.data, 100)
copy = MPI.Win(window)
copy.Free()  # through another object: `window` cannot know
registrar.deregister(handle)
own = MpiWindow(MPI.COMM_SELF)
other = own.register(array.ctypes.data, 100)
MPI.Win(own.window).Free()
MPI.Finalize()
own.deregister(other)
own.close()
assert own.attached == []
refused(usermm.ClosedError, lambda: own.register(array.ctypes.data, 100), "finalized")
refused(usermm.UnavailableError, lambda: MpiWindow(MPI.COMM_SELF), "MPI_Finalize")
""",
        tmp_path,
    )


@with_mpi
@pytest.mark.parametrize(("level", "any_thread"), [("multiple", True), ("serialized", False), ("funneled", False)])
def test_the_level_of_threads_is_asked(level: str, any_thread: bool, tmp_path: Path) -> None:
    """Below SERIALIZED a window that is made in another thread could never be used."""
    run_quietly(
        f"import mpi4py; mpi4py.rc.thread_level = {level!r}\n"
        + HEAD
        + f"""
import threading
registrar = MpiWindow(MPI.COMM_SELF)
assert registrar.traits.any_thread is {any_thread}
window = registrar.window

def elsewhere():
    if {level!r} == "funneled":
        refused(usermm.ArgumentError, lambda: MpiWindow(window), "main thread", "MPI_THREAD_MULTIPLE")
    else:
        assert MpiWindow(window).traits.any_thread is {any_thread}

failures = []
threading.excepthook = failures.append
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
assert not failures, failures
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_what_mpi_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    """MPICH refuses no memory, so a window that does stands in for one of another MPI or of a network card."""
    run(
        """
class Full:
    error = MPI.Exception(MPI.ERR_RMA_ATTACH)
    def Attach(self, memory):
        raise self.error

registrar = MpiWindow(MPI.COMM_SELF)
real, registrar.window = registrar.window, Full()
array = np.zeros(100, np.uint8)
register = lambda: registrar.register(array.ctypes.data, 100)
refused(usermm.LimitError, register, "deregister", "100 bytes")
Full.error = MPI.Exception(MPI.ERR_NO_MEM)
refused(usermm.LimitError, register, "deregister")
Full.error = MPI.Exception(MPI.ERR_ARG)
refused(usermm.DeviceError, register, "memory of this process")
Full.error = KeyboardInterrupt()
try:
    register()
except KeyboardInterrupt:
    pass
assert registrar.attached == []
registrar.window = real
refused(usermm.ArgumentError, lambda: registrar.register(array.ctypes.data, 0), "at least 1 byte")
registrar.deregister(register())
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_a_forked_child_leaves_the_parents_window_alone(tmp_path: Path) -> None:
    run(
        """
import os
registrar = MpiWindow(MPI.COMM_SELF)
array = np.zeros(100, np.uint8)
handle = registrar.register(array.ctypes.data, 100)
child = os.fork()
if child == 0:
    registrar.deregister(handle)
    registrar.close()
    assert "1 attached" in repr(registrar) and registrar.window != MPI.WIN_NULL
    refused(usermm.ForkedError, lambda: registrar.register(array.ctypes.data + 50, 10), "parent")
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert len(registrar.attached) == 1
registrar.deregister(handle)
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_many_threads_attach_and_detach(tmp_path: Path) -> None:
    """Each has its own memory between the others'; all of it is detached at the end."""
    run(
        """
import threading
registrar = MpiWindow(MPI.COMM_SELF)
array = np.zeros(4 * 1000 * 8, np.uint8)
failures = []
threading.excepthook = failures.append

def work(me):
    for turn in range(20):
        starts = [array.ctypes.data + 8 * (4 * index + me) for index in range(100)]
        handles = [registrar.register(start, 8) for start in starts]
        for handle in handles:
            registrar.deregister(handle)

threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert registrar.attached == [] and "0 attached" in repr(registrar)
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_a_handler_may_detach_while_its_own_thread_attaches(tmp_path: Path) -> None:
    """As a deallocator may. The handler is always in the thread that attaches, at whatever instruction that is."""
    run(
        """
import contextlib, signal
from collections import deque
registrar = MpiWindow(MPI.COMM_SELF)
array = np.zeros(64 * 1000, np.uint8)
ripe, calls = deque(), [0]

def detach(number, frame):
    calls[0] += 1
    with contextlib.suppress(IndexError):  # a handler can be interrupted by itself
        while True:
            registrar.deregister(ripe.pop())

signal.signal(signal.SIGALRM, detach)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
for turn in range(60):
    handles = [registrar.register(array.ctypes.data + 64 * index, 64) for index in range(500)]
    ripe.extend(handles[::2])
    for handle in handles[1::2]:
        registrar.deregister(handle)
    while ripe:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
assert calls[0] > 20
assert registrar.attached == [] and "0 attached" in repr(registrar)
registrar.deregister(registrar.register(array.ctypes.data, array.nbytes))
registrar.close()
""",
        tmp_path,
    )


@with_mpi
def test_the_cache_attaches_once_and_again_after_the_memory_went(tmp_path: Path) -> None:
    run(
        """
registrar = MpiWindow(MPI.COMM_SELF)
with usermm.RegistrationCache(registrar, max_count=4, linger_s=60) as cache:
    array = np.zeros(300_000, np.uint8)
    with cache.get(array) as first, cache.get(array) as second:
        assert first.handle == second.handle
        assert len(registrar.attached) == 1
        part = first.handle.part(MPI.Get_address(array) - first.address, array.nbytes)
        assert part == Attachment(MPI.Get_address(array), 300_000)
    for turn in range(20):  # malloc maps each anew, mostly over the last one
        del array
        array = np.zeros(300_000 + 4096 * turn, np.uint8)
        with cache.get(array):
            assert len(registrar.attached) == 1, "the last one was unmapped, and is detached"
    assert cache.stats().registered == 21
assert registrar.attached == []
registrar.close()
""",
        tmp_path,
    )


def test_without_mpi4py_the_error_names_the_extra(tmp_path: Path) -> None:
    done = run_program(
        """
import sys
sys.modules["mpi4py"] = None
import usermm
from usermm.registrars import MpiWindow
try:
    MpiWindow(None)
except usermm.UnavailableError as error:
    print(error)
""",
        tmp_path,
    )
    assert "mpi4py is missing: pip install usermm[mpi]" in done.stdout, done.stderr


def test_the_registrar_is_imported_without_mpi(tmp_path: Path) -> None:
    run_quietly(
        """
import sys
import usermm.registrars.mpi
assert not [name for name in sys.modules if name.startswith("mpi4py")]
""",
        tmp_path,
    )


@with_mpi
def test_without_an_mpi_library_the_error_says_so(tmp_path: Path) -> None:
    run_quietly(
        """
import os
os.environ["MPI4PY_LIBMPI"] = "/nowhere/libmpi.so"
import usermm
from usermm.registrars import MpiWindow
try:
    MpiWindow(None)
except usermm.UnavailableError as error:
    assert "usermm[mpi]" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError
""",
        tmp_path,
    )
