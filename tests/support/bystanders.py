"""A pair of domains that only wants to go on: one grants, the other maps, each round as the first."""

from __future__ import annotations

import os
import time
from pathlib import Path

from support.attackers import CAROL, KEPT, Actor, World
from usermm import Domain

PATIENCE_S = 60


def _join(path: str) -> tuple[int, int]:
    KEPT["pair"] = Domain(path), Domain(path)
    one, two = KEPT["pair"]
    KEPT["ports"] = one.evtchn.bind_unbound_port(two.domid), 0
    KEPT["ports"] = KEPT["ports"][0], two.evtchn.bind_interdomain(one.domid, KEPT["ports"][0])
    two.evtchn.unmask(*two.evtchn.read(PATIENCE_S))
    one.evtchn.unmask(*one.evtchn.read(0))
    return one.domid, two.domid


def _round() -> float:
    """Everything once, and that it is right; how many seconds the hypervisor took for its slowest answer."""
    one, two = KEPT["pair"]
    slowest = 0.0

    def timed(call: object, *arguments: object, **options: object) -> object:
        nonlocal slowest
        start = time.monotonic()
        result = call(*arguments, **options)
        slowest = max(slowest, time.monotonic() - start)
        return result

    text = os.urandom(16)
    pages = timed(one.gntalloc.allocate, two.domid, 2)
    memoryview(pages)[4096:4112] = text
    mapping = timed(two.gntdev.map, one.domid, pages.references)
    assert mapping.read(4096, 16) == text
    one.evtchn.notify(KEPT["ports"][0])
    assert two.evtchn.read(PATIENCE_S) == [KEPT["ports"][1]]
    two.evtchn.unmask(KEPT["ports"][1])
    timed(one.store.write, "key", text)
    assert timed(one.store.read, "key") == text
    mapping.close()
    pages.close()
    return slowest


def _rounds_until(path: str, at_least: int) -> tuple[int, float]:
    rounds, slowest = 0, 0.0
    while rounds < at_least or not os.path.exists(path):
        slowest = max(slowest, _round())
        rounds += 1
        time.sleep(0.002)
    return rounds, slowest


class Bystanders:
    """Two domains of Carol's that go on between `with` and its end; then `rounds` and `slowest_s` are known."""

    def __init__(self, world: World, *, at_least: int = 3) -> None:
        self._world, self._at_least = world, at_least
        self.rounds, self.slowest_s = 0, 0.0
        self._end = Path(world.folder) / "enough"

    def __enter__(self) -> Bystanders:
        self._actor = Actor(CAROL)
        try:
            self._actor(_join, self._world.socket)
            self._actor.start(_rounds_until, str(self._end), self._at_least)
        except BaseException:
            self._actor.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._end.touch()
                self.rounds, self.slowest_s = self._actor.result(PATIENCE_S)
        finally:
            self._end.unlink(missing_ok=True)
            self._actor.end()
