"""Fuzzed requests by several domains of several users, beside a pair of domains that must go on undisturbed.

20 000 messages; USERMM_STRESS=1 for a million. What fails once fails again with the seed that is printed
(USERMM_FUZZ_SEED), as far as the clients are scheduled alike.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest
from support.attackers import ALICE, BOB, Actor, World
from support.bystanders import Bystanders
from support.fuzzing import fuzz
from support.users import root_only

from usermm.hypervisor import granting
from usermm.hypervisor.calls import Reply

pytestmark = [root_only, pytest.mark.timeout(1800)]

MESSAGES = 1_000_000 if os.environ.get("USERMM_STRESS") == "1" else 20_000
SEED = int(os.environ.get("USERMM_FUZZ_SEED", "0")) or int(time.time())
FUZZERS = [ALICE, BOB, BOB, BOB]
_PATIENCE_S = 1500
_SETTLES_S = 20
_MOST_GROWTH_KIB = 24 * 1024  # the allocator's, and the last 1000 records of the audit


def fuzz_all(world: World, messages: int) -> Counter[str]:
    answers: Counter[str] = Counter()
    actors = [Actor(uid, limit_files=4000) for uid in FUZZERS]
    try:
        for number, actor in enumerate(actors):
            actor.start(fuzz, world.socket, SEED + number, messages // len(actors))
        for actor in actors:
            answers.update(actor.result(_PATIENCE_S))
    finally:
        for actor in actors:
            actor.end()
    return answers


def test_a_bystander_goes_on_and_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    print(f"USERMM_FUZZ_SEED={SEED}")
    with World() as world:
        fuzz_all(world, 2_000)  # what grows once
        with Bystanders(world):
            pass
        before = least_descriptors(world), world.memory_kib()
        start = time.monotonic()
        with Bystanders(world, at_least=50) as bystanders:
            answers = fuzz_all(world, MESSAGES)
        seconds = time.monotonic() - start
        with Bystanders(world):
            pass
        assert least_descriptors(world) <= before[0]
        status, grown_kib = world.status(), world.memory_kib() - before[1]
        assert (status["domains"], status["grants"], status["ports"]) == ([], [], [])
        assert grown_kib < _MOST_GROWTH_KIB
        assert answers["done"] > MESSAGES // 10 and "EIO" not in answers
    with capsys.disabled():
        print(
            f"\n{MESSAGES} messages in {seconds:.1f} s: {dict(answers.most_common())}; the hypervisor grew by "
            f"{grown_kib} KiB; the bystanders made {bystanders.rounds} rounds, the slowest answer took "
            f"{bystanders.slowest_s * 1000:.1f} ms"
        )


def least_descriptors(world: World) -> int:
    """Once nobody is there any more. Whoever asks for the status is a connection as well, for a moment."""
    until = time.monotonic() + _SETTLES_S
    while world.status()["domains"] and time.monotonic() < until:
        time.sleep(0.02)
    least = world.descriptors()
    for _ in range(50):
        time.sleep(0.01)
        least = min(least, world.descriptors())
    return least


def with_a_mistake() -> None:
    """A handler that trusts what it is told."""

    def release(*_: object) -> Reply:
        raise KeyError("no such reference")

    granting.Granting.release = release


def test_a_mistake_in_a_handler_is_found() -> None:
    with pytest.raises(AssertionError, match="no such reference"), World(without=with_a_mistake) as world:
        assert fuzz_all(world, 2_000)["EIO"]
