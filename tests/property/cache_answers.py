"""What a cache answered and what its device saw, in a form that can be compared; and whom it gave up to make room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from usermm import LimitError
from usermm.testing import Call, ModelCache, Range, ScriptedRegistrar


class Choice:
    """Whom the real cache gave up to make room, for the model to do the same; it asks at the moment when it needs to.

    Of what the real one deregistered between the same two registrations that is what is still in the model's look-up.
    The smallest goes first, so that the last one is needed if any order makes it so.
    """

    def __init__(self, real_calls: list[Call], model: ModelCache, device: ScriptedRegistrar) -> None:
        """`real_calls` are those of the real one's get; the model's is about to begin. `device` is the model's."""
        self._model = model
        self._device = device
        self._before = len(device.calls)
        self.handles: dict[Range, object] = {}
        self._gone: list[list[Range]] = [[]]
        for call in real_calls:
            if call.name == "register":
                self._gone.append([])
            else:
                gone = Range(call.address, call.address + call.length)
                self._gone[-1].append(gone)
                self.handles[gone] = call.handle

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Range:
        tries = sum(call.name == "register" for call in self._device.calls[self._before :])
        left = [each for each in self._gone[tries] if each in self._model.live]
        if not left:
            raise StopIteration
        return min(left, key=lambda each: each.length)


def attempt(call: Any, *arguments: Any, **named: Any) -> Any:
    """What it returns, or (class, errno) of what it raises. The exception would keep objects alive."""
    try:
        return call(*arguments, **named)
    except Exception as error:
        error.__context__ = error.__traceback__ = None  # the model's are in a cycle with their frames
        number = getattr(error, "errno", None)
        # A LimitError has EDQUOT of the cache's, ENOMEM of the model's, or whatever the registrar gave it.
        return type(error).__name__, None if isinstance(error, LimitError) else number


def answer(given: Any) -> tuple[object, ...]:
    return given if isinstance(given, tuple) else (given.address, given.length, given.handle)


def account(calls: list[Call]) -> list[tuple[object, ...]]:
    """What a device was asked, with the deregistrations between two registrations in one order."""
    return [row for rows in _runs(calls) for row in sorted(rows, key=str)]


def _runs(calls: list[Call]) -> Iterator[list[tuple[object, ...]]]:
    run: list[tuple[object, ...]] = []
    for call in calls:
        row = (call.name, call.address, call.length, call.handle, call.error and call.error.__name__)
        if call.name == "register":
            yield run
            yield [row]
            run = []
        else:
            run.append(row)
    yield run
