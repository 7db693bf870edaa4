"""Domains are killed at random moments of everything they can do: nothing of them is left a second later.

40 times, and 1 000 times with USERMM_STRESS=1; USERMM_CRASHES sets how often, USERMM_SEED runs the same moments again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.crash_bystanders import LEFT, RIGHT, Bystanders
from support.crash_pair import GRANTEE, GRANTOR, Child, Grantee, Grantor, Side, start
from support.hypervisors import Belongings, HypervisorProcess, settled, socket_folder

STRESS = os.environ.get("USERMM_STRESS") == "1"
CRASHES = int(os.environ.get("USERMM_CRASHES", "1000" if STRESS else "40"))
SEED = int(os.environ.get("USERMM_SEED", "0")) or random.randrange(1, 1 << 32)
LIMIT_S = 1.0
LOOKS = 50
BYSTANDERS = {LEFT, RIGHT}
NUMBERS = {Grantor: GRANTOR, Grantee: GRANTEE}


class World:
    """A hypervisor, its bystanders, and what they have when nobody else is there."""

    def __init__(self, hypervisor: HypervisorProcess, bystanders: Bystanders) -> None:
        self.hypervisor = hypervisor
        self.bystanders = bystanders
        self.calm = settled(self.state)

    def state(self) -> tuple[Belongings, dict[str, Any]]:
        """Descriptors, memory and locks of the hypervisor, and what it knows of."""
        belongings = self.hypervisor.belongings()
        status = self.hypervisor.status()
        known = {name: status[name] for name in ("grants", "ports")}
        known["domains"] = [domain["domid"] for domain in status["domains"]]
        known["usage"] = [{**domain["usage"], "store_entries": 0} for domain in status["domains"]]
        for port in known["ports"]:
            port["pending"] = False
        return belongings, known

    def is_calm(self) -> bool:
        """As if there had never been anybody else."""
        return self.state() == self.calm

    def is_rid_of(self, domid: int) -> bool:
        """The survivor may have what was shared with it."""
        status = self.hypervisor.status()
        return not (
            any(domain["domid"] == domid for domain in status["domains"])
            or any(port["domid"] == domid for port in status["ports"])
            or any(
                held["domid"] == domid for grant in status["grants"] for held in grant["mapped_by"]
            )
            or any(grant["grantor"] == domid and not grant["released"] for grant in status["grants"])
        )


@pytest.fixture
def world() -> Iterator[World]:
    with socket_folder() as folder, HypervisorProcess(folder / "s") as hypervisor:
        bystanders = Bystanders(hypervisor.socket)
        try:
            yield World(hypervisor, bystanders)
        finally:
            bystanders.end()


def seconds_until(holds: Any, since: float, what: Any) -> float:
    """On a machine where nobody gets a processor, what counts is how often it was looked, not the seconds."""
    looks = 0
    while not holds():
        looks += 1
        assert time.monotonic() - since < LIMIT_S or looks < LOOKS, f"not within {LIMIT_S} s: {what()}"
        time.sleep(0.0005)
    return time.monotonic() - since


class Trial:
    """One crash: who, when, and what followed."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.seed = seed
        self.victims: list[type[Side]] = self.random.choice([[Grantor], [Grantee], [Grantor, Grantee]])
        self.early = self.random.random() < 0.25
        self.told: dict[str, Any] = {}

    def run(self) -> float:
        """Seconds until nothing of the dead was left."""
        children = {side: start(side, self.world.hypervisor.socket, self.seed + NUMBERS[side]) for side in NUMBERS}
        try:
            if not self.early:
                for child in children.values():
                    assert child.hear() == "armed"
            time.sleep(10 ** self.random.uniform(-5, -1.5))
            return self._crash(children)
        finally:
            for child in children.values():
                child.end()

    def _crash(self, children: dict[type[Side], Child]) -> float:
        since = time.monotonic()
        for side in self.victims:
            os.kill(children[side].pid, signal.SIGKILL)
        if len(self.victims) == 2:
            took = seconds_until(self.world.is_calm, since, self.world.state)
        else:
            dead = NUMBERS[self.victims[0]]
            took = seconds_until(lambda: self.world.is_rid_of(dead), since, self.world.hypervisor.status)
            (survivor,) = (child for side, child in children.items() if side not in self.victims)
            self._hear(survivor)
            survivor.end(signal.SIGKILL)
            seconds_until(self.world.is_calm, time.monotonic(), self.world.state)
        for side in self.victims:
            children[side].end()
        return took

    def _hear(self, survivor: Child) -> None:
        line = survivor.hear()
        while line == "armed":
            line = survivor.hear()
        self.told = json.loads(line)
        assert "failure" not in self.told, self.told["failure"]
        assert all(self.told["told"].values()), self.told
        assert self.told["leaked"] == 0, self.told


@pytest.mark.timeout(120 + CRASHES)
def test_nothing_is_left_of_the_dead(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    took: dict[str, list[float]] = {}
    told: list[float] = []
    beats = world.bystanders.beats
    for number in range(CRASHES):
        trial = Trial(world, SEED + 1000 * number)
        try:
            seconds = trial.run()
        except BaseException:
            print(f"crash {number} of USERMM_SEED={SEED}: {trial.victims}, early {trial.early}")
            raise
        took.setdefault("+".join(side.__name__ for side in trial.victims), []).append(seconds)
        if trial.told.get("armed"):
            told.append(trial.told["waited_s"])
        assert world.bystanders.beats > beats, "the bystanders stopped"
        beats = world.bystanders.beats
    with capsys.disabled() if STRESS else contextlib.nullcontext():
        for who, values in took.items():
            print(f"{who}: {len(values)} crashes, clean after {_ms(values)}")
        print(f"survivor told after {_ms(told)} of its noticing")
        print(f"bystanders: {beats} beats, the longest {world.bystanders.longest_s * 1e3:.1f} ms")


def _ms(values: list[float]) -> str:
    if not values:
        return "nothing"
    return f"{min(values) * 1e3:.2f} / {statistics.median(values) * 1e3:.2f} / {max(values) * 1e3:.2f} ms"
