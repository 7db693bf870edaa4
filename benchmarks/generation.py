"""`device.generation` against calls and attributes that do nothing."""

from __future__ import annotations

from benchmarks.calls import Calls
from benchmarks.devices import ABOVE_SMALL_INTEGERS, advance
from usermm import Ummunotify, _core
from usermm.measurement.harness import Effort, Figure, Result, differences, figures, interleave, ratios, statement

LOOP = "pass"
GENERATION = "device.generation"
BAR = 1.5
FLOORS = {"empty()": BAR, "core.empty()": BAR, "slice.start": None, "device.flags": None}
"""With the bar, for the two that are empty calls."""


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
        Figure.of(f"{GENERATION} / {floor}", "ratio", ratios(values[GENERATION], values[floor]), bar)
        for floor, bar in FLOORS.items()
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
            "Python rows include the empty loop, as timeit measures; net of it: less `pass` of the same round.",
            "empty and core are local names; core.empty() looks the attribute up in the module each time.",
            "slice.start and device.flags do nothing but return a field: no attribute of a C type is read for less.",
            f"The generation of device is {ABOVE_SMALL_INTEGERS}: an int is made; of young 0, which CPython keeps.",
        ],
    )
