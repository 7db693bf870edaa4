"""Peers of a channel's hand-over: multiprocessing's shared memory with a Pipe, and iceoryx2 where it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any

from usermm.measurement import handover
from usermm.measurement.handover import Way
from usermm.measurement.harness import Effort, Result


class PipeWay:
    """Two kept shared_memory blocks; a Pipe carries which of them is ready."""

    def __init__(self, size: int) -> None:
        self._blocks = [shared_memory.SharedMemory(create=True, size=size) for _ in range(2)]
        self._ends = multiprocessing.Pipe()

    def parent(self) -> None:
        self._end = self._ends[0]
        self._there, self._here = map(_bytes_of, self._blocks)

    def child(self) -> None:
        self._end = self._ends[1]
        self._here, self._there = map(_bytes_of, self._blocks)

    def exchange(self) -> None:
        self._there[-1] = 1
        self._end.send(0)
        self._end.recv()
        assert self._here[-1] == 1

    def answer(self) -> None:
        self._end.recv()
        assert self._here[-1] == 1
        self._there[-1] = 1
        self._end.send(0)

    def close(self) -> None:
        del self._there, self._here
        for end in self._ends:
            end.close()
        for block in self._blocks:
            block.close()
            block.unlink()


def _bytes_of(block: shared_memory.SharedMemory) -> memoryview:
    assert block.buf is not None  # it is open
    return block.buf


class IceoryxWay:
    """Publish and subscribe in each direction, loaned and not copied, with an event service to wake the other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._name = f"usermm-bench-{os.getpid()}-{size}"

    def _open(self, out: str, back: str) -> None:
        import iceoryx2 as ice  # type: ignore[import-not-found,import-untyped,unused-ignore] # an optional peer

        ice.set_log_level(ice.LogLevel.Error)
        self._node = ice.NodeBuilder.new().create(ice.ServiceType.Ipc)

        def service(name: str) -> Any:
            return self._node.service_builder(ice.ServiceName.new(f"{self._name}-{name}"))

        kind = ice.Slice[ctypes.c_uint8]
        there, here = (service(name).publish_subscribe(kind).open_or_create() for name in (out, back))
        self._publisher = there.publisher_builder().initial_max_slice_len(self._size).create()
        self._subscriber = here.subscriber_builder().create()
        self._notifier = service(f"{out}-e").event().open_or_create().notifier_builder().create()
        self._listener = service(f"{back}-e").event().open_or_create().listener_builder().create()

    def parent(self) -> None:
        self._open("out", "back")
        self._listener.blocking_wait()  # the child is there

    def child(self) -> None:
        import time

        self._open("back", "out")
        time.sleep(1)
        self._notifier.notify()

    def exchange(self) -> None:
        self._send()
        self._receive()

    def answer(self) -> None:
        self._receive()
        self._send()

    def close(self) -> None:
        del self._publisher, self._subscriber, self._notifier, self._listener, self._node

    def _send(self) -> None:
        sample = self._publisher.loan_slice_uninit(self._size)
        ctypes.c_uint8.from_address(sample.payload().data_ptr + self._size - 1).value = 1
        sample.assume_init().send()
        self._notifier.notify()

    def _receive(self) -> None:
        while True:
            sample = self._subscriber.receive()
            if sample is not None:
                break
            self._listener.blocking_wait()
        assert ctypes.c_uint8.from_address(sample.payload().data_ptr + self._size - 1).value == 1
        sample.delete()


def run(effort: Effort) -> Result:
    """Also says whether iceoryx2 was there."""
    others: dict[str, Callable[[int], Way]] = {"shared_memory + Pipe": PipeWay}
    if importlib.util.find_spec("iceoryx2"):
        others["iceoryx2"] = IceoryxWay
    result = handover.measure(effort, others)
    if "iceoryx2" not in others:
        result.notes.append("without iceoryx2: pip install iceoryx2 flatbuffers")
    return result
