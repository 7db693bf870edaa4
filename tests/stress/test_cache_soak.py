"""`RegistrationCache` is never stale, however long and whoever unmaps: see support/cache_soak.py for what is done.

A million look-ups by default; with USERMM_STRESS=1 a hundred million and a million invalidations, and the proof that
the same run finds stale answers in copies of the extension that lack a protection. USERMM_LOOKUPS sets another number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import cache_soak, compiled
from support.processes import SOURCE, TESTS

STRESS = os.environ.get("USERMM_STRESS") == "1"
LOOKUPS = int(os.environ.get("USERMM_LOOKUPS", "100000000" if STRESS else "1000000"))
UNPROTECTED_LOOKUPS = 1_000_000
ATTEMPTS = 10  # on a busy machine a window of a microsecond may be met once in a million look-ups
FLAT_BYTES = 64 << 20  # as much as the arrays that are alive at two moments can differ by
LIMIT_S = 100 + LOOKUPS // 20_000  # more than ten times what it took on two shared cores

pytestmark = [
    pytest.mark.timeout(LIMIT_S * ATTEMPTS + 30),
    pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING)),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.shared_object("soak", tmp_path_factory.mktemp("native"))


def soak(library: Path, source: Path, lookups: int, limit_s: float) -> dict[str, Any]:
    """What a process of its own saw, with `usermm` from `source`."""
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{TESTS}", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "support.cache_soak", str(library), str(lookups)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    seen: dict[str, Any] = json.loads(done.stdout)
    print(seen)
    return seen


@pytest.fixture(scope="module")
def seen(library: Path) -> dict[str, Any]:
    return soak(library, SOURCE, LOOKUPS, LIMIT_S)


def test_no_answer_is_stale(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert (seen["violations"], seen["first_violation"]) == (0, "")
    assert seen["blocks"]["looks"] + seen["arrays"]["looks"] >= LOOKUPS
    assert seen["blocks"]["stale"] == 0
    assert seen["invalidations"] >= LOOKUPS // 100
    for met in ("given", "disturbances", "retries", "evictions"):
        assert seen[met] > LOOKUPS // 5000, met


def test_nothing_grows_and_nothing_is_left(seen: dict[str, Any]) -> None:
    assert seen["blocks"]["most_bytes"] <= cache_soak.BLOCKS_BYTES
    assert seen["arrays"]["most_bytes"] <= cache_soak.ARRAYS_BYTES
    assert seen["resident_growth"] < FLAT_BYTES
    assert seen["left"] == 0
    assert [seen["core"][name] for name in ("devices", "regions", "monitors")] == [0, 0, 0]


def test_children_find_it_empty_and_leave_the_parent_alone(seen: dict[str, Any]) -> None:
    assert seen["children"] == seen["forks"]


def test_arrays_are_where_the_device_thinks(seen: dict[str, Any]) -> None:
    if not seen["frames"]:
        pytest.skip("needs io_uring and CAP_SYS_ADMIN, which shows page frames in /proc/self/pagemap: run it as root")
    assert seen["arrays"]["looks"] > LOOKUPS // 3
    assert seen["arrays"]["stale"] == 0


@pytest.mark.skipif(not STRESS, reason="builds three copies of the extension: USERMM_STRESS=1 runs it")
@pytest.mark.parametrize("protection", ["PROBE", "RECHECK", "IN_FLIGHT"])
def test_without_its_protection_it_is_stale(protection: str, library: Path, tmp_path: Path) -> None:
    source = compiled.package_without(protection, tmp_path)
    attempts = (soak(library, source, UNPROTECTED_LOOKUPS, LIMIT_S) for _ in range(ATTEMPTS))
    assert any(seen["blocks"]["stale"] for seen in attempts)
