"""What the figures of `usermm bench` and of the benchmarks are made of. No timing is looked at."""

from __future__ import annotations

import gc
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from usermm.errors import LimitError
from usermm.measurement import hits, regions, registering, ucx
from usermm.measurement.caches import FinalizeCache, NoDevice
from usermm.measurement.harness import Effort, Figure, Result, differences, interleave, on_one_core, ratios, walk
from usermm.measurement.hits import Hits
from usermm.measurement.misses import Memory, Misses
from usermm.measurement.regions import REGION_BYTES, Regions
from usermm.reporters import bench as reporter
from usermm.uapi import procfs

LITTLE = Effort(rounds=1, share=0.001)


def mappings(start: int, end: int) -> list[procfs.Mapping]:
    with open("/proc/self/maps", encoding="utf-8", newline="\n") as maps:
        return procfs.overlapping(maps, start, end)


def test_subjects_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def subject(name: str) -> int:
        calls.append(name)
        return len(calls)

    values = interleave({"a": lambda: subject("a"), "b": lambda: subject("b")}, 2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [4, 5], "b": [3, 6]}


def test_ratios_and_differences_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert differences([2.0, 9.0], [1.0, 3.0]) == [1.0, 6.0]


def test_a_walk_meets_every_item_once_in_order() -> None:
    seen: list[int] = []
    walk("see(buffer)", [3, 1, 2], {"see": seen.append})()
    assert seen == [3, 1, 2]


def test_one_core_and_then_all_again() -> None:
    before = os.sched_getaffinity(0)
    with on_one_core():
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("own", [False, True])
def test_regions_are_aligned_and_have_the_mappings_they_say(own: bool) -> None:
    with Regions(3, own_mappings=own) as memory:
        memory.touch()
        assert [address % REGION_BYTES for address in memory.addresses] == [0, 0, 0]
        assert memory.keys == [(buffer.__array_interface__["data"][0], buffer.nbytes) for buffer in memory.buffers]
        usable = [found for found in mappings(memory.start, memory.end) if found.permissions == "rw-p"]
        assert len(usable) == (3 if own else 1)
        around = mappings(memory.start - 1, memory.end + 1)
        assert (around[0].permissions, around[-1].permissions) == ("---p", "---p")
        start, end = memory.start, memory.end
    assert mappings(start, end) == []


def test_regions_that_do_not_fit_are_one_line_with_a_cure() -> None:
    with pytest.raises(LimitError, match=r"for 1000000000000 regions: .*ulimit -v"):
        Regions(10**12)


def test_without_numpy_buffers_are_memoryviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert "NumPy is not installed" in regions.kind()
    with Regions(2) as memory:
        first = memory.buffers[0]
        assert isinstance(first, memoryview) and first.nbytes == REGION_BYTES
        key = eval(regions.address_code(), {"buffer": first, "address_of": regions.address_of}), first.nbytes
        assert key == memory.keys[0]
        del first


def test_with_numpy_the_key_is_made_of_the_array() -> None:
    with Regions(1) as memory:
        (buffer,) = memory.buffers
        assert eval(regions.address_code(), {"buffer": buffer}) == memory.addresses[0]


def test_the_cache_by_weak_references_forgets_with_the_object() -> None:
    given_back: list[int] = []

    class Device(NoDevice):
        def deregister(self, handle: int) -> None:
            given_back.append(handle)

    cache = FinalizeCache(Device())
    buffer = np.zeros(8)
    handle = cache.get(buffer)
    assert cache.get(buffer) == handle
    del buffer
    gc.collect()
    assert given_back == [handle]


@pytest.mark.parametrize("count", [1, 40])
def test_every_row_of_hits_hits(count: int) -> None:
    with on_one_core(), Hits(count, LITTLE, None) as sides:
        values = interleave(sides.subjects(), 2)
        assert sides.notes() == []
    assert set(hits.OURS) | set(hits.BY_HAND) <= set(values)
    assert set(hits.net(values)) == set(values)


def test_a_miss_does_not_pass_for_a_hit() -> None:
    with Hits(4, LITTLE, None) as sides:
        sides._cache.clear()
        interleave(sides.subjects(), 1)
        assert sides.notes() == ["Of the look-ups in 4 regions 4 missed."]


@pytest.mark.parametrize("memory", Memory)
def test_every_row_of_misses_misses(memory: Memory) -> None:
    with Misses(LITTLE, None) as sides:
        before = sides._cache.stats()
        sides.ours(memory)()
        after = sides._cache.stats()
    timed = LITTLE.operations(2_000)
    assert after.misses - before.misses == timed * (2 if memory is Memory.SEEN else 1)
    assert after.hits == before.hits


@pytest.mark.parametrize("same", [True, False])
def test_after_an_unmap_that_region_alone_is_registered_anew(same: bool) -> None:
    with Misses(Effort(rounds=1, share=0.02), None) as sides:
        before = sides._cache.stats()
        sides.after_unmap(same=same)()
        after = sides._cache.stats()
    assert after.misses - before.misses == after.unmapped - before.unmapped == 10
    assert after.hits - before.hits == (0 if same else 10)


def test_a_device_that_is_refused_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(slots: int) -> None:
        raise LimitError(12, f"no ring of {slots}")

    monkeypatch.setattr(registering, "Ring", refuse)
    with registering.Registering(LITTLE) as devices:
        found = {name for name, _ in devices.subjects()}
        assert registering.IO_URING not in found
        assert devices.notes[0] == "io_uring, a fixed buffer is missing: no ring of 1"


@pytest.mark.parametrize(
    ("version", "words"), [(None, "not installed"), ("1.21.0", "1.21.0 is installed"), ("1.220.0", "1.220.0")]
)
def test_another_ucx_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    package = types.ModuleType("libucx")
    package.__file__, package.__version__ = "/nowhere/libucx/__init__.py", version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "libucx", package if version else None)  # type: ignore[arg-type]
    with pytest.raises(ucx.UcxError, match=words) as raised:
        ucx.UcxCache()
    assert ucx.ADVICE in str(raised.value)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = types.ModuleType("libucx")
    package.__file__, package.__version__ = str(tmp_path / "__init__.py"), "1.22.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "libucx", package)
    before = dict(os.environ)
    with pytest.raises(ucx.UcxError, match=r"libucs\.so"):
        ucx.UcxCache()
    assert dict(os.environ) == before


def test_a_row_says_whether_its_bar_is_met() -> None:
    met, missed = Figure("fast", "ns", 1, 2, 3, 2.5), Figure("slow", "ratio", 1, 2, 3, 1.5)
    result = Result("name", "A title", [met], [missed], ["A note."])
    text = "\n".join(reporter.result_lines(result))
    assert "fast (ns)" in text and "bar 2.50: met" in text
    assert "bar 1.50: NOT met" in text
    assert text.endswith("  A note.")
