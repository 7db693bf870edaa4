"""The tables of `usermm bench`, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from usermm.measurement import hits
from usermm.measurement.harness import Effort, Figure, Result, Rounds, interleave, on_one_core, ratios
from usermm.measurement.hits import Hits
from usermm.measurement.misses import OTHERS, Memory, Misses
from usermm.measurement.regions import REGION_BYTES, kind
from usermm.measurement.registering import Registering
from usermm.measurement.ucx import UcxCache, UcxError

FULL: Final = Effort(rounds=21, share=1.0)
QUICK: Final = Effort(rounds=3, share=0.2)
COUNTS: Final = (1, 1_000, 100_000)

_US: Final = 1000.0
_KIB: Final = 1024
_SAME: Final = "memory mapped there since"
_OTHER: Final = "another region"
_UCX: Final = "UCX 1.22 by ctypes"


def measure(effort: Effort) -> Iterator[Result]:
    """Each table when it is done. Raises UnavailableError, LimitError."""
    with on_one_core(), ExitStack() as stack:
        ucx, missing = None, []
        try:
            ucx = stack.enter_context(UcxCache())
        except UcxError as error:
            missing.append(str(error))
        for count in COUNTS:
            yield _hits(count, effort, ucx, missing)
        with Misses(effort, ucx) as misses:
            yield _misses(misses, effort, ucx)
            yield _after_unmap(misses, effort, ucx)
        yield _registering(effort)


def _hits(count: int, effort: Effort, ucx: UcxCache | None, missing: list[str]) -> Result:
    with Hits(count, effort, ucx) as sides:
        values = hits.net(interleave(sides.subjects(), effort.rounds))
        notes = sides.notes()
    if count == COUNTS[0]:
        notes += [*_HIT_NOTES, f"Buffers are {kind()}, asked for in random order.", *missing, *_told(ucx)]
    peers = [name for name in (*hits.BY_HAND, hits.UCX) if name in values]
    return Result(
        f"hit_{count}",
        f"A hit: get + release, {count:,} region{'s' * (count > 1)} of {REGION_BYTES // _KIB} KiB",
        [Figure.of(name, "ns", values[name]) for name in (*hits.OURS, *peers)],
        [Figure.of(f"the same object / {peer}", "ratio", ratios(values[hits.HIT], values[peer])) for peer in peers],
        notes,
    )


_HIT_NOTES = (
    "CPU time of one thread, kept on one core, without the loop and without the making of a new object.",
    "dict and weakref.finalize are caches by hand, which give a stale answer after a munmap.",
)


def _told(ucx: UcxCache | None) -> list[str]:
    return ["UCX is told by this program which memory goes, and gives a stale answer otherwise."] if ucx else []


def _misses(misses: Misses, effort: Effort, ucx: UcxCache | None) -> Result:
    subjects = {f"cache.get(buffer): {memory.value}": misses.ours(memory) for memory in Memory}
    subjects[hits.FINALIZE] = misses.finalizing()
    if ucx:
        subjects[_UCX] = misses.ucx(ucx)
    return Result(
        "miss",
        f"A miss: a device that does nothing, {OTHERS:,} other regions",
        _in_us(interleave(subjects, effort.rounds)),
        [],
        ["Only usermm has the kernel watch the memory, which is most of its price."],
    )


def _after_unmap(misses: Misses, effort: Effort, ucx: UcxCache | None) -> Result:
    subjects = {
        f"cache.get(buffer), {_OTHER}": misses.after_unmap(same=False),
        f"cache.get(buffer), {_SAME}": misses.after_unmap(same=True),
    }
    if ucx:
        subjects[f"{_UCX}, {_OTHER}"] = misses.ucx_after_unmap(ucx, same=False)
        subjects[f"{_UCX}, {_SAME}"] = misses.ucx_after_unmap(ucx, same=True)
    subjects["two readings of the clock, which are in all rows"] = misses.clock()
    return Result(
        "after_unmap",
        f"The first look-up after a munmap, {OTHERS:,} regions",
        _in_us(interleave(subjects, effort.rounds)),
        [],
        ["Memory mapped there since is registered anew; the other region still is registered.", *_told(ucx)],
    )


def _registering(effort: Effort) -> Result:
    with Registering(effort) as devices, Hits(1_000, effort, None) as sides:
        subjects = {hits.HIT: sides.subjects()[hits.HIT]}
        sizes = {}
        for (name, size), subject in devices.subjects().items():
            row = f"{name}, {size // _KIB} KiB"
            subjects[row] = subject
            sizes[row] = size
        values = interleave(subjects, effort.rounds)
        notes = [*devices.notes, *sides.notes()]
    return Result(
        "registering",
        "Registering for each use instead: register + deregister",
        _in_us(values),
        [
            Figure.of(f"{row} / a hit", "ratio", ratios(values[row], values[hits.HIT]))
            for row, size in sizes.items()
            if size == REGION_BYTES
        ],
        ["Memory in use, by system calls through ctypes (about 0.3 us each).", *notes],
    )


def _in_us(values: dict[str, Rounds]) -> list[Figure]:
    return [Figure.of(name, "us", [ns / _US for ns in rounds]) for name, rounds in values.items()]
