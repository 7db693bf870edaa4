"""Every kind of change that takes watched memory away, made on purpose: does the device notice?"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from usermm.monitors import calls
from usermm.monitors.base import Device, EventTrial, Outcome
from usermm.monitors.calls import PAGE

LENGTH: Final = 4 * PAGE


class Scene:
    """Memory and one watched range for one trial; `clear` unmaps what the trial left."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mapped: set[tuple[int, int]] = set()
        self._cookie: int | None = None
        self._seen = 0

    def map(self, *, shared: bool = False) -> int:
        """Four fresh pages, all written to."""
        start = calls.map_memory(LENGTH, shared=shared)
        self._mapped.add((start, LENGTH))
        calls.touch(start, LENGTH)
        return start

    def watch(self, start: int, length: int = LENGTH) -> None:
        self._cookie = self._device.register_range(start, start + length)
        self._seen = self._device.generation

    def unmap(self, start: int) -> None:
        calls.unmap(start, LENGTH)
        self._mapped.discard((start, LENGTH))

    def remap(self, start: int, old_length: int, new_length: int, flags: int, target: int = 0) -> int:
        """mremap, with what is mapped afterwards kept in mind."""
        moved = calls.remap(start, old_length, new_length, flags, target)
        if old_length and not flags & calls.MREMAP_DONTUNMAP:
            self._mapped.discard((start, LENGTH))
        self._mapped.add((moved, new_length))
        return moved

    def noticed(self) -> bool:
        """True when the device reports a change by its generation, with the probe and without."""
        changed = self._device.generation != self._seen
        return changed and not self._device.check(self._seen, probe=False) and not self._device.check(self._seen)

    def clear(self) -> None:
        if self._cookie is not None:
            self._device.unregister(self._cookie)
        for start, length in self._mapped:
            calls.unmap(start, length)


def _munmap(scene: Scene) -> None:
    start = scene.map()
    scene.watch(start)
    scene.unmap(start)


def _map_fixed(scene: Scene) -> None:
    start = scene.map()
    scene.watch(start)
    calls.map_memory(LENGTH, at=start, flags=calls.MAP_FIXED)


def _shrink(scene: Scene) -> None:
    start = scene.map()
    scene.watch(start)
    scene.remap(start, LENGTH, PAGE, 0)


def _move(scene: Scene) -> None:
    start = scene.map()
    # Moving onto a place that is reserved makes the kernel move, where growing could succeed in place.
    target = scene.map()
    scene.watch(start)
    scene.remap(start, LENGTH, LENGTH, calls.MREMAP_MAYMOVE | calls.MREMAP_FIXED, target)


def _move_onto(scene: Scene) -> None:
    start, other = scene.map(), scene.map()
    scene.watch(start)
    scene.remap(other, LENGTH, LENGTH, calls.MREMAP_MAYMOVE | calls.MREMAP_FIXED, start)


def _move_pages(scene: Scene) -> None:
    start = scene.map()
    scene.watch(start)
    scene.remap(start, LENGTH, LENGTH, calls.MREMAP_MAYMOVE | calls.MREMAP_DONTUNMAP)


def _advise(advice: int, *, shared: bool = False) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        start = scene.map(shared=shared)
        scene.watch(start)
        calls.advise(start, LENGTH, advice)

    return change


def _remove_elsewhere(scene: Scene) -> None:
    start = scene.map(shared=True)
    # An old length of 0 duplicates shared memory.
    second = scene.remap(start, 0, LENGTH, calls.MREMAP_MAYMOVE)
    scene.watch(start)
    calls.advise(second, LENGTH, calls.MADV_REMOVE)


def _swap_pages(scene: Scene) -> None:
    start = scene.map(shared=True)
    scene.watch(start)
    calls.swap_pages(start, PAGE, LENGTH // PAGE - 1)


def _attach_over(scene: Scene) -> None:
    start = scene.map()
    scene.watch(start)
    calls.attach_over(start, LENGTH)


def _heap(scene: Scene) -> None:
    start = -(-calls.move_break(LENGTH + PAGE) // PAGE) * PAGE
    top = calls.move_break(0)
    scene.watch(start)
    if calls.move_break(0) != top:
        raise OSError(errno.EAGAIN, "the heap grew during the trial")
    calls.move_break(-(top - start))


@dataclass(frozen=True, slots=True)
class Trial:
    """A change by its name; `promised` is false for what userfaultfd is known not to report."""

    name: str
    change: Callable[[Scene], None]
    promised: bool = True


PROMISED: Final = (
    Trial("munmap", _munmap),
    Trial("mmap MAP_FIXED over it", _map_fixed),
    Trial("mremap shrink", _shrink),
    Trial("mremap move", _move),
    Trial("mremap onto it", _move_onto),
    Trial("mremap MREMAP_DONTUNMAP", _move_pages),
    Trial("madvise MADV_DONTNEED", _advise(calls.MADV_DONTNEED)),
    Trial("madvise MADV_DONTNEED_LOCKED", _advise(calls.MADV_DONTNEED_LOCKED)),
    Trial("madvise MADV_FREE", _advise(calls.MADV_FREE)),
    Trial("madvise MADV_REMOVE, shared anonymous memory", _advise(calls.MADV_REMOVE, shared=True)),
)
HEAP: Final = Trial("brk shrink", _heap)
BLIND_SPOTS: Final = (
    Trial("madvise MADV_GUARD_INSTALL", _advise(calls.MADV_GUARD_INSTALL), promised=False),
    Trial("madvise MADV_REMOVE through a second mapping", _remove_elsewhere, promised=False),
    Trial("remap_file_pages on shared memory", _swap_pages, promised=False),
    Trial("shmat SHM_REMAP over it", _attach_over, promised=False),
)


def run_all(open_device: Callable[[], Device], *, owns_heap: bool = False) -> tuple[EventTrial, ...]:
    """Each trial once, on one device; the heap's only where the process does nothing else (`owns_heap`)."""
    chosen = (*PROMISED, *((HEAP,) if owns_heap else ()), *BLIND_SPOTS)
    device = open_device()
    try:
        return tuple(run(trial, device) for trial in chosen)
    finally:
        device.close()


def run(trial: Trial, device: Device) -> EventTrial:
    """One trial; raises only what `Device.unregister` raises."""
    scene = Scene(device)
    try:
        trial.change(scene)
        outcome = Outcome.SEEN if scene.noticed() else Outcome.MISSED
        return EventTrial(trial.name, trial.promised, outcome)
    except OSError as error:
        # EINVAL: a kernel that does not know the advice or the flag, so nobody can use it here.
        absent = error.errno in (errno.EINVAL, errno.ENOSYS)
        return EventTrial(trial.name, trial.promised, Outcome.ABSENT if absent else Outcome.FAILED, str(error))
    finally:
        scene.clear()
