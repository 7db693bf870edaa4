"""Calls that are made thousands of times, after which nothing may have grown."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from usermm import _core

TIMES: Final = 2000
ROUNDS: Final = 6
BLOCKS_ALLOWED: Final = 40  # caches of the interpreter fill up now and then; a leak is at least one for each call
KIBIBYTES_ALLOWED: Final = 96
PAGE_KIB: Final = os.sysconf("SC_PAGE_SIZE") // 1024


def check_no_growth(call: Callable[[], Any], times: int = TIMES, settle: Callable[[], Any] = bool) -> None:
    """A leak shows in every round; caches that fill and arenas that move do not.

    `settle` is called before each count, for what ends a little later.
    """
    _growth(call, times // 10, settle)
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(_growth(call, times, settle))
        if not _grows(rounds[-1]):
            return
    raise AssertionError(f"grows in every round of {times} calls: {rounds}")


def _growth(call: Callable[[], Any], times: int, settle: Callable[[], Any]) -> dict[str, int]:
    before = _now(settle)
    for _ in range(times):
        call()
    after = _now(settle)
    return {name: after[name] - before[name] for name in before}


def _grows(growth: dict[str, int]) -> bool:
    exact = growth["descriptors"] or growth["devices"] or growth["regions"]
    return bool(exact or growth["blocks"] > BLOCKS_ALLOWED or growth["KiB"] > KIBIBYTES_ALLOWED)


def _now(settle: Callable[[], Any]) -> dict[str, int]:
    settle()
    gc.collect()
    counts = _core.counts()
    return {
        "blocks": sys.getallocatedblocks(),
        "KiB": _resident_kib(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "devices": counts["devices"],
        "regions": counts["regions"],
    }


def _resident_kib() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE_KIB
