"""The registration cache from Python: hits beside a dict, misses, and the first look-up after memory went."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.calls import Calls
from usermm.measurement import hits
from usermm.measurement.harness import (
    Effort,
    Figure,
    Result,
    Rounds,
    differences,
    interleave,
    on_one_core,
    own_time,
    ratios,
)
from usermm.measurement.hits import Hits
from usermm.measurement.misses import OTHERS, Memory, Misses
from usermm.measurement.regions import kind

DICT_BARS = {1: None, 1_000: 0.8, 100_000: 0.7}
"""By the number of regions: of a hit, in look-ups of a dict."""
NEW_OBJECT_BAR_NS = 60.0
PEERS = (hits.DICT, hits.DICT_SAME_KEY, hits.DICT_OF_BUFFER, hits.FINALIZE)
MISS_BAR_US = 3.0
AFTER_UNMAP_BAR_US = 1.2
IOCTL = "the probe's ioctl in C"


def run(calls: Calls, effort: Effort) -> Result:
    """All in this thread, on one core. UCX through ctypes says little here: c/rcache.c has it in C."""
    measured, compared, notes = [], [], []
    with on_one_core():
        for count in DICT_BARS:
            with Hits(count, effort, None) as sides:
                subjects = {**sides.subjects(), IOCTL: _ioctl(calls, effort)}
                values = interleave(subjects, effort.rounds)
                notes += sides.notes()
            measured += [Figure.of(f"{name}, {_regions(count)}", "ns", rounds) for name, rounds in values.items()]
            compared += _compared(count, values)
        with Misses(effort, None) as misses:
            measured += _misses(misses, effort)
    return Result("cache", "registration cache: get + release in Python", measured, compared, [*_notes(), *notes])


def _ioctl(calls: Calls, effort: Effort) -> Callable[[], float]:
    number = effort.operations(20_000)
    return own_time(calls.ioctl(number), number)


def _compared(count: int, values: dict[str, Rounds]) -> list[Figure]:
    net = hits.net(values)
    found = []
    for row in (hits.HIT, hits.BOUND):
        code = row.partition(",")[0]
        for peer in PEERS:
            bar = DICT_BARS[count] if peer == hits.DICT else None
            name = f"{code} / {peer}, {_regions(count)}"
            found.append(Figure.of(name, "ratio", ratios(values[row], values[peer]), bar))
        name = f"{code} / {hits.DICT}, net, {_regions(count)}"
        found.append(Figure.of(name, "ratio", ratios(net[row], net[hits.DICT])))
    for row, new in ((hits.VIEW, hits.NEW_VIEW), (hits.PART, hits.NEW_PART)):
        more = differences(differences(net[row], net[hits.HIT]), values[IOCTL])
        bar = NEW_OBJECT_BAR_NS if row == hits.VIEW else None
        found.append(Figure.of(f"new {new} - same object - ioctl, {_regions(count)}", "ns", more, bar))
    return found


def _misses(misses: Misses, effort: Effort) -> list[Figure]:
    after = "first get after a munmap"
    subjects = {f"miss, {memory.value}": misses.ours(memory) for memory in Memory}
    subjects[f"{after}, another region"] = misses.after_unmap(same=False)
    subjects[f"{after}, memory mapped there since"] = misses.after_unmap(same=True)
    subjects["two readings of the clock"] = misses.clock()
    subjects[f"miss, {hits.FINALIZE}"] = misses.finalizing()
    values = interleave(subjects, effort.rounds)
    bars = {name: AFTER_UNMAP_BAR_US if name.startswith(after) else MISS_BAR_US for name in list(subjects)[:-2]}
    return [Figure.of(name, "us", [ns / 1000 for ns in rounds], bars.get(name)) for name, rounds in values.items()]


def _notes() -> list[str]:
    return [
        f"Buffers are {kind()} of 64 KiB, chosen at random. Hits: CPU time of the thread, with the empty loop, `pass`.",
        "Keys lie in memory as the buffers do. The very key that is stored needs no comparison, only its address.",
        "net: without the loop. A new object in differences: without the making of it, too, and the same one net.",
        "The ioctl is the probe's, in a loop in C in this process.",
        f"Misses, first gets: {OTHERS:,} other regions, a registrar in Python that does nothing, the probe included.",
        "First gets are timed one by one, two readings of the clock included.",
        "One thread, kept on one core, with the monitor's: elsewhere it moves or wakes another core by chance.",
    ]


def _regions(count: int) -> str:
    return f"{count:,} region{'s' * (count > 1)}"
