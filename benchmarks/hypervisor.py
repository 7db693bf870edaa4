"""One hypervisor with ever more domains and grants: its memory, how long its answers take, and how many it gives."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack

from usermm.measurement.harness import Effort, Figure, Result, Rounds, ratios
from usermm.measurement.hypervisor_scale import CALLS, Scene, percentile_99, rate

SCALES = ((10, 1 << 10), (100, 8 << 10), (1000, 64 << 10))
"""Domains, and pages mapped at a time: half of them in allocations of 64 pages, half singly, in pools."""
LARGE_PAGES = 64
SINGLE_EXTENTS = 8 << 10
PROCESSES = (1, 2, 4)
OPERATION_BAR_US = 100.0
_KINDS = {1: "1 page", LARGE_PAGES: f"{LARGE_PAGES} pages"}


def run(effort: Effort) -> Result:
    """Each scale is a hypervisor of its own; they are asked in turns."""
    measured = _memory(effort)
    with ExitStack() as stack:
        scenes = {scale: stack.enter_context(Scene()) for scale in SCALES}
        for (domains, grants), scene in scenes.items():
            scene.add_domains(max(2, effort.operations(domains)))
            scene.add_grants(LARGE_PAGES, effort.operations(grants // 2))
            scene.add_pools(effort.operations(grants // 2))
            name = f"memory of the hypervisor, {domains:,} domains, {grants >> 10} Ki mapped"
            measured.append(Figure.of(name, "KiB", [scene.measure_memory().resident_kib]))
        latencies, compared = _latencies(scenes, effort)
        measured += latencies
        measured += _rates(scenes[SCALES[-1]], effort)
    return Result(
        "hypervisor",
        "One hypervisor: memory, latency, operations a second",
        measured,
        compared,
        [
            "Clients speak the protocol from Python, without the devices: a call is a packet there and one back.",
            "Memory: of the hypervisor's process; the kernel's own tables (slab) are a row of their own.",
            "A rate's operations are alloc, map, unmap and release in turns; an operation is 1 / their rate.",
        ],
    )


def _memory(effort: Effort) -> list[Figure]:
    with Scene() as scene:
        found = [Figure.of("memory of a hypervisor without domains", "KiB", [scene.memory.resident_kib])]
    domains, singles, pages = (effort.operations(each) for each in (SCALES[-1][0], SINGLE_EXTENTS, SCALES[-1][1]))
    adders: dict[str, tuple[int, Callable[[Scene], None], int]] = {
        "a domain": (0, lambda scene: scene.add_domains(domains), domains),
        "an allocation of 1 page": (16, lambda scene: scene.add_grants(1, singles), singles),
        f"an allocation of {LARGE_PAGES} pages": (16, lambda scene: scene.add_grants(LARGE_PAGES, pages), pages // 64),
        "a pool of 32 pages": (16, lambda scene: scene.add_pools(pages), pages // 32),
    }
    for what, (domains_first, add, count) in adders.items():
        with Scene() as scene:
            scene.add_domains(domains_first)
            before = scene.measure_memory()
            add(scene)
            after = scene.measure_memory()
        resident, slab = after.resident_kib - before.resident_kib, after.slab_kib - before.slab_kib
        found.append(Figure.of(f"memory of {what}", "KiB", [resident / count]))
        found.append(Figure.of(f"memory of {what}, kernel", "KiB", [slab / count]))
    return found


def _latencies(scenes: dict[tuple[int, int], Scene], effort: Effort) -> tuple[list[Figure], list[Figure]]:
    medians: dict[tuple[str, int, tuple[int, int]], Rounds] = {}
    worst: dict[tuple[str, int, tuple[int, int]], Rounds] = {}
    for index in range(min(effort.rounds, 15) + 1):
        for scale, scene in scenes.items():
            for pages in _KINDS:
                for call, times in scene.latencies_ns(pages, max(100, effort.operations(1000))).items():
                    if index:
                        medians.setdefault((call, pages, scale), []).append(statistics.median(times) / 1e3)
                        worst.setdefault((call, pages, scale), []).append(percentile_99(times) / 1e3)
    figures, compared = [], []
    for pages, kind in _KINDS.items():
        for call in CALLS:
            for scale in SCALES:
                name = f"{call} of {kind}, {scale[0]:,} domains, {scale[1] >> 10} Ki mapped"
                figures.append(Figure.of(name, "us", medians[call, pages, scale]))
                figures.append(Figure.of(f"{name}, p99", "us", worst[call, pages, scale]))
            growth = ratios(medians[call, pages, SCALES[-1]], medians[call, pages, SCALES[0]])
            compared.append(Figure.of(f"{call} of {kind}, {SCALES[-1][0]:,} / {SCALES[0][0]} domains", "ratio", growth))
    return figures, compared


def _rates(scene: Scene, effort: Effort) -> list[Figure]:
    found = []
    for processes in PROCESSES:
        rates = [rate(scene, processes, 1, max(0.2, 2 * effort.share)) for _ in range(min(effort.rounds, 5))]
        bar = OPERATION_BAR_US if processes == PROCESSES[-1] else None
        what = f"an operation, {processes} client process{'es' * (processes > 1)}"
        found.append(Figure.of(what, "us", [1e6 / each.operations for each in rates], bar))
        cores = [each.hypervisor_cores for each in rates]
        found.append(Figure.of(f"cores of the hypervisor meanwhile, {processes}", "cores", cores))
    return found
