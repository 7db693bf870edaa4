"""The program of the README prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from usermm.monitors import calls

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_program_prints_its_output() -> None:
    program, output = re.findall(r"```(?:python)?\n(.*?)```", README, re.DOTALL)[:2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    addresses = r"\d{9,}"  # differ from run to run
    assert re.sub(addresses, "#", done.stdout) == re.sub(addresses, "#", output)


def test_the_tutorials_class_works() -> None:
    """With registrations that remember what the memory held when they were made: a stale one shows old bytes."""
    tutorial = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", tutorial, re.DOTALL)
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


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "ARCHITECTURE.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken
