"""Memory registered with UCX: real puts and gets through the packed key, and every refusal.

UCX cannot be unloaded and can patch libc, so each story runs in a process of its own: this file, as a program, is told
the function's name. The refusals that need no UCX are tried against a stand-in for its library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import io
import json
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from usermm import ArgumentError, ClosedError, DeviceError, ForkedError, LimitError, UnavailableError
from usermm.registrars import Overlap, UcxMemory, _ucp

TESTS = Path(__file__).resolve().parents[1]


def is_here() -> bool:
    """The wheel, or a library of the system that another process can load."""
    if importlib.util.find_spec("libucx") is not None:
        return True
    load = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libucp.so.0')"]
    return subprocess.run(load, stderr=subprocess.DEVNULL, check=False).returncode == 0


needs_ucx = pytest.mark.skipif(not is_here(), reason="no UCX here: pip install usermm[ucx], or apt install libucx0")

PATCHED = ("munmap", "mmap", "mremap", "madvise", "brk", "shmdt")


def in_a_process(story: Callable[[], object], **environment: str) -> None:
    """Fails with what the process wrote."""
    done = subprocess.run(
        [sys.executable, __file__, story.__name__],
        env={**without(os.environ, "UCX_MEM_EVENTS"), "PYTHONPATH": python_path(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def without(environment: Any, name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


def python_path() -> str:
    return os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])


class Memory:
    """Anonymous pages at an address, unmapped by `gone`."""

    def __init__(self, length: int = 1 << 20) -> None:
        self.length = length
        self.map = mmap.mmap(-1, length)
        self._view = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._view)

    def gone(self) -> None:
        del self._view
        self.map.close()


# Through the key


@needs_ucx
@pytest.mark.parametrize("transports", ["tcp", "self,tcp", "sysv,tcp"])
def test_a_put_with_the_packed_key_lands_in_the_buffer(transports: str) -> None:
    in_a_process(two_contexts, UCX_TLS=transports)


def two_contexts() -> None:
    from support.ucx_peer import Peer, Worker

    memory = Memory()
    with UcxMemory() as owner, UcxMemory() as other:
        registration = owner.register(memory.address + 100, 1 << 19)
        assert (registration.address, registration.length) == (memory.address + 100, 1 << 19)
        ours, theirs = Worker(owner._ucp, owner.context), Worker(other._ucp, other.context)
        peer = Peer(theirs, ours.address(), [ours])
        for offset, length in ((100, 1), (4095, 2), (5000, 1 << 18)):
            data = os.urandom(length)
            peer.put(registration.remote_key, memory.address + offset, data)
            assert memory.map[offset : offset + length] == data
            assert peer.get(registration.remote_key, memory.address + offset, length) == data
        owner.deregister(registration)
        peer.close()
        theirs.close()
        ours.close()


@needs_ucx
@pytest.mark.parametrize("transports", ["tcp", "sysv,self", "all"])
def test_another_process_reads_and_writes_through_the_key(transports: str) -> None:
    in_a_process(another_process, UCX_TLS=transports)


def another_process() -> None:
    from support.ucx_peer import Worker

    memory = Memory()
    memory.map[10:15] = b"hello"
    with UcxMemory() as owner:
        registration = owner.register(memory.address, memory.length)
        worker = Worker(owner._ucp, owner.context)
        with subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "ucx_peer.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            told = {"worker": worker.address(), "key": registration.remote_key, "data": b"world"}
            line = {name: value.hex() for name, value in told.items()} | {"address": memory.address + 10}
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
            answer: list[bytes] = []
            reader = threading.Thread(target=lambda: answer.append(process.stdout.readline()))
            reader.start()
            while reader.is_alive():
                worker.progress()
            assert bytes.fromhex(answer[0].decode()) == b"hello"
            assert memory.map[10:15] == b"world"
            owner.deregister(registration)
            worker.close()
            process.stdin.close()
        assert process.returncode == 0


# What a registrar has to be


@needs_ucx
def test_registrations_overlap_and_end_once() -> None:
    in_a_process(overlaps)


def overlaps() -> None:
    memory = Memory()
    with UcxMemory() as registrar:
        assert registrar.traits.overlap is Overlap.ALLOWED
        assert registrar.traits.any_thread
        first = registrar.register(memory.address, memory.length)
        second = registrar.register(memory.address, memory.length)
        assert first.memh != second.memh
        registrar.deregister(first)
        third = registrar.register(memory.address + 1, 1)
        registrar.deregister(first)  # whose number UCX may have given to the third
        assert {second.memh, third.memh} <= registrar._mapped
        registrar.deregister(second)
        registrar.deregister(third)
        assert repr(registrar) == "<usermm.registrars.UcxMemory, 0 mapped>"


@needs_ucx
def test_memory_that_is_gone_can_be_deregistered() -> None:
    in_a_process(gone)


def gone() -> None:
    memory = Memory()
    with UcxMemory() as registrar:
        registration = registrar.register(memory.address, memory.length)
        memory.gone()
        registrar.deregister(registration)


@needs_ucx
def test_threads_share_it() -> None:
    in_a_process(threads)


def threads() -> None:
    memory = Memory()
    failed: list[BaseException] = []
    with UcxMemory() as registrar:

        def work() -> None:
            try:
                for index in range(500):
                    registrar.deregister(registrar.register(memory.address + index, 4096))
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed
        assert not registrar._mapped


@needs_ucx
def test_a_context_of_the_callers() -> None:
    in_a_process(context_of_the_callers)


def context_of_the_callers() -> None:
    memory = Memory()
    with UcxMemory() as theirs:
        with UcxMemory(theirs.context) as registrar:
            assert registrar.traits.any_thread
            left_behind = registrar.register(memory.address, memory.length)
        registrar.deregister(left_behind)
        theirs.register(memory.address, memory.length)  # the context is there still


@needs_ucx
def test_a_context_of_one_thread() -> None:
    in_a_process(context_of_one_thread)


def context_of_one_thread() -> None:
    ucp = _ucp.loaded(None, may_load=True)
    context = ctypes.c_void_p()
    parameters = _ucp._Parameters(field_mask=1, features=2)
    assert ucp.ucp_init_version(1, 13, ctypes.byref(parameters), None, ctypes.byref(context)) == 0
    assert context.value is not None
    with UcxMemory(context.value) as registrar:
        assert not registrar.traits.any_thread
    ucp.ucp_cleanup(context)


@needs_ucx
def test_closing() -> None:
    in_a_process(closing)


def closing() -> None:
    memory = Memory()
    registrar = UcxMemory()
    registration = registrar.register(memory.address, memory.length)
    registrar.close()
    registrar.close()
    registrar.deregister(registration)
    with pytest.raises(ClosedError):
        registrar.register(memory.address, memory.length)


@needs_ucx
def test_a_forked_child_leaves_the_parents_alone() -> None:
    in_a_process(forked)


def forked() -> None:
    memory = Memory()
    with UcxMemory() as registrar:
        registration = registrar.register(memory.address, memory.length)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                registrar.deregister(registration)
                registrar.close()
                assert registrar._mapped == {registration.memh}
                with pytest.raises(ForkedError):
                    registrar.register(memory.address, 1)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert registrar.context
        registrar.deregister(registration)


@needs_ucx
def test_what_ucx_refuses_is_quoted() -> None:
    in_a_process(refusals)


def refusals() -> None:
    with UcxMemory() as registrar:
        with pytest.raises(DeviceError, match=r"ucp_mem_map: 4096 bytes at 0x0: Invalid parameter \(-5\)") as caught:
            registrar.register(0, 4096)
        assert (type(caught.value), caught.value.errno) == (DeviceError, errno.EINVAL)
        with pytest.raises(ArgumentError):
            registrar.register(4096, 0)


@needs_ucx
def test_the_program_of_the_how_to_page() -> None:
    in_a_process(the_page)


def the_page() -> None:
    text = (TESTS.parent / "docs" / "how-to" / "ucx.md").read_text()
    program, output = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "ucx.md", "exec"), {})
    assert printed.getvalue() == output


# Below a cache


@needs_ucx
def test_a_cache_above_it_gives_the_new_memory() -> None:
    in_a_process(below_a_cache)


def below_a_cache() -> None:
    """Peers write through the key of whatever is mapped now, at the same address over and over."""
    from support.ucx_peer import Peer, Worker

    import usermm

    with UcxMemory() as owner, UcxMemory() as other, usermm.RegistrationCache(owner, max_count=4) as cache:
        ours, theirs = Worker(owner._ucp, owner.context), Worker(other._ucp, other.context)
        peer = Peer(theirs, ours.address(), [ours])
        for number in range(50):
            memory = Memory()
            with cache.get(memory.map) as registration:
                data = number.to_bytes(4, "little") * 1000
                peer.put(registration.handle.remote_key, memory.address, data)
                assert memory.map[: len(data)] == data
            memory.gone()
        cache.expire(0)
        assert cache.stats().pinned == 0
        peer.close()
        theirs.close()
        ours.close()


# UCX's own cache and hooks


def code_of_libc() -> dict[str, bytes]:
    libc = ctypes.CDLL("libc.so.6")
    starts = {name: ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0 for name in PATCHED}
    return {name: ctypes.string_at(start, 16) for name, start in starts.items()}


@needs_ucx
def test_libc_is_left_as_it_is() -> None:
    in_a_process(libc_is_left)


def libc_is_left() -> None:
    before = code_of_libc()
    memory = Memory()
    with UcxMemory() as registrar:
        registrar.deregister(registrar.register(memory.address, memory.length))
        assert code_of_libc() == before
    assert "UCX_MEM_EVENTS" not in os.environ, "programs that are started must not inherit it"


@needs_ucx
def test_who_wants_the_hooks_can_have_them() -> None:
    in_a_process(hooks_are_there, UCX_MEM_EVENTS="y")


def hooks_are_there() -> None:
    before = code_of_libc()
    with UcxMemory():
        assert code_of_libc() != before, "this UCX patches nothing: the test above proves nothing"
    assert os.environ["UCX_MEM_EVENTS"] == "y"


# Without UCX


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library can be loaded, and there is no wheel."""

    def refuse(name: str, *_arguments: object) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setitem(sys.modules, "libucx", None)


