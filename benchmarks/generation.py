"""`device.generation` against calls and attributes that do nothing."""

from __future__ import annotations

from benchmarks.calls import Calls
from benchmarks.devices import ABOVE_SMALL_INTEGERS, advance
from benchmarks.harness import Effort, Figure, Result, differences, figures, interleave, ratios, statement
from usermm import Ummunotify, _core

LOOP = "pass"
GENERATION = "device.generation"
BAR = 1.5
FLOORS = ("empty()", "core.empty()", "slice.start", "device.flags")


def run(calls: Calls, effort: Effort) -> Result:
    """Python statements by timeit, and usermm_generation in C."""
    number = effort.operations(200_000)
    with Ummunotify() as device, Ummunotify() as young:
        advance(device, ABOVE_SMALL_INTEGERS)
        names = {"device": device, "young": young, "core": _core, "empty": _core.empty, "slice": slice(1, 2)}
        codes = (LOOP, *FLOORS, GENERATION, "young.generation")
        subjects = {code: statement(code, number, names) for code in codes}
        subjects["usermm_generation in C"] = calls.generation(number)
        values = interleave(subjects, effort.rounds)
    compared = [
        Figure.of(f"{GENERATION} / {floor}", "ratio", ratios(values[GENERATION], values[floor]), BAR if floor in FLOORS[:2] else None)
        for floor in FLOORS
    ]
    net = {code: differences(values[code], values[LOOP]) for code in (*FLOORS, GENERATION)}
    compared += [
        Figure.of(f"{GENERATION} / {floor}, net of the loop", "ratio", ratios(net[GENERATION], net[floor]))
        for floor in FLOORS
    ]
    return Result(
        "generation",
        "The generation, by its own thread",
        figures("ns", values),
        compared,
        [
            "Python rows include the empty loop, as timeit measures; the rows net of it subtract `pass` of the same round.",
            "empty and core are local names; core.empty() looks the attribute up in the module each time.",
            "slice.start and device.flags do nothing but return a field: no attribute of a C type is read for less.",
            f"device has a generation above {ABOVE_SMALL_INTEGERS}, so that an int is made; young has 0, which CPython keeps.",
        ],
    )
