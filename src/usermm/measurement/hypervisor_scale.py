"""What one hypervisor needs for many domains and many grants, how long its answers take then, and how many it gives.

Clients speak the protocol without the devices above it, so that the figures are the hypervisor's: a grant is mapped as
long as its descriptor is kept. It runs in a process of its own, as `usermm hypervisor`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from usermm.grants import session
from usermm.grants.session import Session
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import pools, wire
from usermm.hypercalls.wire import Operation
from usermm.measurement.hypervisor_process import hypervisor

CALLS: Final = ("alloc", "map", "unmap", "release")
DESCRIPTORS: Final = 1 << 18
"""Wanted for each process: 64 Ki allocations take one each, and the reserve keeps half."""

_POLICY = """domains_per_user = 30000
[defaults]
max_grant_frames = 1024
max_maptrack_frames = 65536
"""


class Client:
    """One domain, without devices."""

    def __init__(self, path: str) -> None:
        self._session = Session(path)
        answer, _ = self._session.call(Operation.HELLO, wire.HELLO.pack(wire.VERSION, wire.DOMID_ANY, 0))
        self.domid: int = wire.WELCOME.unpack_from(answer)[0]
        self.close = self._session.close

    def alloc(self, grantee: int, pages: int) -> int:
        """The first reference."""
        answer, _ = self._session.call(Operation.ALLOCATE, layouts.ALLOCATE.pack(grantee, 0, pages))
        return int(layouts.ALLOCATED.unpack(answer)[0])

    def map(self, grantor: int, reference: int, pages: int) -> tuple[bytes, int]:
        """Handle, packed, and descriptor."""
        request = layouts.MAP.pack(0, 0, 1) + layouts.RUN.pack(grantor, reference, pages)
        answer, descriptors = self._session.call(Operation.MAP, request)
        return answer[layouts.MAPPED.size : layouts.MAPPED.size + layouts.HANDLE.size], descriptors[0]

    def pool(self, grantee: Client) -> list[int]:
        """A pool with all its pages granted to `grantee`, which has attached it; the descriptors of both."""
        answer, own = self._session.call(Operation.POOL, pools.POOL.pack(grantee.domid, 0))
        first = pools.POOL_MADE.unpack(answer)[0]
        for page in range(pools.PAGES):
            os.pwrite(own[1], pools.WORD.pack(first + page), page * pools.WORD.size)
        run = layouts.RUN.pack(self.domid, first, 1)
        _, theirs = grantee._session.call(Operation.MAP, layouts.MAP.pack(layouts.MAP_ATTACH, 0, 1) + run)
        for page in range(pools.PAGES):
            os.pwrite(theirs[2], pools.WORD.pack(first + page), page * pools.WORD.size)
        for descriptor in (*own[1:], *theirs[1:]):
            os.close(descriptor)
        return [own[0], theirs[0]]

    def unmap(self, handle: bytes, descriptor: int) -> None:
        """Lets go and says so."""
        os.close(descriptor)
        self._session.call(Operation.UNMAPPED, handle)

    def release(self, reference: int, pages: int) -> None:
        """Ends the grant."""
        self._session.call(Operation.RELEASE, layouts.RANGE.pack(reference, pages, 0))


@dataclass(frozen=True)
class Memory:
    """KiB of the hypervisor's process, and of the kernel's tables of the whole machine."""

    resident_kib: int
    slab_kib: int


class Scene:
    """A hypervisor with `domains`; grants can be added and stay mapped until the end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        raise_limit()
        self.path, self._pid = self._stack.enter_context(hypervisor(_POLICY))
        self.domains: list[Client] = []
        self.grants: list[int] = []
        self.memory = self.measure_memory()

    def add_domains(self, count: int) -> None:
        """Until there are `count`."""
        while len(self.domains) < count:
            self.domains.append(Client(self.path))
            self._stack.callback(self.domains[-1].close)

    def add_grants(self, pages: int, count: int) -> None:
        """`count` pages more are mapped, `pages` of each allocation, by neighbours of each other."""
        for grantor, grantee in self._neighbours(count // pages):
            reference = grantor.alloc(grantee.domid, pages)
            self.grants.append(grantee.map(grantor.domid, reference, pages)[1])

    def add_pools(self, count: int) -> None:
        """`count` pages more, in pools."""
        for grantor, grantee in self._neighbours(count // pools.PAGES):
            self.grants += grantor.pool(grantee)

    def _neighbours(self, count: int) -> Iterator[tuple[Client, Client]]:
        domains = self.domains
        return ((domains[at % len(domains)], domains[(at + 1) % len(domains)]) for at in range(count))

    def measure_memory(self) -> Memory:
        """Of now."""
        return Memory(_field(f"/proc/{self._pid}/status", "VmRSS"), _field("/proc/meminfo", "Slab"))

    def latencies_ns(self, pages: int, number: int) -> dict[str, list[int]]:
        """Of `number` cycles of a pair of domains of its own."""
        times: dict[str, list[int]] = {name: [] for name in CALLS}
        with pair(self.path) as (grantor, grantee):
            for _ in range(number):
                for name, took in zip(CALLS, _cycle_ns(grantor, grantee, pages), strict=True):
                    times[name].append(took)
        return times

    def requests(self) -> int:
        """That it has answered so far."""
        return int(session.status(self.path)["hypervisor"]["requests"])

    def cpu_s(self) -> float:
        """Of the hypervisor's process so far."""
        with open(f"/proc/{self._pid}/stat", encoding="ascii") as file:
            words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the hypervisor and all domains."""
        for descriptor in self.grants:
            os.close(descriptor)
        self._stack.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def pair(path: str) -> Iterator[tuple[Client, Client]]:
    """Two domains."""
    grantor, grantee = Client(path), Client(path)
    try:
        yield grantor, grantee
    finally:
        grantor.close()
        grantee.close()


def _cycle_ns(grantor: Client, grantee: Client, pages: int) -> tuple[int, int, int, int]:
    clock = time.perf_counter_ns
    start = clock()
    reference = grantor.alloc(grantee.domid, pages)
    allocated = clock()
    handle, descriptor = grantee.map(grantor.domid, reference, pages)
    mapped = clock()
    grantee.unmap(handle, descriptor)
    unmapped = clock()
    grantor.release(reference, pages)
    return allocated - start, mapped - allocated, unmapped - mapped, clock() - unmapped


@dataclass(frozen=True)
class Rate:
    """Grant operations a second, and the share of one core that the hypervisor took for them."""

    operations: float
    hypervisor_cores: float


def rate(scene: Scene, processes: int, pages: int, seconds: float) -> Rate:
    """Of so many client processes at once, each with a pair of domains."""
    context = multiprocessing.get_context("fork")
    ready, go = context.Semaphore(0), context.Event()
    stop_at = context.Value("d", 0.0)

    def work() -> None:
        with pair(scene.path) as (grantor, grantee):
            ready.release()
            go.wait()
            while time.monotonic() < stop_at.value:
                for _ in range(8):
                    _cycle_ns(grantor, grantee, pages)

    workers = [context.Process(target=work) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    requests, cpu_s, start = scene.requests(), scene.cpu_s(), time.monotonic()
    stop_at.value = start + seconds
    go.set()
    time.sleep(max(0.0, stop_at.value - time.monotonic()))
    took, requests, cpu_s = time.monotonic() - start, scene.requests() - requests, scene.cpu_s() - cpu_s
    for worker in workers:
        worker.join()
    return Rate(requests / took, cpu_s / took)


def percentile_99(times: list[int]) -> float:
    """Of at least one value."""
    return float(sorted(times)[len(times) * 99 // 100])


def raise_limit() -> None:
    """Of open files, as far as this process may; the hypervisor has the same."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (DESCRIPTORS, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, hard), max(limit, hard)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, hard), max(limit, hard)))
        except (OSError, ValueError):  # only with CAP_SYS_RESOURCE above the hard limit
            continue
        return


def _field(path: str, name: str) -> int:
    with open(path, encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


