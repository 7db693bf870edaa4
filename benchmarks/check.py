"""`device.check` against an empty call with the same arguments, and against the system call that it makes."""

from __future__ import annotations

import mmap

from benchmarks.calls import Calls
from benchmarks.devices import ABOVE_SMALL_INTEGERS, PAGE_BYTES, advance
from usermm import Ummunotify, _core
from usermm.measurement.harness import Effort, Figure, Result, differences, figures, interleave, ratios, statement

LOOP = "pass"
EMPTY = "core.empty(seen, no)"
BY_NAME = "device.check(seen, probe=False)"
BY_PLACE = "device.check(seen, no)"
PROBED = "device.check(seen)"
IOCTL = "the probe's ioctl in C"
IN_C = "usermm_check in C"
WITHOUT_PROBE_BAR = 2.0
PROBE_BAR_NS = 25.0


def run(calls: Calls, effort: Effort) -> Result:
    """Python statements by timeit, C loops in the same process."""
    number = effort.operations(100_000)
    with Ummunotify() as device, mmap.mmap(-1, PAGE_BYTES) as memory:
        advance(device, ABOVE_SMALL_INTEGERS)
        cookie = device.register(memory)
        names = {"device": device, "core": _core, "empty": _core.empty, "seen": device.generation, "no": False}
        codes = (LOOP, "empty(seen, no)", EMPTY, BY_NAME, BY_PLACE, PROBED)
        subjects = {code: statement(code, number, names) for code in codes}
        subjects[IOCTL] = calls.ioctl(number)
        subjects[IN_C] = calls.check(number)
        subjects["usermm_check without the probe in C"] = calls.check_without_probe(number)
        values = interleave(subjects, effort.rounds)
        device.unregister(cookie)
    net = {code: differences(values[code], values[LOOP]) for code in codes}
    return Result(
        "check",
        "check(seen): has anything changed?",
        figures("ns", values),
        [
            Figure.of(f"{BY_NAME} / {EMPTY}", "ratio", ratios(values[BY_NAME], values[EMPTY]), WITHOUT_PROBE_BAR),
            Figure.of(f"{BY_PLACE} / {EMPTY}", "ratio", ratios(values[BY_PLACE], values[EMPTY]), WITHOUT_PROBE_BAR),
            Figure.of(f"{BY_NAME} / empty(seen, no)", "ratio", ratios(values[BY_NAME], values["empty(seen, no)"])),
            Figure.of(f"{BY_NAME} / {EMPTY}, net of the loop", "ratio", ratios(net[BY_NAME], net[EMPTY])),
            Figure.of(f"{PROBED} - ioctl", "ns", differences(values[PROBED], values[IOCTL]), PROBE_BAR_NS),
            Figure.of(
                f"{PROBED} - ioctl, net of the loop", "ns", differences(net[PROBED], values[IOCTL]), PROBE_BAR_NS
            ),
            Figure.of(f"{IN_C} - ioctl", "ns", differences(values[IN_C], values[IOCTL]), PROBE_BAR_NS),
        ],
        [
            "The ioctl runs in this process, whose second thread makes any ioctl a little dearer (shared files).",
            "Both userfaultfds watch a page; nothing is unmapped meanwhile, so that no check waits.",
        ],
    )
