"""How many notifications a second, and what it costs to hear of them in Python."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import statistics
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from benchmarks.devices import PAGE_BYTES, address_of
from benchmarks.programs import Programs, Worker
from usermm import Invalidation, Ummunotify
from usermm.measurement.harness import Effort, Figure, Result, column, interleave, ratios

THREADS = (1, 4)
EVENTS_PER_READ: Final = 128
PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.PyDLL(None)  # holds the interpreter's lock, as CPython does when it frees memory
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p


def run(programs: Programs, effort: Effort) -> Result:
    """None of these has a bar."""
    with ExitStack() as stack:
        workers = {
            f"{mode}, {threads} thread{'s' * (threads > 1)}": stack.enter_context(
                Worker(programs.path("notifications"), mode, str(threads))
            )
            for threads in THREADS
            for mode in ("bare", "usermm")
        }
        operations = effort.operations(4000)
        lines = interleave({name: worker.subject(operations) for name, worker in workers.items()}, effort.rounds)
    rates = {name: column(0, rounds) for name, rounds in lines.items()}
    reads_us = interleave({"read()": lambda: _read_us(effort.operations(50))}, effort.rounds)["read()"]
    wakes_us = _wakes_us(effort)
    return Result(
        "notifications",
        "Notifications: throughput, reading, waking",
        [
            *(Figure.of(f"{name}, watched munmaps a second", "1/s", rate) for name, rate in rates.items()),
            Figure.of(f"read() of {EVENTS_PER_READ} events", "us", reads_us),
            *(Figure.of(f"munmap in {where}, to its event in asyncio", "us", us) for where, us in wakes_us.items()),
        ],
        [
            Figure.of(f"usermm / bare, {name}", "ratio", ratios(rates[f"usermm, {name}"], rates[f"bare, {name}"]))
            for name in (key.removeprefix("bare, ") for key in rates if key.startswith("bare"))
        ],
        [
            "Rates: pages mapped and registered beforehand; bare is a thread with nothing but poll and read.",
            "read() makes an Invalidation of each event. Waking: from munmap's return to the event in an async for.",
        ],
    )


def _read_us(reads: int) -> float:
    """Median time of a read of a full page of events, made by one MADV_DONTNEED over as many regions."""
    with Ummunotify() as device, mmap.mmap(-1, EVENTS_PER_READ * PAGE_BYTES) as memory:
        start = address_of(memory)
        for index in range(EVENTS_PER_READ):
            device.register_range(start + index * PAGE_BYTES, start + (index + 1) * PAGE_BYTES)
        times_ns = []
        for _ in range(reads):
            memory.madvise(mmap.MADV_DONTNEED)
            assert not device.check(device.generation + 1)
            before_ns = time.perf_counter_ns()
            events = device.read(timeout=0)
            times_ns.append(time.perf_counter_ns() - before_ns)
            assert len(events) == EVENTS_PER_READ and isinstance(events[-1], Invalidation)
            device.read(timeout=0)  # the closing Last, owed since the buffer was full
        return statistics.median(times_ns) / 1000


def _wakes_us(effort: Effort) -> dict[str, list[float]]:
    wakes = effort.operations(50)
    with ThreadPoolExecutor(1) as other:
        return interleave(
            {
                "the loop's thread": lambda: asyncio.run(_wake_us(wakes, None)),
                "another thread": lambda: asyncio.run(_wake_us(wakes, other)),
            },
            effort.rounds,
        )


async def _wake_us(wakes: int, executor: Executor | None) -> float:
    """Median time from munmap's return, in this thread or the executor's, to the event in an `async for`."""
    times_ns = []
    loop = asyncio.get_running_loop()
    with Ummunotify() as device:
        events = aiter(device)
        for _ in range(wakes):
            memory = _watched_page(device)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)  # it is in the poll now
            returned = loop.run_in_executor(executor, _unmap, memory) if executor else None
            returned_ns = 0 if returned else _unmap(memory)
            event = await waiting
            woken_ns = time.perf_counter_ns()
            times_ns.append(woken_ns - (await returned if returned else returned_ns))
            assert isinstance(event, Invalidation)
            device.unregister(event.cookie)
            await anext(events)  # the Last of the same read
    return statistics.median(times_ns) / 1000


def _watched_page(device: Ummunotify) -> int:
    address = _libc.mmap(None, PAGE_BYTES, PROTECTION, FLAGS, -1, 0)
    device.register_range(address, address + PAGE_BYTES)
    return int(address)


def _unmap(address: int) -> int:
    """The clock when munmap has returned, in ns."""
    assert _libc.munmap(address, PAGE_BYTES) == 0
    return time.perf_counter_ns()
