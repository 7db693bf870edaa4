"""The programs of the how-to pages run as they are printed, and print what the pages say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pins import PAGE
from support.processes import in_child, run_quietly
from support.rings import ForeignRing

import usermm
from usermm.errors import ForkedError, LimitError, UnavailableError
from usermm.registrars import Overlap
from usermm.uring import Ring

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


def blocks(page: str) -> tuple[list[str], str]:
    """The page's programs, and what it says that they print."""
    found = re.findall(r"```(python)?\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)
    return [text for kind, text in found if kind], "".join(text for kind, text in found if not kind)


def needs_io_uring() -> None:
    try:
        Ring(1).close()
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")


@pytest.mark.parametrize("page", ["io_uring", "mlock", "registrar"])
def test_the_program_of_the_page_runs(page: str, tmp_path: Path) -> None:
    if page == "io_uring":
        needs_io_uring()
    programs, output = blocks(page)
    text = "import warnings\nwarnings.simplefilter('error')\n" + "\n\n".join(programs)
    assert run_quietly(text, tmp_path) == output


def test_the_registrar_of_the_page_keeps_its_promises() -> None:
    registrar_text = blocks("registrar")[0][0]
    names: dict[str, Any] = {}
    exec(compile(registrar_text, "registrar.md", "exec"), names)  # the page's own text
    lines = [line for line in registrar_text.partition("class")[2].splitlines() if line.strip()]
    assert len(lines) <= 20, "twenty lines, it says"

    class Card:
        def __init__(self) -> None:
            self.keys: set[int] = set()

        def pin(self, address: int, _length: int) -> int:
            if len(self.keys) == 2:
                raise MemoryError
            self.keys.add(address)
            return address

        def unpin(self, key: int) -> None:
            self.keys.remove(key)

    registrar = names["CardMemory"](Card())
    assert registrar.traits.overlap is Overlap.REFUSED
    handles = [registrar.register(address, PAGE) for address in (PAGE, 2 * PAGE)]
    with pytest.raises(LimitError, match="max_count="):
        registrar.register(3 * PAGE, PAGE)

    def child() -> int:
        registrar.deregister(handles[0])
        with pytest.raises(ForkedError):
            registrar.register(3 * PAGE, PAGE)
        return len(registrar.card.keys)

    assert in_child(child) == 2
    for handle in handles:
        registrar.deregister(handle)
    assert registrar.card.keys == set()


def test_the_loop_of_the_page_serves_requests_and_tags() -> None:
    needs_io_uring()
    names: dict[str, Any] = {"IoUring": usermm.registrars.IoUring, "usermm": usermm}
    exec(compile(blocks("io_uring")[0][1], "io_uring.md", "exec"), names)
    results: list[int] = []
    reader, writer = os.pipe()
    with ForeignRing() as ring:
        registrar, cache = names["open_cache"](ring)
        waiting: dict[int, Callable[[int], None]] = {}
        for number in range(300):  # more than there are slots, and than the completion queue holds
            memory = np.zeros(PAGE, np.uint8)
            with cache.get(memory) as registration:
                os.write(writer, b"data")
                waiting[number] = results.append
                ring.read_fixed(reader, registration.handle.part(memory.ctypes.data, 4), number)
                while waiting:
                    names["turn"](ring, registrar, waiting)
            assert bytes(memory[:4]) == b"data"
        cache.close()
        names["turn"](ring, registrar, waiting)
        assert registrar.waiting == 0
    for end in (reader, writer):
        os.close(end)
    assert results == [4] * 300
