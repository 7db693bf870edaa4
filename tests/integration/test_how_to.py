"""The how-to pages that belong to no registrar: their programs run, and do what the pages say."""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.available import needs_userfaultfd
from support.pages import HOW_TO, ROOT, blocks, program
from support.processes import SOURCE, run_quietly

import usermm
from usermm.monitors import calls

PROMETHEUS = importlib.util.find_spec("prometheus_client") is not None
PAGE = mmap.PAGESIZE
LARGE = 64 << 20  # malloc maps it by itself and unmaps it when it is freed


def test_write_your_own_cache() -> None:
    """With registrations that remember what the memory held when they were made: a stale one shows old bytes."""
    (code,) = blocks(HOW_TO / "write-your-own-cache.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    pinned: dict[int, tuple[int, int]] = {}

    def pin(address: int, length: int) -> int:
        pinned[len(pinned)] = (address, length)
        return len(pinned) - 1

    table = names["Registrations"](pin, lambda handle: pinned.update({handle: (0, 0)}))
    start = calls.map_memory(8192)
    handle = table.get(start, 8192)
    assert table.get(start, 8192) == handle
    calls.unmap(start, 8192)
    assert calls.map_memory(8192, at=start) == start
    again = table.get(start, 8192)
    assert again != handle
    assert pinned[handle] == (0, 0)
    assert table.get(start, 8192) == again
    table.device.close()
    calls.unmap(start, 8192)


@pytest.mark.parametrize(
    "page", ["how-to/share-pages", "how-to/share-arrays", "grants", "channels", "event-channels", "store"]
)
def test_sharing(page: str, tmp_path: Path) -> None:
    text, output = program(ROOT / "docs" / f"{page}.md")
    assert run_quietly(text, tmp_path) == output


def test_observe(tmp_path: Path) -> None:
    page = HOW_TO / "observe.md"
    text, output = program(page)
    if not PROMETHEUS:
        *_, last = blocks(page, "python")
        text, output = text.replace(last, ""), output.removesuffix(blocks(page, "")[-1])
    assert run_quietly(text, tmp_path) == output


@pytest.mark.skipif(not PROMETHEUS, reason="needs pip install usermm[prometheus]")
def test_observe_names_every_metric() -> None:
    from usermm.rcache.prometheus import Collector

    page = (HOW_TO / "observe.md").read_text()
    with usermm.RegistrationCache(new_registrar()) as cache:
        for family in Collector(cache).describe():
            name = family.name.removeprefix("usermm_cache_") + ("_total" if family.type == "counter" else "")
            assert f"usermm_cache_{name}`" in page or f"`_{name}`" in page


def test_without_prometheus_client_one_line_says_what_to_install() -> None:
    text = "import sys; sys.modules['prometheus_client'] = None; import usermm.rcache.prometheus"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("prometheus_client is missing: pip install usermm[prometheus]")


def run_commands(commands: str, folder: Path) -> str:
    """What a page's commands print, with our `usermm` in front; every warning is an error."""
    quiet = commands.replace("make ", "make -s ").replace("-Wall", "-Wall -Wextra -Werror")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    command = ["sh", "-ec", quiet]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("number", "needed"), [(0, ("gcc",)), (1, ("gcc", "pkg-config")), (2, ("gcc", "make"))])
def test_c(tmp_path: Path, number: int, needed: tuple[str, ...]) -> None:
    """The page's program, built by each of the page's ways to build it."""
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    page = HOW_TO / "c.md"
    (code,), commands = blocks(page, "c"), blocks(page, "sh")
    (tmp_path / "frames.c").write_text(code)
    (tmp_path / "libusermm").symlink_to(ROOT / "libusermm")
    assert len(commands) == 3
    assert run_commands(commands[number], tmp_path) == blocks(page, "")[0]


def without_chance(trace: str) -> str:
    """Without times, processes, threads, addresses and where the compiler put the calls."""
    trace = re.sub(r"0x[0-9a-f]{2,}|[0-9]+\.[0-9]+|[0-9]+/[0-9]+", "N", trace)
    return re.sub(r" +", " ", re.sub(r"process [0-9]+", "process N", trace))


needs_preload = pytest.mark.skipif(
    not (SOURCE / "usermm" / "lib" / "libusermm-preload.so").exists(), reason="needs libusermm-preload.so: `make build`"
)


@needs_userfaultfd
@needs_preload
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_run(tmp_path: Path) -> None:
    """The page's program, under `usermm run`, traced, and with the library put in front by hand."""
    page = HOW_TO / "run.md"
    kinds = ("c", "sh", "", "text")
    (code,), (_, build, trace, by_hand), (output,), (traced,) = (blocks(page, kind) for kind in kinds)
    (tmp_path / "lost.c").write_text(code)
    assert run_commands(build, tmp_path) == output
    assert without_chance(run_commands(trace, tmp_path)) == without_chance(output + traced)
    assert run_commands(by_hand, tmp_path) == output


