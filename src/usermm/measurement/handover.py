"""How long an array takes from one process to another and back, and what a channel moves, each pinned to a core.

Each way is a pair of functions over memory that both keep: `exchange` in this process hands an array over and takes one
back, `answer` does the reverse in a child. Nothing is copied: of each the last byte is written and read. Half of an
exchange is one hand-over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from usermm.channels.channel import Channel
from usermm.grants.domain import Domain
from usermm.hypervisor.embedded import Hypervisor
from usermm.measurement.harness import Effort, Figure, Result, Rounds, figures, interleave, ratios

SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
_PAGES = 1 << 16


class Way(Protocol):
    """One means of handing arrays over, made before the fork."""

    def parent(self) -> None:
        """Opens this process's end, after the fork."""

    def child(self) -> None:
        """Opens the child's end."""

    def exchange(self) -> None:
        """Hands an array over, waits for one, and looks at it."""

    def answer(self) -> None:
        """Waits for an array, looks at it, and hands one back."""

    def close(self) -> None:
        """Lets everything go; in this process."""


class ChannelWay:
    """A usermm.Channel: persistent grants, written in place and read in place."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._hypervisor = Hypervisor()

    def _domain(self, name: str) -> Domain:
        return Domain(self._hypervisor.socket, name=name, limit=_PAGES)

    def _sizes(self) -> dict[str, int]:
        return {"slots": 1 if self._size > 16 << 20 else 4, "slot_bytes": self._size}

    def parent(self) -> None:
        self._own = self._domain("bench-parent")
        with Channel.listen(self._own, "bench", **self._sizes()) as listener:
            self._channel = listener.accept(20)

    def child(self) -> None:
        self._own = self._domain("bench-child")
        self._channel = Channel.connect(self._own, "bench-parent", "bench", 20, **self._sizes())

    def exchange(self) -> None:
        slot = self._channel.loan(self._size)
        slot.view[-1] = 1
        slot.send()
        assert self._channel.receive_array()[-1] == 1

    def answer(self) -> None:
        assert self._channel.receive_array()[-1] == 1
        slot = self._channel.loan(self._size)
        slot.view[-1] = 1
        slot.send()

    def send(self, array: Any) -> None:
        """Copies an array in; for throughput."""
        self._channel.send_array(array)

    def receive(self) -> None:
        """Takes an array and looks at its last item."""
        assert self._channel.receive_array().flat[-1] == 1

    def close(self) -> None:
        self._channel.close()
        self._own.close()
        self._hypervisor.close()


class MemfdWay:
    """The floor: a memfd for each direction and an eventfd to wake the other."""

    def __init__(self, size: int) -> None:
        import mmap

        self._size = size
        self._maps = []
        for _ in range(2):
            descriptor = os.memfd_create("bench")
            os.ftruncate(descriptor, size)
            self._maps.append(mmap.mmap(descriptor, size))
            os.close(descriptor)
        self._events = [os.eventfd(0), os.eventfd(0)]

    def parent(self) -> None:
        self._there, self._here = self._maps
        self._ring, self._wait = self._events

    def child(self) -> None:
        self._here, self._there = self._maps
        self._wait, self._ring = self._events

    def exchange(self) -> None:
        self._there[-1] = 1
        os.eventfd_write(self._ring, 1)
        os.eventfd_read(self._wait)
        assert self._here[-1] == 1

    def answer(self) -> None:
        os.eventfd_read(self._wait)
        assert self._here[-1] == 1
        self._there[-1] = 1
        os.eventfd_write(self._ring, 1)

    def close(self) -> None:
        for memory in self._maps:
            memory.close()
        for descriptor in self._events:
            os.close(descriptor)


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process runs on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def beside(way: Way, work: Callable[[Way], None], core: int) -> Iterator[None]:
    """A child does `work` on a core for ever; this process opens its end."""
    child = os.fork()
    if child == 0:
        try:
            os.sched_setaffinity(0, {core})
            way.child()
            while True:
                work(way)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        way.parent()
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        way.close()


def _cores() -> tuple[int, int]:
    """For this process and for the child."""
    cores = os.sched_getaffinity(0)
    return min(cores), max(cores)


def _timed(way: Way, number: int) -> Callable[[], float]:
    def measure() -> float:
        before = time.perf_counter_ns()
        for _ in range(number):
            way.exchange()
        return (time.perf_counter_ns() - before) / number / 2

    return measure


def handover(
    size: int, ways: dict[str, Callable[[int], Way]], effort: Effort, *, one_core: bool = False
) -> dict[str, Rounds]:
    """ns of one hand-over of `size` bytes by each way, in interleaved rounds."""
    here, there = _cores()
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(here))
        subjects = {}
        for name, make in ways.items():
            way = make(size)
            stack.enter_context(beside(way, lambda way: way.answer(), here if one_core else there))
            subjects[name] = _timed(way, effort.operations(500))
        return interleave(subjects, effort.rounds)


def throughput(effort: Effort, size: int = 1 << 20) -> dict[str, Rounds]:
    """ns for an array of `size` bytes: sent by copying in and received in place, beside the copy alone."""
    import numpy as np

    source = np.ones(size, np.uint8)
    targets = [np.zeros(size, np.uint8) for _ in range(4)]
    way = ChannelWay(size)
    number = effort.operations(400)

    def sent() -> float:
        before = time.perf_counter_ns()
        for _ in range(number):
            way.send(source)
        return (time.perf_counter_ns() - before) / number

    def copied() -> float:
        before = time.perf_counter_ns()
        for index in range(number):
            targets[index % 4][...] = source
        return (time.perf_counter_ns() - before) / number

    here, there = _cores()
    with pinned(here), beside(way, lambda way: way.receive(), there):  # type: ignore[attr-defined] # a ChannelWay
        return interleave({"channel": sent, "copy": copied}, effort.rounds)


BARS = {"iceoryx2": 1.0, "shared_memory + Pipe": 1.0, "memfd + eventfd": 1.5}
NOTES = [
    "a hand-over is half of an exchange; nothing is copied",
    "moved: a copy into a slot, read in place by the receiver; beside the copy alone",
    "a channel's end looks for about 100 us before it sleeps, the others sleep at once",
]


def measure(effort: Effort, others: dict[str, Callable[[int], Way]] | None = None) -> Result:
    """Hand-overs of all sizes by a channel, the floor, and `others`; the smallest on one core; the throughput."""
    ways: dict[str, Callable[[int], Way]] = {"channel": ChannelWay, "memfd + eventfd": MemfdWay, **(others or {})}
    measured, compared = [], []
    for label, size, one_core in [*((*each, False) for each in SIZES.items()), ("4 KiB on one core", 4 << 10, True)]:
        rounds = handover(size, ways, effort, one_core=one_core)
        measured += figures("ns", {f"{label}, {name}": values for name, values in rounds.items()})
        for name in ways:
            if name != "channel":
                bar = None if one_core else BARS.get(name)
                row = f"{label}, channel / {name}"
                compared.append(Figure.of(row, "x", ratios(rounds["channel"], rounds[name]), bar))
    rounds = throughput(effort)
    measured += figures("ns", {f"1 MiB moved, {name}": values for name, values in rounds.items()})
    compared.append(Figure.of("1 MiB moved, channel / copy", "x", ratios(rounds["channel"], rounds["copy"]), 1.2))
    return Result("handover", "arrays from one process to another, one core each", measured, compared, list(NOTES))
