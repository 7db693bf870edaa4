"""Buffers, arguments and memory that a cache refuses: which error, one line, and nothing has changed."""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.arena import Arena
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line
from support.processes import run_quietly

import usermm
from usermm import ArgumentError, ArgumentTypeError
from usermm.errors import DeviceError, LimitError
from usermm.registrars import Traits
from usermm.testing import ScriptedRegistrar

Cache = usermm.RegistrationCache[object]


@pytest.fixture
def cache() -> Iterator[Cache]:
    """After the refusals of the test: nothing was registered, nothing is there, and a good buffer works."""
    registrar = ScriptedRegistrar()
    with cache_over(registrar) as cache:
        yield cache
        assert registrar.calls == []
        now = cache.stats()
        assert (now.registrations, now.held, now.pinned, now.pinned_bytes, now.registered) == (0, 0, 0, 0, 0)
        assert usermm._core.counts()["regions"] == 0
        with cache.get(bytearray(5000)) as registration:
            assert registration.handle == 1
        cache.clear()


# Buffers


def _released() -> memoryview:
    view = memoryview(bytearray(100))
    view.release()
    return view


def _closed() -> mmap.mmap:
    mapped = mmap.mmap(-1, PAGE)
    mapped.close()
    return mapped


def _read_only() -> np.ndarray:
    frozen = np.zeros(100)
    frozen.flags.writeable = False
    return frozen


_LIVE = "buffer: pass a live, contiguous"
_EMPTY = "buffer: it is empty"

BUFFERS: dict[str, tuple[Callable[[], object], type[usermm.UsermmError], str]] = {
    "released memoryview": (_released, ArgumentError, _LIVE),
    "closed mmap": (_closed, ArgumentError, _LIVE),
    "bytes": (lambda: bytes(100), ArgumentError, "writable one, since the device may write"),
    "read-only memoryview": (lambda: memoryview(bytearray(100)).toreadonly(), ArgumentError, "writable one"),
    "read-only numpy": (_read_only, ArgumentError, "writable one"),
    "read-only mmap": (lambda: mmap.mmap(-1, PAGE, prot=mmap.PROT_READ), ArgumentError, "writable one"),
    "empty bytearray": (bytearray, ArgumentError, _EMPTY),
    "empty numpy": (lambda: np.zeros((0, 5)), ArgumentError, _EMPTY),
    "empty part": (lambda: memoryview(bytearray(100))[50:50], ArgumentError, _EMPTY),
    "empty array": (lambda: array.array("i"), ArgumentError, _EMPTY),
    "numpy with gaps": (lambda: np.zeros((8, 8))[:, ::2], ArgumentError, _LIVE),
    "numpy backwards": (lambda: np.zeros(8)[::-1], ArgumentError, _LIVE),
    "memoryview with gaps": (lambda: memoryview(bytearray(100))[::3], ArgumentError, _LIVE),
    "None": (lambda: None, ArgumentTypeError, "buffer must have the buffer protocol"),
    "a number": (lambda: 5, ArgumentTypeError, "buffer must have the buffer protocol"),
    "text": (lambda: "text", ArgumentTypeError, "buffer must have the buffer protocol"),
    "a class": (lambda: bytearray, ArgumentTypeError, "buffer must have the buffer protocol"),
    "an address alone": (lambda: SimpleNamespace(address=4096), ArgumentTypeError, "address and size"),
    "a size alone": (lambda: SimpleNamespace(size=4096), ArgumentTypeError, "address and size"),
    "an address of text": (lambda: SimpleNamespace(address="4096", size=1), ArgumentTypeError, "address must be"),
    "an address of None": (lambda: SimpleNamespace(data_ptr=None, nbytes=1), ArgumentTypeError, "data_ptr must be an"),
    "a size of a float": (lambda: SimpleNamespace(address=4096, size=1.5), ArgumentTypeError, "size must be an int"),
    "a negative address": (lambda: SimpleNamespace(address=-1, size=1), ArgumentError, "address must be in"),
    "a huge address": (lambda: SimpleNamespace(address=1 << 70, size=1), ArgumentError, "address must be in"),
    "a negative size": (lambda: SimpleNamespace(address=4096, size=-1), ArgumentError, "size must be in"),
    "no size": (lambda: SimpleNamespace(address=4096, size=0), ArgumentError, _EMPTY),
    "a tensor of a GPU": (
        lambda: SimpleNamespace(data_ptr=lambda: 4096, nbytes=1, device=SimpleNamespace(type="cuda")),
        ArgumentError,
        "not in host memory",
    ),
    "a tensor with gaps": (
        lambda: SimpleNamespace(data_ptr=lambda: 4096, nbytes=1, is_contiguous=lambda: False),
        ArgumentError,
        "its items have gaps",
    ),
    "nothing is mapped there": (lambda: SimpleNamespace(address=4096, size=1), DeviceError, "nothing is mapped at"),
    "a null pointer": (lambda: SimpleNamespace(data_ptr=lambda: 0, nbytes=9), DeviceError, "nothing is mapped at"),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("probe", [None, True, False])
def test_a_buffer_is_refused(cache: Cache, name: str, probe: bool | None) -> None:
    make, kind, words = BUFFERS[name]
    buffer = make()
    assert words in refused_line(lambda: cache.get(buffer, probe=probe), kind)


BEYOND = pytest.mark.parametrize(
    ("address", "size"), [(1 << 63, PAGE), ((1 << 63) - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (4096, 1 << 63)]
)


@BEYOND
def test_addresses_that_no_process_has(cache: Cache, address: int, size: int) -> None:
    memory = SimpleNamespace(address=address, size=size)
    assert "None" not in refused_line(lambda: cache.get(memory), ArgumentError)


@BEYOND
def test_addresses_that_no_process_has_can_be_asked_about(cache: Cache, address: int, size: int) -> None:
    memory = SimpleNamespace(address=address, size=size)
    assert cache.evict(memory) == 0
    assert cache.explain(memory).startswith("miss")


@pytest.mark.parametrize("page", [0, 1, 3])
def test_a_hole_is_named(cache: Cache, page: int) -> None:
    with contextlib.closing(Arena()) as arena:
        start = arena.mmap(arena.start, 4 * PAGE)
        arena.munmap(start + page * PAGE, PAGE)
        line = refused_line(lambda: cache.get(SimpleNamespace(address=start, size=4 * PAGE)), DeviceError, errno.EFAULT)
        assert f"nothing is mapped at {start + page * PAGE:#x}-" in line


def test_a_device_that_only_reads_takes_what_is_read_only() -> None:
    with cache_over(ScriptedRegistrar(Traits(writes=False))) as cache:
        for buffer in (bytes(5000), memoryview(bytes(5000)), _read_only(), mmap.mmap(-1, PAGE, prot=mmap.PROT_READ)):
            with cache.get(buffer) as registration:
                assert registration.valid
        refused_line(lambda: cache.get(np.zeros((8, 8))[:, ::2]), ArgumentError)


def test_an_export_ends_with_the_call(cache: Cache) -> None:
    """A bytearray cannot be resized while somebody has its buffer."""
    refused = bytearray(100)
    for view in (memoryview(refused).toreadonly(), memoryview(refused)[::2]):
        refused_line(lambda view=view: cache.get(view), ArgumentError)
        view.release()
    refused.extend(bytes(100))


def test_an_export_ends_with_a_successful_call() -> None:
    buffer = bytearray(5000)
    with cache_over(ScriptedRegistrar()) as cache, cache.get(buffer):
        buffer.extend(bytes(100_000))


class TroubleError(Exception):
    pass


def _trouble(*_: object) -> Any:
    raise TroubleError


class TroublesomeAttribute:
    data_ptr = property(_trouble)


@pytest.mark.parametrize(
    "buffer",
    [
        SimpleNamespace(data_ptr=_trouble),
        SimpleNamespace(data_ptr=lambda: 4096, nbytes=type("Index", (), {"__index__": _trouble})()),
        SimpleNamespace(data_ptr=lambda: 4096, is_contiguous=_trouble),
        SimpleNamespace(data_ptr=lambda: 4096, is_contiguous=type("Truth", (), {"__bool__": _trouble})),
        SimpleNamespace(data_ptr=lambda: 4096, device=type("Device", (), {"type": property(_trouble)})()),
        TroublesomeAttribute(),
    ],
)
def test_what_a_buffers_own_code_raises_is_kept(cache: Cache, buffer: object) -> None:
    for call in (cache.get, cache.evict, cache.explain):
        with pytest.raises(TroubleError):
            call(buffer)


_PROTOCOL = """
    import usermm
    from usermm.testing import ScriptedRegistrar

    class Buffer:
        def __init__(self, before):
            self.memory, self.before, self.taken = bytearray(5000), before, 0
        def __buffer__(self, flags):
            self.before(self)
            self.taken += 1
            return memoryview(self.memory)
        def __release_buffer__(self, view):
            self.taken -= 1
            view.release()

    def interrupt(_):
        raise KeyboardInterrupt

    registrar = ScriptedRegistrar()
    with usermm.RegistrationCache(registrar) as cache:
        for name, before in (
            ("nothing", lambda self: None),
            ("get", lambda self: cache.get(self.memory)),
            ("evict", lambda self: cache.evict(self.memory)),
            ("clear", lambda self: cache.clear()),
            ("recursion", lambda self: cache.get(self)),
            ("interrupt", interrupt),
            ("close", lambda self: cache.close()),
        ):
            buffer = Buffer(before)
            try:
                with cache.get(buffer) as registration:
                    assert registration.length == 5000
                print(name)
            except BaseException as error:
                print(name, type(error).__name__)
            assert buffer.taken == 0, name
    registrar.check(empty=True)
"""


def test_buffers_whose_protocol_is_written_in_python(tmp_path: Path) -> None:
    """Since Python 3.12 a class may have __buffer__, which may call the cache."""
    found = [sys.executable] if sys.version_info >= (3, 12) else []
    found += [str(path) for path in sorted((Path.home() / ".pyenv" / "versions").glob("3.1[2-9].*/bin/python"))]
    found += [path for path in map(shutil.which, ("python3.12", "python3.13", "python3.14")) if path]
    python = next(iter(found), None)
    if python is None:
        pytest.skip("no Python 3.12 or newer here: install it as python3.12, or with pyenv")
    assert run_quietly(_PROTOCOL, tmp_path, python=python).splitlines() == [
        "nothing", "get", "evict", "clear", "recursion ArgumentError", "interrupt KeyboardInterrupt",
        "close ClosedError",
    ]  # fmt: skip


class Calling:
    """data_ptr() does something to the cache first."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.block, self.call, self.nbytes = Block(), call, PAGE

    def data_ptr(self) -> int:
        self.call()
        return self.block.address


def test_buffers_that_call_the_cache() -> None:
    registrar, other = ScriptedRegistrar(), bytearray(5000)
    with cache_over(registrar) as cache:
        for call in (lambda: cache.get(other), cache.clear, lambda: cache.evict(other), cache.stats):
            buffer = Calling(call)
            for _ in range(3):
                with cache.get(buffer) as registration:
                    assert registration.address == buffer.block.address
            cache.evict(buffer)
            assert cache.explain(buffer).startswith("miss")
        buffer = Calling(cache.close)
        refused_line(lambda: cache.get(buffer), usermm.ClosedError)
        refused_line(lambda: cache.evict(buffer), usermm.ClosedError)


# Arguments


def test_arguments_of_get(cache: Cache) -> None:
    call: Any = cache.get
    buffer = bytearray(100)
    for arguments, names in (
        ((), {}),
        ((buffer, buffer), {}),
        ((buffer, True), {}),
        ((buffer,), {"bogus": True}),
        ((buffer,), {"probe": True, "bogus": 1}),
        ((), {"buffer": buffer}),
        ((), {"probe": True}),
        ((), {"": True}),
    ):
        line = refused_line(lambda arguments=arguments, names=names: call(*arguments, **names), ArgumentTypeError)
        assert "probe=None" in line
    with pytest.raises(TroubleError):
        call(buffer, probe=type("Truth", (), {"__bool__": _trouble})())


def test_any_truth_will_do_for_probe() -> None:
    buffer = bytearray(5000)
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(buffer)
        for value in (1, "yes", [0], 0, "", ()):
            before = cache.stats().probes
            cache.get(buffer, probe=value)  # type: ignore[arg-type]
            assert cache.stats().probes - before == bool(value)


WRONG_VALUES: list[dict[str, Any]] = [
    {"max_bytes": 0},
    {"max_bytes": -1},
    {"max_bytes": 1 << 63},
    {"max_count": 0},
    {"max_count": 1 << 64},
    {"linger_s": 0},
    {"linger_s": 1e-9},
    {"linger_s": -1.0},
    {"linger_s": float("nan")},
    {"linger_s": float("inf")},
    {"linger_s": 1e300},
    {"fallback": "Uncached"},
    {"fallback": None},
]
WRONG_TYPES: list[dict[str, Any]] = [
    {"max_bytes": "1"},
    {"max_bytes": 1.5},
    {"max_count": [1]},
    {"max_count": 1.0},
    {"linger_s": "1"},
    {"linger_s": [1]},
]


@pytest.mark.parametrize("options", WRONG_VALUES, ids=repr)
def test_values_that_no_cache_has(options: dict[str, Any]) -> None:
    line = refused_line(lambda: usermm.RegistrationCache(ScriptedRegistrar(), **options), ArgumentError)
    assert next(iter(options)) in line


@pytest.mark.parametrize("options", WRONG_TYPES, ids=repr)
def test_types_that_no_option_has(options: dict[str, Any]) -> None:
    line = refused_line(lambda: usermm.RegistrationCache(ScriptedRegistrar(), **options), ArgumentTypeError)
    assert next(iter(options)) in line


@pytest.mark.parametrize("registrar", [None, 5, "IoUring", object, SimpleNamespace(traits=None)], ids=repr)
def test_what_is_no_registrar(registrar: Any) -> None:
    assert "traits" in refused_line(lambda: usermm.RegistrationCache(registrar), ArgumentTypeError)


def test_numbers_that_pass() -> None:
    for options in ({"max_bytes": (1 << 63) - 1}, {"max_count": 1}, {"linger_s": 1 << 19}, {"linger_s": True}):
        with cache_over(ScriptedRegistrar(), **options) as cache:
            cache.get(bytearray(5000))


def test_a_longest_length_beyond_all_addresses_is_refused() -> None:
    """It would wrap around, and become a small one."""
    refused_line(lambda: Traits(max_length_bytes=(1 << 64) + 1), ArgumentError)
    with cache_over(ScriptedRegistrar(Traits(max_length_bytes=(1 << 63) - 1))) as cache:
        cache.get(bytearray(5000))


def test_what_is_larger_than_the_limits() -> None:
    registrar = ScriptedRegistrar(Traits(max_length_bytes=2 * PAGE))
    with cache_over(registrar, max_bytes=3 * PAGE) as cache:
        block = Block(8 * PAGE)
        kept = cache.get(block.part(0, PAGE))
        line = refused_line(lambda: cache.get(block.part(0, 2 * PAGE + 1)), ArgumentError)
        assert f"the device takes {2 * PAGE} bytes at most" in line
        refused_line(lambda: cache.get(block), ArgumentError)
        assert kept.valid
        kept.release()
    with cache_over(ScriptedRegistrar(), max_bytes=3 * PAGE) as cache:
        kept = cache.get(block.part(0, PAGE))
        line = refused_line(lambda: cache.get(block.part(0, 3 * PAGE + 1)), LimitError)
        assert f"more than the cache's max_bytes, {3 * PAGE}" in line
        assert kept.valid, "nothing makes room for what can never fit"
        kept.release()