class Card:
    """The device of the migration page: it remembers what was sent, by which key and from what memory."""

    def __init__(self) -> None:
        self.pinned: dict[int, tuple[int, int]] = {}
        self.keys = 0
        self.sent: list[tuple[int, int]] = []

    def pin(self, address: int, length: int) -> int:
        self.keys += 1
        self.pinned[self.keys] = address, length
        return self.keys

    def unpin(self, key: int) -> None:
        del self.pinned[key]

    def send(self, key: int, offset: int, length: int) -> None:
        start, size = self.pinned[key]
        assert offset + length <= size, "beyond what the key is good for"
        self.sent.append((key, start + offset))


def new_registrar() -> Any:
    """The page's own, over a card of its own."""
    names: dict[str, Any] = {}
    exec(blocks(HOW_TO / "migrate.md", "python")[0], names)
    return names["CardMemory"](Card())


class Tensor:
    """As much of one as the page uses."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.nbytes = array.nbytes

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Any:
        whole = self.array if self.array.base is None else self.array.base
        storage = Tensor(whole)
        storage.nbytes = lambda: whole.nbytes  # type: ignore[assignment]
        return storage


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def send(card: Card) -> Iterator[Callable[[int], Callable[[Any], None]]]:
    """The function `send` of one of the page's blocks."""
    caches = []

    def of_block(number: int) -> Callable[[Any], None]:
        names: dict[str, Any] = {"card": card, "usermm": usermm}
        code = blocks(HOW_TO / "migrate.md", "python")
        exec(code[0], names)
        exec(code[number], names)
        caches.append(names.get("cache"))
        function: Callable[[Any], None] = names["send"]
        return function

    yield of_block
    for cache in caches:
        if cache is not None:
            cache.close()
            assert card.pinned == {}


DICTIONARY, FINALIZE, NOTHING, DATA_PTR = 1, 3, 5, 7  # the block "before"; "after" is the next one


def sent_before_and_after_an_exchange(send: Callable[[Any], None], card: Card, wrap: Callable[..., Any]) -> list[int]:
    """The keys of two sends, between which the memory at the address was exchanged."""
    first = np.zeros(LARGE, np.uint8)
    send(wrap(first))
    place = first.ctypes.data
    del first
    second = np.zeros(LARGE, np.uint8)
    if second.ctypes.data != place:
        pytest.skip("malloc gave another address")
    send(wrap(second))
    return [key for key, _ in card.sent]


@pytest.mark.parametrize(("number", "wrap"), [(DICTIONARY, np.asarray), (DATA_PTR, Tensor)])
def test_migrate_what_a_key_of_the_address_does(send: Any, card: Card, number: int, wrap: Any) -> None:
    before, after = sent_before_and_after_an_exchange(send(number), card, wrap)
    assert before == after, "the old key, for new memory: the page says so"


@pytest.mark.parametrize(
    ("number", "wrap"), [(DICTIONARY, np.asarray), (FINALIZE, np.asarray), (NOTHING, np.asarray), (DATA_PTR, Tensor)]
)
def test_migrate_the_cache_sees_the_exchange(send: Any, card: Card, number: int, wrap: Any) -> None:
    before, after = sent_before_and_after_an_exchange(send(number + 1), card, wrap)
    assert before != after


class Growing:
    """An array whose memory can be exchanged, as a tensor's can; numpy resizes none that is weakly referenced."""

    def __init__(self) -> None:
        self.grow(PAGE)

    def grow(self, length: int) -> None:
        self.memory = np.zeros(length, np.uint8)
        self.ctypes, self.nbytes = self.memory.ctypes, length
        self.address, self.size = self.memory.ctypes.data, length


@pytest.mark.parametrize("number", [FINALIZE, FINALIZE + 1])
def test_migrate_an_object_that_changes_its_memory(send: Any, card: Card, number: int) -> None:
    function, array = send(number), Growing()
    function(array)
    array.grow(LARGE)
    if number == FINALIZE:
        with pytest.raises(AssertionError, match="beyond"):
            function(array)
    else:
        function(array)
        assert card.sent[1][1] == array.address


def test_migrate_numpy_resizes_no_array_that_asked() -> None:
    with usermm.RegistrationCache(new_registrar()) as cache:
        asked, unremembered = np.zeros(PAGE, np.uint8), np.zeros(PAGE, np.uint8)
        cache.get(asked).release()
        cache.get(unremembered, probe=False).release()
        with pytest.raises(ValueError, match="cannot resize"):
            asked.resize(2 * PAGE, refcheck=False)
        unremembered.resize(2 * PAGE, refcheck=False)


def test_migrate_registering_each_time_works_before_and_after(send: Any, card: Card) -> None:
    before, after, array = send(NOTHING), send(NOTHING + 1), np.zeros(PAGE, np.uint8)
    for function in (before, before, after, after):
        function(array)
    assert [key for key, _ in card.sent] == [1, 2, 3, 3]
    assert {start for _, start in card.sent} == {array.ctypes.data}


@pytest.mark.parametrize(("number", "wrap"), [(DICTIONARY, np.asarray), (DATA_PTR, Tensor)])
def test_migrate_a_part_of_what_is_registered_is_sent_from_its_place(
    send: Any, card: Card, number: int, wrap: Any
) -> None:
    function, array = send(number + 1), np.zeros(4 * PAGE, np.uint8)
    function(wrap(array))
    function(wrap(array[PAGE:]))
    assert card.sent == [(1, array.ctypes.data), (1, array.ctypes.data + PAGE)]
