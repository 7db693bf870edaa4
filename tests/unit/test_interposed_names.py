"""The names that the preload library interposes are those that the documentation gives reasons for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.preload import LIBRARY, needs_preload

PAGE = Path(__file__).parents[2] / "docs" / "interposed-names.md"
MOST = 30


def documented() -> set[str]:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@needs_preload
def test_the_names_are_the_documented_ones() -> None:
    try:
        done = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs nm (apt install binutils)")
    names = {line.split()[2].split("@")[0] for line in done.stdout.splitlines() if line.split()[1] in "TWi"}
    assert names == documented()
    assert len(names) <= MOST
