"""What the model of the registration cache has registered, and how registrations end."""

from __future__ import annotations

from typing import Any

from usermm.errors import ArgumentError
from usermm.registrars.base import Registrar
from usermm.testing.entries import Entry, Outcome, Pending, Range


class Ledger:
    """All registrations of one cache, in the look-up or not, and those that are being made."""

    def __init__(self, registrar: Registrar[Any]) -> None:
        self.lost_errors: list[BaseException] = []
        """What deregister raised. There is nobody to tell, and the registration counts as gone."""
        self._registrar = registrar
        self._registered: list[Entry] = []
        self._pending: list[Pending] = []

    @property
    def live(self) -> tuple[Range, ...]:
        """What a get can hit now, ascending."""
        return tuple(sorted(entry.range for entry in self._live()))

    @property
    def registered(self) -> tuple[Range, ...]:
        """What is registered with the device now, in the look-up or not, ascending."""
        return tuple(sorted(entry.range for entry in self._registered))

    @property
    def pinned_bytes(self) -> int:
        """Of all that is registered or about to be, dead and held ones included. Never more than max_bytes."""
        registered = sum(entry.range.length for entry in self._registered)
        return registered + sum(pending.range.length for pending in self._pending)

    @property
    def _count(self) -> int:
        return len(self._registered) + len(self._pending)

    def _live(self) -> list[Entry]:
        return [entry for entry in self._registered if entry.live and not entry.hit]

    def _give_up(self, outcome: Outcome) -> bool:
        """Gives up what is dead by now, or else one idle entry. False: there is none."""
        if self._settle(outcome):
            return True
        victim = self._victim(outcome)
        if victim is None:
            return False
        outcome.evicted.append(victim.range)
        self._retire([victim], outcome)
        return True

    def _settle(self, outcome: Outcome) -> bool:
        """What was hit leaves, and is deregistered if it is idle; also what is hit meanwhile. Whether there was any."""
        found = False
        while dead := [entry for entry in self._registered if (entry.hit or not entry.live) and entry.idle]:
            self._retire(dead, outcome)
            found = True
        for entry in self._registered:
            entry.live = entry.live and not entry.hit
        return found

    def _retire(self, entries: list[Entry], outcome: Outcome) -> int:
        """Out of the look-up, all of them first; then idle ones are deregistered, in ascending order."""
        for entry in entries:
            entry.live = False
        for entry in sorted(entries, key=lambda entry: entry.range):
            if entry.idle:
                self._deregister(entry, outcome)
        return len(entries)

    def _let_go(self, entry: Entry, outcome: Outcome) -> None:
        """One holder less; the last one of what is dead deregisters it."""
        entry.holders -= 1
        if not entry.live and entry.idle:
            self._deregister(entry, outcome)

    def _deregister(self, entry: Entry, outcome: Outcome) -> None:
        if entry.leaving:  # by a call that came from within another deregistration
            return
        entry.leaving = True
        try:
            self._registrar.deregister(entry.handle)
        except Exception as error:
            self.lost_errors.append(error)
        self._registered.remove(entry)
        outcome.deregistered.append(entry.range)

    def _victim(self, outcome: Outcome) -> Entry | None:
        """Who goes next: as the caller said, then the least recently used. None: nobody can."""
        idle = [entry for entry in self._live() if entry.idle]
        told = next(outcome.told, None)
        if told is None:
            return min(idle, key=lambda entry: entry.used, default=None)
        for entry in idle:
            if entry.range == told:
                return entry
        raise ArgumentError(f"get: {told} is no idle entry that could be given up")
