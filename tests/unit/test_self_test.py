"""The self-test must not believe a monitor that misses something; devices here are made up, the memory is real."""

from __future__ import annotations

import pytest

from usermm.monitors import calls, races, trials
from usermm.monitors.base import OTHER_THREAD, OWN_THREAD, EventTrial, Exactness, Outcome, RaceTrial, SelfTest


class Blind:
    """A device that never notices anything."""

    def __init__(self) -> None:
        self.regions = 0

    @property
    def generation(self) -> int:
        return 0

    def mmap(self) -> memoryview:
        return memoryview(bytes(4096))

    def register_range(self, start: int, end: int, cookie: int | None = None) -> int:
        assert start < end
        self.regions += 1
        return cookie or self.regions

    def unregister(self, cookie: int) -> None:
        assert cookie
        self.regions -= 1

    def check(self, seen: int, probe: bool = True) -> bool:
        return seen == 0 or not probe

    def close(self) -> None:
        pass


class Nervous(Blind):
    """A device that reports a change at every question."""

    @property
    def generation(self) -> int:
        self.count = getattr(self, "count", 0) + 1
        return self.count

    def check(self, seen: int, probe: bool = True) -> bool:
        return seen < 0 and probe


class Forgetful(Blind):
    """A device whose generation moves while `check` says that nothing changed."""

    @property
    def generation(self) -> int:
        self.count = getattr(self, "count", 0) + 1
        return self.count

    def check(self, seen: int, probe: bool = True) -> bool:
        return seen < 0 or probe


def test_a_blind_device_misses_every_event() -> None:
    events = trials.run_all(Blind)
    assert {event.outcome for event in events} <= {Outcome.MISSED, Outcome.ABSENT}
    assert len(events) == len(trials.PROMISED) + len(trials.BLIND_SPOTS)


def test_all_three_questions_must_see_the_change() -> None:
    assert trials.run(trials.PROMISED[0], Nervous()).outcome is Outcome.SEEN
    assert trials.run(trials.PROMISED[0], Forgetful()).outcome is Outcome.MISSED


def test_a_blind_device_loses_both_races() -> None:
    own, other = races.run_all(Blind, trials=40)
    assert own.wrong == own.trials == 40
    assert other.wrong == other.trials
    assert other.trials > 30
    assert other.wrong_unprotected == other.trials_unprotected


def test_trials_give_everything_back() -> None:
    device = Blind()
    for trial in (*trials.PROMISED, *trials.BLIND_SPOTS):
        trials.run(trial, device)
    assert device.regions == 0


def test_a_trial_that_cannot_be_made_says_why() -> None:
    def refuse(_: trials.Scene) -> None:
        raise OSError(1, "no")

    found = trials.run(trials.Trial("refused", refuse), Blind())
    assert (found.outcome, found.problem) == (Outcome.FAILED, "[Errno 1] no")


def test_a_call_that_this_kernel_lacks_is_no_failure() -> None:
    def unknown(scene: trials.Scene) -> None:
        calls.advise(scene.map(), trials.LENGTH, 9999)

    assert trials.run(trials.Trial("unknown", unknown), Blind()).outcome is Outcome.ABSENT


SEEN = EventTrial("munmap", True, Outcome.SEEN)
RACES = (RaceTrial(OWN_THREAD, 10, 0, 1, 10), RaceTrial(OTHER_THREAD, 10, 0, 5, 10))


@pytest.mark.parametrize(
    ("events", "found", "expected"),
    [
        ((SEEN,), RACES, Exactness(True, True, True)),
        ((SEEN, EventTrial("new", True, Outcome.ABSENT)), RACES, Exactness(True, True, True)),
        ((SEEN, EventTrial("mremap", True, Outcome.MISSED)), RACES, Exactness(True, True, False)),
        ((SEEN, EventTrial("mremap", True, Outcome.FAILED)), RACES, Exactness(True, True, False)),
        ((SEEN, EventTrial("guard", False, Outcome.MISSED)), RACES, Exactness(True, True, True, ("guard",))),
        ((SEEN, EventTrial("guard", False, Outcome.SEEN)), RACES, Exactness(True, True, True)),
        ((EventTrial("new", True, Outcome.ABSENT),), RACES, Exactness(True, True, False)),
        ((), RACES, Exactness(True, True, False)),
        ((SEEN,), (RaceTrial(OWN_THREAD, 10, 1, 1, 10), RACES[1]), Exactness(False, True, True)),
        ((SEEN,), (RACES[0], RaceTrial(OTHER_THREAD, 10, 1, 5, 10)), Exactness(True, False, True)),
        ((SEEN,), (RACES[0], RaceTrial(OTHER_THREAD, 0, 0, 0, 0)), Exactness(True, False, True)),
        ((SEEN,), (), Exactness(False, False, True)),
    ],
)
def test_what_was_tried_decides(
    events: tuple[EventTrial, ...], found: tuple[RaceTrial, ...], expected: Exactness
) -> None:
    result = SelfTest(events, found)
    assert result.exactness == expected
    assert result.exact == (expected.own_thread and expected.all_threads and expected.all_causes)
