"""usermm's cache, its reference model and UCX's, side by side: see ucx_side_by_side.py for what is compared.

20 000 operations by default, a million with USERMM_STRESS=1. UCX cannot be unloaded: each run is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ucx_rcache
from support.available import needs_userfaultfd
from support.processes import SOURCE, TESTS

pytestmark = needs_userfaultfd

OPERATIONS = 250_000 if os.environ.get("USERMM_STRESS") == "1" else 5_000
RUNS = ((4096, 0), (4096, 1), (16, 2), (512, 3))
"""Granularity in bytes and seed; odd seeds have many pages, even ones few."""


@pytest.fixture(scope="module")
def shared_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = ucx_rcache.missing()
    if reason is not None:
        pytest.skip(f"nothing to compare with: {reason}")
    return ucx_rcache.build(tmp_path_factory.mktemp("ucx"))


def play(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).with_name("ucx_side_by_side.py")
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(SOURCE), str(TESTS)])
    return subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.timeout(660)
@pytest.mark.parametrize(("granularity", "seed"), RUNS)
def test_the_same_registrations(shared_object: Path, granularity: int, seed: int) -> None:
    done = play(shared_object, granularity, seed, OPERATIONS)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    counts = json.loads(done.stdout)
    for name in ("hits", "misses", "merged", "invalidated", "held and invalid", "late", "holes"):
        assert counts[name] >= 3, f"{name}: this hardly ever happened, so it was not compared"


def test_an_event_that_ucx_misses_is_found(shared_object: Path) -> None:
    done = play(shared_object, 4096, 1, OPERATIONS, "deaf")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
