"""The preload library beyond the list: from Python, and what the list would say without the gate."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conformance import implementation_kernel
from conformance.client import Client
from conformance.implementation_preload import PreloadByLibc, PreloadBySystemCalls
from conformance.implementations import PAGE, closing_all
from support import compiled
from support.nodes import show_nodes
from support.preload import needs_preload

HERE = Path(__file__).parent
MADV_DONTNEED = 4

pytestmark = needs_preload


def test_the_whole_list_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """`usermm.Ummunotify` over the nodes that the library shows. Each test of the list runs, signals and forks too."""
    show_nodes(monkeypatch)
    options = ["-q", "-p", "no:cacheprovider", "-k", implementation_kernel.NAME]
    command = [sys.executable, "-m", "pytest", *options, str(HERE)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 250


@pytest.mark.parametrize("kind", [PreloadByLibc, PreloadBySystemCalls])
def test_without_the_gate_a_plain_load_is_late(
    tmp_path: Path, kind: type[PreloadByLibc] | type[PreloadBySystemCalls]
) -> None:
    """Rule 14 is met by the gate and not by chance: the same question to a library without it."""
    with closing_all(kind(compiled.preload_without("GATE", tmp_path))) as implementation:
        client = Client(implementation, 2, 0)
        address = implementation.map(1)
        client.register(address, address + PAGE, 1)
        page = client.device.mmap()
        late = [implementation.advise_and_load(address, 1, MADV_DONTNEED, page) != hits for hits in range(1, 5000)]
        assert any(late)
