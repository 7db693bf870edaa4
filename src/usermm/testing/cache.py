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
other tells the model what the real one chose. Notifications act in two steps, as with the real one: what is hit cannot
be found from that moment on; it leaves, and is deregistered if nobody holds it, in the next get, evict or clear, or by
`settle`. One thread only, but a registrar may call back.
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
from usermm.testing.ledger import Ledger
from usermm.testing.merging import Making
from usermm.testing.notifications import Notification

REGISTRATIONS_PER_GET = 8
"""How often get registers memory that is hit by a notification meanwhile, before it raises RegistrationError."""


class _ChangedError(Exception):
    """The memory was hit by a notification while it was registered."""


class _NoResourcesError(Exception):
    """The registrar had none."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class ModelCache(Ledger):
    """Keeps registrations of `registrar` for the memory of `space`. Limits: None means none."""

    def __init__(
        self,
        space: AddressSpace,
        registrar: Registrar[Any],
        *,
        max_bytes: int | None = None,
        max_count: int | None = None,
    ) -> None:
        super().__init__(registrar)
        self.max_bytes = max_bytes
        self.max_count = max_count
        self.outcome = Outcome()
        """Of the call that ended last, also if it raised."""
        self._space = space
        self._clock = 0
        self._notified = 0
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
            making = Making(wanted, outcome)
            while True:
                self._check_open()
                self._settle(outcome)
                entry = self._hit(wanted, covering)
                outcome.hit = entry is not None
                entry = entry or self._make(making)
                if entry is not None:
                    self._clock += 1
                    entry.used = self._clock
                    entry.holders += 1
                    return ModelRegistration(entry, outcome, self._release)

    def evict(self, address: int, length: int) -> int:
        """Takes every entry that overlaps the range out of the look-up; how many. ArgumentError: an empty range."""
        gone = checked_range("evict", address, length)
        with self._call() as outcome:
            self._settle(outcome)
            return self._retire([entry for entry in self._live() if entry.range.overlaps(gone)], outcome)

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
        self._notified += 1
        for entry in self._live():
            entry.hit = entry.range.overlaps(gone)
        for pending in self._pending:
            pending.hit = pending.hit or pending.range.overlaps(gone)

    def settle(self) -> None:
        """Deregisters what notifications took out of the look-up and nobody holds. get, evict and clear do it first."""
        with self._call() as outcome:
            self._settle(outcome)

    def give_up_idle(self) -> int:
        """What lingering comes to in the end: every entry that nobody holds leaves; how many. A model has no clock."""
        with self._call() as outcome:
            self._settle(outcome)
            return self._retire([entry for entry in self._live() if entry.idle], outcome)

    def give_up(self, handle: object) -> None:
        """The entry with this handle, which nobody holds, leaves: what it comes to when the object that asked dies.

        ArgumentError: there is no such entry.
        """
        with self._call() as outcome:
            found = [entry for entry in self._live() if entry.handle == handle and entry.idle]
            if not found:
                raise ArgumentError(f"give_up: {handle!r} is no idle entry")
            self._retire(found, outcome)

    def fork(self, space: AddressSpace) -> ModelCache:
        """The child's cache, over its `space` (from AddressSpace.fork): empty, whatever the parent's has."""
        return ModelCache(space, self._registrar, max_bytes=self.max_bytes, max_count=self.max_count)

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

    def _make(self, making: Making) -> Entry | None:
        """A new entry. None: the look-up has to begin again, since the registrar was called, and may have called back.

        Order: what overlaps leaves, room is made, the memory is watched, registered, and looked at again.
        """
        if not making.is_union:
            making.notified = self._notified
        target = making.target(self._live(), self._registrar.traits, self.max_bytes)
        self._check_reentry(making.wanted, target)
        if not self._is_held(target, live=False) and self._costs_others(target):
            self._check_mapped(making.wanted)  # memory that will be refused is worth no other registration
        if self._is_held(target):
            text = f"get: {target} overlaps a registration that somebody holds: release that first"
            making.drop_union(OverlapError(errno.EADDRINUSE, text))
        elif not self._merge(target, making.outcome):
            try:
                has_room = not self._make_room(target, making.outcome)
            except LimitError as error:
                making.drop_union(error)
            else:
                return self._try(target, making) if has_room else None
        return None

    def _try(self, target: Range, making: Making) -> Entry | None:
        """None: it has to be tried again."""
        doubtful = making.is_union and making.notified != self._notified
        try:
            if doubtful:  # a part may have lost its pages after it was given back, and before the union is watched
                raise _ChangedError
            return self._register(target, making.outcome)
        except _ChangedError:
            making.forget_union(alone=doubtful)
            making.changes += 1
            if making.changes == REGISTRATIONS_PER_GET:
                text = f"get: {making.wanted} changed {making.changes} times while it was registered"
                raise RegistrationError(errno.EAGAIN, text) from None
        except _NoResourcesError as error:
            making.forget_union()
            if not self._give_up(making.outcome):
                raise error.reason from None
        except Exception as error:
            making.drop_union(error)
        return None

    def _register(self, target: Range, outcome: Outcome) -> Entry:
        pending = Pending(target)
        self._pending.append(pending)
        try:
            self._watch(target)
            outcome.tries += 1
            handle = self._registrar.register(target.start, target.length)
        except (LimitError, MemoryError) as error:
            raise _NoResourcesError(error) from None
        finally:
            self._pending.remove(pending)
        entry = Entry(target, handle)
        self._registered.append(entry)
        if pending.hit or self._closed:
            self._retire([entry], outcome)
            raise _ChangedError
        return entry

    def _merge(self, target: Range, outcome: Outcome) -> int:
        """What overlaps leaves the look-up, and is given back if nobody holds it; how many."""
        if self._registrar.traits.overlap is Overlap.ALLOWED:
            return 0
        merged = [entry for entry in self._live() if entry.range.overlaps(target)]
        outcome.merged += [entry.range for entry in merged]
        return self._retire(merged, outcome)

    def _check_reentry(self, wanted: Range, target: Range) -> None:
        """A registrar that asks for what it is at work on would wait for itself."""
        overlap = self._registrar.traits.overlap
        for pending in self._pending:
            if pending.range.covers(wanted) or (overlap is not Overlap.ALLOWED and pending.range.overlaps(target)):
                raise _waits_for_itself(wanted, pending.range)
        for entry in self._registered:
            if overlap is Overlap.REFUSED and entry.leaving and entry.range.overlaps(target):
                raise _waits_for_itself(wanted, entry.range)

    def _is_held(self, target: Range, *, live: bool = True) -> bool:
        """Somebody holds what would have to be given back; without `live`, of what has left the look-up."""
        refused = self._registrar.traits.overlap is Overlap.REFUSED
        entries = [entry for entry in self._registered if live or not entry.live]
        return refused and any(entry.holders and entry.range.overlaps(target) for entry in entries)

    def _costs_others(self, target: Range) -> bool:
        """Something has to leave for it."""
        exclusive = self._registrar.traits.overlap is not Overlap.ALLOWED
        return self._is_full(target) or (exclusive and any(entry.range.overlaps(target) for entry in self._live()))

    def _watch(self, target: Range) -> None:
        self._space.watch(target.start, target.end)  # what is there, and that stays so
        self._check_mapped(target)

    def _check_mapped(self, target: Range) -> None:
        if not self._space.is_mapped(target.start, target.end):
            raise from_errno(errno.EFAULT, f"get: {target} has a hole: map it first")

    def _is_full(self, target: Range) -> bool:
        count, pinned_bytes = self._count + 1, self.pinned_bytes + target.length
        too_many = self.max_count is not None and count > self.max_count
        return too_many or (self.max_bytes is not None and pinned_bytes > self.max_bytes)

    def _make_room(self, target: Range, outcome: Outcome) -> bool:
        """One step towards it. False: there is room."""
        if not self._is_full(target):
            return False
        if not self._give_up(outcome):
            for entry in self._registered:
                if entry.leaving:
                    raise _waits_for_itself("room", entry.range)
            raise LimitError(errno.ENOMEM, "get: everything that is registered is held: release some first")
        return True

    # Small things

    def _release(self, entry: Entry) -> None:
        outcome = Outcome()
        self._let_go(entry, outcome)
        self.outcome = outcome

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


def _waits_for_itself(wanted: Range | str, busy: Range) -> RegistrationError:
    text = f"get: the registrar asks for {wanted} while it is at work on {busy}, and would wait for itself"
    return RegistrationError(errno.EDEADLK, text)