@pytest.mark.usefixtures("nowhere")
def test_the_library_is_missing() -> None:
    with pytest.raises(UnavailableError, match=r"pip install usermm\[ucx\]") as caught:
        UcxMemory()
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(UnavailableError, match=r"/no/libucp\.so\.0"):
        UcxMemory(library="/no/libucp.so.0")
    with pytest.raises(ArgumentError, match="library="):
        UcxMemory(0x1000)


class StandIn:
    """A library that answers as it is told; its memh is 7, its key "key"."""

    def __init__(self, **answers: int) -> None:
        self.answers = answers
        self.unmapped: list[Any] = []
        self.key = ctypes.create_string_buffer(b"key")

    def ucs_status_string(self, _status: int) -> bytes:
        return b"no"

    def ucp_context_query(self, _context: int, attributes: Any) -> int:
        attributes._obj.thread_mode = 2
        return self.answers.get("query", 0)

    def ucp_mem_map(self, _context: int, parameters: Any, memh: Any) -> int:
        assert parameters._obj.field_mask == 3
        memh._obj.value = 7
        return self.answers.get("map", 0)

    def ucp_mem_unmap(self, _context: int, memh: Any) -> int:
        self.unmapped.append(getattr(memh, "value", memh))
        return self.answers.get("unmap", 0)

    def ucp_rkey_pack(self, _context: int, memh: int, buffer: Any, size: Any) -> int:
        assert memh == 7
        buffer._obj.value, size._obj.value = ctypes.addressof(self.key), 3
        return self.answers.get("pack", 0)

    def ucp_rkey_buffer_release(self, _buffer: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    ucp = StandIn()
    monkeypatch.setattr(_ucp, "loaded", lambda *_arguments, **_options: ucp)
    yield ucp


@pytest.mark.parametrize("call", ["map", "pack"])
@pytest.mark.parametrize(
    ("status", "kind", "number"),
    [
        (-4, LimitError, errno.ENOMEM),
        (-2, LimitError, errno.ENOMEM),
        (-21, LimitError, errno.ENOMEM),
        (-3, DeviceError, errno.EINVAL),
    ],
)
def test_each_status_has_its_error(
    stand_in: StandIn, call: str, status: int, kind: type[DeviceError], number: int
) -> None:
    registrar = UcxMemory(0x1000)
    stand_in.answers[call] = status
    with pytest.raises(DeviceError, match=rf"100 bytes at 0x2000: no \({status}\)") as caught:
        registrar.register(0x2000, 100)
    assert (type(caught.value), caught.value.errno) == (kind, number)
    assert stand_in.unmapped == ([7] if call == "pack" else []), "after an error nothing is registered"
    assert not registrar._mapped


def test_an_unmapping_that_fails_is_told_once(stand_in: StandIn) -> None:
    registrar = UcxMemory(0x1000)
    registration = registrar.register(0x2000, 100)
    assert registration.remote_key == b"key"
    stand_in.answers["unmap"] = -3
    with pytest.raises(DeviceError, match="ucp_mem_unmap"):
        registrar.deregister(registration)
    registrar.deregister(registration)
    assert stand_in.unmapped == [7]


def test_a_context_that_cannot_be_asked(stand_in: StandIn) -> None:
    stand_in.answers["query"] = -22
    with pytest.raises(DeviceError, match="ucp_context_query"):
        UcxMemory(0x1000)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
