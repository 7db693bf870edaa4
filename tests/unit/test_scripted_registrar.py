"""The registrar that keeps accounts: what it counts, what it refuses, and each way in which it can be made to fail."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import run_quietly

from usermm import ArgumentError, LimitError
from usermm.registrars import Overlap, Traits
from usermm.testing import ContractError, Pin, ScriptedRegistrar

A = 0x1000_0000
REFUSING = Traits(overlap=Overlap.REFUSED)


def test_it_keeps_the_account() -> None:
    registrar = ScriptedRegistrar()
    first = registrar.register(A, 100)
    second = registrar.register(A + 50, 100)
    assert registrar.live == (Pin(first, A, 100), Pin(second, A + 50, 100))
    assert registrar.pinned_bytes == 200
    registrar.deregister(first)
    registrar.register(A, 10)
    assert (registrar.pinned_bytes, registrar.peak_bytes, registrar.peak_count) == (110, 200, 2)
    assert [(call.name, call.number, call.address, call.length, call.handle) for call in registrar.calls] == [
        ("register", 1, A, 100, 1),
        ("register", 2, A + 50, 100, 2),
        ("deregister", 1, A, 100, 1),
        ("register", 3, A, 10, 3),
    ]
    assert {call.thread for call in registrar.calls} == {threading.get_ident()}
    registrar.check()
    with pytest.raises(ContractError, match="still registered"):
        registrar.check(empty=True)


def test_its_handles_are_never_given_twice() -> None:
    registrar = ScriptedRegistrar()
    handles = []
    for _ in range(5):
        handles.append(registrar.register(A, 1))
        registrar.deregister(handles[-1])
    assert len(set(handles)) == 5
    registrar.check(empty=True)


BREACHES: dict[str, tuple[Traits, Callable[[ScriptedRegistrar], object], str]] = {
    "overlap": (REFUSING, lambda registrar: registrar.register(A + 99, 1), "overlaps"),
    "taken back twice": (Traits(), lambda registrar: [registrar.deregister(1) for _ in range(2)], "taken back before"),
    "never a handle": (Traits(), lambda registrar: registrar.deregister("x"), "not registered"),
    "empty": (Traits(), lambda registrar: registrar.register(A, 0), "pieces"),
    "start inside a piece": (Traits(granularity_bytes=64), lambda registrar: registrar.register(A + 1, 64), "pieces"),
    "end inside a piece": (Traits(granularity_bytes=64), lambda registrar: registrar.register(A, 65), "pieces"),
    "too long": (Traits(max_length_bytes=128), lambda registrar: registrar.register(A, 129), "longer"),
    "another thread": (Traits(any_thread=False), lambda registrar: in_a_thread(registrar.register, A, 1), "thread"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_raised_and_remembered(name: str) -> None:
    traits, breach, words = BREACHES[name]
    registrar = ScriptedRegistrar(traits)
    granularity = traits.granularity_bytes
    registrar.register(A, 100 // granularity * granularity)
    with pytest.raises(ContractError, match=words):
        breach(registrar)
    assert len(registrar.violations) == 1
    assert registrar.calls[-1].error is ContractError
    assert len(registrar.live) <= 1, "a breach registers nothing"
    with pytest.raises(ContractError, match=words):
        registrar.check()


def test_neighbours_do_not_overlap() -> None:
    registrar = ScriptedRegistrar(REFUSING)
    for start in (A, A + 20, A + 10):
        registrar.register(start, 10)
    registrar.check()


def test_memory_that_is_being_deregistered_is_registered_still() -> None:
    registrar = ScriptedRegistrar(REFUSING)
    handle = registrar.register(A, 10)
    registrar.at_deregister(1, runs=lambda: registrar.register(A, 10))
    with pytest.raises(ContractError, match="overlaps"):
        registrar.deregister(handle)


@pytest.mark.parametrize(("limits", "fits"), [({"max_bytes": 100}, 2), ({"max_count": 3}, 3)])
def test_the_budget(limits: dict[str, int], fits: int) -> None:
    registrar = ScriptedRegistrar(**limits)
    handles = [registrar.register(A + 40 * index, 40) for index in range(fits)]
    with pytest.raises(LimitError) as caught:
        registrar.register(A + 1000, 40)
    assert caught.value.errno == errno.ENOMEM
    assert registrar.calls[-1].error is LimitError
    assert registrar.calls[-1].handle is None
    registrar.deregister(handles[0])
    registrar.register(A + 1000, 40)
    registrar.check()
    assert registrar.peak_count == fits


def test_raises_before_its_work() -> None:
    registrar = ScriptedRegistrar()
    registrar.at_register(2, raises=MemoryError)
    registrar.at_deregister(1, raises=OSError(errno.EIO, "gone"))
    handle = registrar.register(A, 1)
    with pytest.raises(MemoryError):
        registrar.register(A, 1)
    assert len(registrar.live) == 1
    with pytest.raises(OSError, match="gone"):
        registrar.deregister(handle)
    assert len(registrar.live) == 1, "it stays registered for good"
    with pytest.raises(ContractError):
        registrar.deregister(handle)


def test_raises_after_its_work() -> None:
    registrar = ScriptedRegistrar()
    registrar.at_register(1, raises_after=KeyError("late"))
    registrar.at_deregister(1, raises_after=KeyError("late"))
    with pytest.raises(KeyError):
        registrar.register(A, 1)
    assert registrar.live == (Pin(registrar.calls[0].handle, A, 1),)
    with pytest.raises(KeyError):
        registrar.deregister(registrar.calls[0].handle)
    registrar.check(empty=True)


@pytest.mark.parametrize("garbage", [None, [], 1])
def test_returns_garbage(garbage: object) -> None:
    registrar = ScriptedRegistrar()
    registrar.register(A, 1)
    registrar.at_register(2, returns=garbage)
    assert registrar.register(A, 2) is garbage
    registrar.deregister(1)
    registrar.deregister(garbage)
    registrar.check(empty=True)


def test_runs_what_it_is_told_at_every_call_without_a_step_of_its_own() -> None:
    registrar = ScriptedRegistrar()
    seen: list[tuple[str, int]] = []
    registrar.at_register(None, runs=lambda: seen.append(("any", len(registrar.live))))
    registrar.at_register(2, runs_after=lambda: seen.append(("second", len(registrar.live))))
    for _ in range(3):
        registrar.register(A, 1)
    assert seen == [("any", 0), ("second", 2), ("any", 2)]


def test_it_can_be_entered_again_from_its_own_script() -> None:
    registrar = ScriptedRegistrar()
    registrar.at_register(1, runs=lambda: registrar.deregister(registrar.register(A, 1)))
    registrar.register(A, 1)
    assert [(call.name, call.number) for call in registrar.calls] == [
        ("register", 1),
        ("register", 2),
        ("deregister", 1),
    ]
    assert len(registrar.live) == 1


def test_threads_share_it() -> None:
    registrar = ScriptedRegistrar()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(500):
            registrar.deregister(registrar.register(A, 8))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registrar.check(empty=True)
    assert registrar.pinned_bytes == 0
    assert registrar.peak_count <= 4
    assert sorted(call.number for call in registrar.calls if call.name == "register") == list(range(1, 2001))


def test_a_step_has_a_number() -> None:
    with pytest.raises(ArgumentError):
        ScriptedRegistrar().at_register(0)


def test_the_programs_of_the_how_to_page(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "test-with-a-scripted-registrar.md"
    found = re.findall(r"```(python)?\n(.*?)```", page.read_text(), re.DOTALL)
    program = "\n".join(text for kind, text in found if kind)
    assert run_quietly(program, tmp_path) == "".join(text for kind, text in found if not kind)


def in_a_thread(call: Callable[..., object], *arguments: object) -> None:
    """Raises here what the call raised there."""
    caught: list[BaseException] = []

    def work() -> None:
        try:
            call(*arguments)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if caught:
        raise caught.pop()
