"""A page that is shared for one use only: a fresh grant against fresh shared memory, hand-over included."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, shared_memory

from usermm import Domain
from usermm.measurement.harness import Effort, Figure, Result, Rounds, figures, interleave, ratios
from usermm.measurement.hypervisor_process import hypervisor

GRANT = "grant: allocate, write, map, read, unmap, return"
SHARED_MEMORY = "multiprocessing.shared_memory: create, write, attach, read, close, unlink"
MESSAGE = "the two messages between the processes alone"
BAR = 0.6

_PAGE_BYTES = 4096
_CYCLES = 400
_GRANT = struct.Struct("=II")
_DOMID = struct.Struct("=I")


def run(effort: Effort) -> Result:
    """On one core and on two, as hand-overs are there; the hypervisor and the resource tracker run where they like."""
    cycles = effort.operations(_CYCLES)
    measured: list[Figure] = []
    compared: list[Figure] = []
    cores = sorted(os.sched_getaffinity(0))
    for name, other in (("one core", cores[0]), ("two cores", cores[-1])):
        values = _measure(effort, cycles, cores[0], other)
        measured += figures("us", {f"{subject}, {name}": rounds for subject, rounds in values.items()})
        ratio = ratios(values[GRANT], values[SHARED_MEMORY])
        compared.append(Figure.of(f"fresh grant / fresh shared_memory, {name}", "ratio", ratio, BAR))
    return Result(
        "fresh_grant",
        "One page of 4 KiB, read-only for its receiver, shared for one use",
        measured,
        compared,
        [
            "Both sides of each are Python; the receiver reads a byte. The same two messages tell it what there is.",
            "Grants after the first of a grantee come from a pool: the hypervisor is not asked (docs/grants.md).",
        ],
    )


def _measure(effort: Effort, cycles: int, core: int, other: int) -> dict[str, Rounds]:
    with hypervisor() as (path, _), _receiver(path, other) as messages:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        try:
            (peer,) = _DOMID.unpack(messages.recv(_DOMID.size))
            with Domain(path) as domain:
                subjects = {
                    GRANT: _timed(lambda: _grant(domain, peer, messages), cycles),
                    SHARED_MEMORY: _timed(lambda: _share(messages), cycles),
                    MESSAGE: _timed(lambda: _tell(messages, b"."), cycles),
                }
                return interleave(subjects, effort.rounds)
        finally:
            os.sched_setaffinity(0, before)


def _timed(cycle: Callable[[], None], cycles: int) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter_ns()
        for _ in range(cycles):
            cycle()
        return (time.perf_counter_ns() - start) / cycles / 1000

    return measure


def _grant(domain: Domain, peer: int, messages: socket.socket) -> None:
    with domain.gntalloc.allocate(peer) as pages:
        with memoryview(pages) as view:
            view[0] = 1
        _tell(messages, b"g" + _GRANT.pack(domain.domid, pages.references[0]))


def _share(messages: socket.socket) -> None:
    block = shared_memory.SharedMemory(create=True, size=_PAGE_BYTES)
    _bytes_of(block)[0] = 1
    _tell(messages, b"s" + block.name.encode())
    block.close()
    block.unlink()


def _bytes_of(block: shared_memory.SharedMemory) -> memoryview:
    assert block.buf is not None  # it is open
    return block.buf


def _tell(messages: socket.socket, message: bytes) -> None:
    messages.send(message)
    messages.recv(1)


def _receive(domain: Domain, messages: socket.socket) -> None:
    while message := messages.recv(256):
        kind = message[:1]
        if kind == b"g":
            domid, reference = _GRANT.unpack(message[1:])
            with domain.gntdev.map(domid, reference) as page, memoryview(page) as view:
                assert view[0] == 1
        elif kind == b"s":
            block = shared_memory.SharedMemory(name=message[1:].decode())
            assert _bytes_of(block)[0] == 1
            block.close()
        messages.send(b".")


@contextmanager
def _receiver(path: str, core: int) -> Iterator[socket.socket]:
    resource_tracker.ensure_running()
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        status = 1
        try:
            mine.close()
            os.sched_setaffinity(0, {core})
            with Domain(path) as domain:
                theirs.send(_DOMID.pack(domain.domid))
                _receive(domain, theirs)
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        os.waitpid(child, 0)
