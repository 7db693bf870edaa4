"""`ModelCache`: what `usermm.RegistrationCache` does, in plain Python over a model address space.

    space = AddressSpace()
    registrar = ScriptedRegistrar()
    cache = ModelCache(space, registrar, max_bytes=1 << 20)
    address = space.mmap(8192)
    with cache.get(address, 8192) as registration:
        space.munmap(address, 4096)
        registration.valid          # False: it left the look-up, and is deregistered when this block ends

The real cache has freedom where this one has rules: which of several covering entries is a hit, and which idle entry is
given up (this one knows the least recently used exactly, the real one about). A test that plays both against each
other tells the model what the real one chose. Notifications act in two steps, as with the real one: the entries that
are hit leave the look-up at once, and idle ones are deregistered by the next call, or by `settle`. One thread only, but
a registrar may call back.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from typing import Any, Self

from usermm.errors import ArgumentError, ClosedError, LimitError, OverlapError, RegistrationError, from_errno
from usermm.registrars.base import Overlap, Registrar
from usermm.testing.address_space import AddressSpace
from usermm.testing.entries import Entry, ModelRegistration, Outcome, Pending, Range, checked_range
from usermm.testing.merging import target_range
from usermm.testing.notifications import Notification

REGISTRATIONS_PER_GET = 8
"""How often get registers memory that is hit by a notification meanwhile, before it raises RegistrationError."""


class ModelCache:
    """Keeps registrations of `registrar` for the memory of `space`. Limits: None means none."""

    def __init__(
        self,
        space: AddressSpace,
        registrar: Registrar[Any],
        *,
        max_bytes: int | None = None,
        max_count: int | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_count = max_count
        self.outcome = Outcome()
        """Of the call that ended last, also if it raised."""
        self.lost_errors: list[BaseException] = []
        """What deregister raised. There is nobody to tell, and the registration counts as gone."""
        self._space = space
        self._registrar = registrar
        self._registered: list[Entry] = []
        self._pending: list[Pending] = []
        self._clock = 0
        self._closed = False
        space.subscribe(self.notify)

    # What a user calls

    def get(
        self, address: int, length: int, *, covering: Range | None = None, victims: Iterable[Range] = ()
    ) -> ModelRegistration:
        """A registration that covers the range.

        `covering` says which entry to take where several cover, `victims` which idle ones to give up first, in order;
        ArgumentError if that is against the rules. Raises ArgumentError (no range, or longer than the device takes),
        LimitError (no room and nothing to give up), OverlapError (somebody holds what the device would have to give
        back), RegistrationError, ClosedError, DeviceError EFAULT (not mapped), and what the registrar raises.
        """
        wanted = checked_range("get", address, length)
        with self._call() as outcome:
            outcome.told = iter(victims)
            for _ in range(REGISTRATIONS_PER_GET):
                self._check_open()
                self._settle(outcome)
                entry = self._hit(wanted, covering)
                outcome.hit = entry is not None
                entry = entry or self._miss(wanted, outcome)
                if entry is not None:
                    self._clock += 1
                    entry.used = self._clock
                    entry.holders += 1
                    return ModelRegistration(entry, outcome, self._let_go)
            raise RegistrationError(errno.EAGAIN, f"get: {wanted} changed {REGISTRATIONS_PER_GET} times meanwhile")

    def evict(self, address: int, length: int) -> int:
        """Takes every entry that overlaps the range out of the look-up; how many. Nothing overlaps an empty range."""
        gone = Range(address, address + length)
        with self._call() as outcome:
            self._settle(outcome)
            hit = [entry for entry in self._live() if length > 0 and entry.range.overlaps(gone)]
            return self._retire(hit, outcome)

    def clear(self) -> int:
        """Takes every entry out of the look-up; how many."""
        with self._call() as outcome:
            self._settle(outcome)
            return self._retire(self._live(), outcome)

    def close(self) -> None:
        """The end: what is held is deregistered when it is let go. A second close does nothing."""
        self._closed = True
        self.clear()
        with contextlib.suppress(ValueError):
            self._space.unsubscribe(self.notify)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # What happens to it

    def notify(self, notification: Notification) -> None:
        """The memory in [start, end) changed. The address space calls this."""
        gone = Range(notification.start, notification.end)
        for entry in self._live():
            entry.live = not entry.range.overlaps(gone)
        for pending in self._pending:
            pending.hit = pending.hit or pending.range.overlaps(gone)

    def settle(self) -> None:
        """Deregisters what notifications took out of the look-up and nobody holds. Every call does that first."""
        with self._call() as outcome:
            self._settle(outcome)

    def give_up_idle(self) -> int:
        """What lingering comes to in the end: every entry that nobody holds leaves; how many. A model has no clock."""
        with self._call() as outcome:
            self._settle(outcome)
            return self._retire([entry for entry in self._live() if entry.idle], outcome)

    def fork(self, space: AddressSpace) -> ModelCache:
        """The child's cache, over its `space` (from AddressSpace.fork): empty, whatever the parent's has."""
        return ModelCache(space, self._registrar, max_bytes=self.max_bytes, max_count=self.max_count)

    # What it has

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

    # How it does it: a hit

    def _hit(self, wanted: Range, covering: Range | None) -> Entry | None:
        """Some live entry that covers all of `wanted`, unrounded: one that starts there before any other."""
        covers = [entry for entry in self._live() if entry.range.covers(wanted)]
        fits = [entry for entry in covers if entry.range.start == wanted.start] or covers
        if covering is None or not fits:
            return next(iter(fits), None)
        for entry in fits:
            if entry.range == covering:
                return entry
        raise ArgumentError(f"get: {covering} is not among what can be taken for {wanted}")

    # A miss

    def _miss(self, wanted: Range, outcome: Outcome) -> Entry | None:
        """A new entry; None if its memory changed meanwhile."""
        target = target_range(wanted, self._live(), self._registrar.traits, self.max_bytes)
        self._check_reentry(wanted, target)
        self._check_held(target)
        self._watch(target)
        pending = Pending(target)
        self._pending.append(pending)
        try:
            if self._registrar.traits.overlap is not Overlap.ALLOWED:
                merged = [entry for entry in self._live() if entry.range.overlaps(target)]
                outcome.merged += [entry.range for entry in merged]
                self._retire(merged, outcome)
            self._make_room(outcome)
            handle = self._register(target, outcome)
        finally:
            self._pending.remove(pending)
        entry = Entry(target, handle)
        self._registered.append(entry)
        if not pending.hit and not self._closed:
            return entry
        self._retire([entry], outcome)
        return None

    def _check_reentry(self, wanted: Range, target: Range) -> None:
        """A registrar that asks for memory while it is at work on it would wait for itself."""
        allowed = self._registrar.traits.overlap is Overlap.ALLOWED
        busy = [pending.range for pending in self._pending]
        if not allowed:
            busy += [entry.range for entry in self._registered if entry.leaving]
        for each in busy:
            if each.covers(wanted) if allowed else each.overlaps(target):
                raise RegistrationError(errno.EDEADLK, f"get: the registrar asks for {wanted} while at work on {each}")

    def _check_held(self, target: Range) -> None:
        if self._registrar.traits.overlap is not Overlap.REFUSED:
            return
        for entry in self._registered:
            if entry.holders and entry.range.overlaps(target):
                message = f"get: {target} overlaps {entry.range}, which somebody holds: release that first"
                raise OverlapError(errno.EADDRINUSE, message)

    def _watch(self, target: Range) -> None:
        if not self._space.is_mapped(target.start, target.end):
            raise from_errno(errno.EFAULT, f"get: {target} has a hole: map it first")
        self._space.watch(target.start, target.end)

    def _make_room(self, outcome: Outcome) -> None:
        while self._is_too_much():
            if not self._give_up(outcome):
                raise LimitError(errno.ENOMEM, "get: everything that is registered is held: release some first")

    def _is_too_much(self) -> bool:
        count = len(self._registered) + len(self._pending)
        too_many = self.max_count is not None and count > self.max_count
        return too_many or (self.max_bytes is not None and self.pinned_bytes > self.max_bytes)

    def _register(self, target: Range, outcome: Outcome) -> object:
        while True:
            outcome.tries += 1
            try:
                return self._registrar.register(target.start, target.length)
            except (LimitError, MemoryError):
                if not self._give_up(outcome):
                    raise

    # Giving up

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
        dead = [entry for entry in self._registered if not entry.live and entry.idle]
        for entry in dead:
            self._deregister(entry, outcome)
        return bool(dead)

    def _retire(self, entries: list[Entry], outcome: Outcome) -> int:
        """Out of the look-up, all of them first; then idle ones are deregistered, in ascending order."""
        for entry in entries:
            entry.live = False
        for entry in sorted(entries, key=lambda entry: entry.range):
            if entry.idle:
                self._deregister(entry, outcome)
        return len(entries)

    def _let_go(self, entry: Entry) -> None:
        entry.holders -= 1
        if not entry.live and entry.idle:
            with self._call() as outcome:
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

    # Small things

    def _live(self) -> list[Entry]:
        return [entry for entry in self._registered if entry.live]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(errno.EBADF, "get: the cache is closed: make a new one")

    @contextlib.contextmanager
    def _call(self) -> Iterator[Outcome]:
        outcome = Outcome()
        try:
            yield outcome
        finally:
            self.outcome = outcome
