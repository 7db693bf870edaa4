"""Objects are counted: after each test the process has no more of anything than before it.

A test that failed is not asked, since its traceback keeps its objects alive.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np  # here, so that the threads of its libraries are there before the first count
import pytest

from usermm import _core

assert np  # nothing else is wanted of it

_PATIENCE_S = 2.0  # a thread that was joined can still be on its way out of the kernel
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.excinfo is not None:
        item.stash[_failed] = True
    yield


@pytest.fixture(autouse=True)
def objects_are_counted(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _alive()
    yield
    if request.node.stash.get(_failed, False):
        return
    until = time.monotonic() + _PATIENCE_S
    while _excess(before) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.005)
    assert not _excess(before), "this test left objects behind"


def _alive() -> dict[str, Any]:
    counts = _core.counts()
    return {
        "devices": counts["devices"],
        "regions": counts["regions"],
        "monitors": counts["monitors"],
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": _descriptors(),
    }


def _descriptors() -> dict[int, str]:
    """What each number is open on; the one by which the directory is read is gone by the time it is asked."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _excess(before: dict[str, Any]) -> dict[str, str]:
    now = _alive()
    numbers = [name for name in before if name != "descriptors"]
    more = {name: f"{before[name]} -> {now[name]}" for name in numbers if now[name] > before[name]}
    new = {number: now["descriptors"][number] for number in now["descriptors"].keys() - before["descriptors"].keys()}
    if new:
        more["descriptors"] = repr(new)
    return more
