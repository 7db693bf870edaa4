"""A real registration cache and its model as one: every call goes to both, and both must do the same.

Compared are answers, errors, the calls of the registrar, and the counts. The real one goes first, since it has freedom
where the model has rules; the model is told what it chose, and accepts nothing but these choices:

- Several registrations cover a range: any of them, but one that starts there before the others.
- An object that asked before is given what it was given then, while that is in the look-up.
- An idle registration makes room: any. `Recency` says what the clock in place of an LRU list promises all the same.
- Lingering: what an object has asked for that is alive may be remembered, and what nobody asks for must not be.
- An object that owned its memory dies: what it was given may be given up at once, if nobody holds it; that counts as
  such even if the memory has changed and nobody has looked.
- Deregistrations without a registration in between come in any order.
- What was invalidated while the device registered something is deregistered in that get, or by the next call.
"""

from __future__ import annotations

import weakref
from typing import Any

from property.cache_answers import Choice, account, answer, attempt
from property.recency import Recency

import usermm
from usermm.registrars import Traits
from usermm.testing import AddressSpace, Cause, ModelCache, ModelRegistration, Notification, Outcome, Range
from usermm.testing import ScriptedRegistrar as Scripted


class Asker:
    """Memory by address and size; what it was given tells which of several registrations it may be given again."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.given: tuple[int, int, object] | None = None
        self.all_given: set[object] = set()

    @property
    def range(self) -> Range:
        return Range(self.address, self.address + self.size)


class Owner(Asker):
    """Looks as if its memory were unmapped when it dies, as an array that is no view does."""

    base = None


class Held:
    """What one get gave, in both worlds."""

    def __init__(self, real: Any, model: ModelRegistration) -> None:
        self.real = real
        self.model = model


class CachePair:
    """`limits` are those of both caches, `budget` those of both registrars."""

    def __init__(
        self,
        space: AddressSpace,
        traits: Traits,
        limits: dict[str, int | None],
        budget: dict[str, int | None],
        model_class: type[ModelCache] = ModelCache,
    ) -> None:
        self.devices = Scripted(traits, **budget), Scripted(traits, **budget)
        self.counted = dict.fromkeys(("unmapped", "remapped", "discarded"), 0)
        self.counted |= dict.fromkeys(("hits", "misses", "evictions", "merges", "expirations", "retirements"), 0)
        space.subscribe(self._count)  # before the model does: it looks at what there was
        self.real = usermm.RegistrationCache(self.devices[0], linger_s=None, **limits)
        self.real.upkeep_due = False  # no thread that deregisters by itself
        self.model = model_class(space, self.devices[1], **limits)
        self.recency = Recency()
        self.notified = 0
        self.lost: dict[object, str] = {}
        """The handles whose memory went, and how."""
        self.held: list[Held] = []
        self.registrations = 0
        """Calls of register so far, for scripts."""
        self.totals = {"register": 0, "deregister": 0, "failed": 0}

    # Calls

    def get(self, asker: Asker, probe: bool | None) -> Held | None:
        """None: both refused. Otherwise it is held until it is released."""
        before = len(self.devices[0].calls)
        real = attempt(self.real.get, asker, probe=probe)
        wanted, whole = asker.range, None
        if not isinstance(real, tuple):
            whole = Range(real.address, real.address + real.length)
            if probe is None and asker.given == (asker.address, asker.size, real.handle):
                wanted = whole
        self.model.outcome = Outcome()  # it stays if there is nothing to do
        choice = Choice(self.devices[0].calls[before:], self.model, self.devices[1])
        notified = self.notified
        model = attempt(self.model.get, wanted.start, wanted.length, covering=whole, victims=choice)
        assert answer(real) == answer(model), f"get: real {answer(real)}, model {answer(model)}"
        self._count_get(model)
        held = None if isinstance(model, tuple) else Held(real, model)
        if held:
            self.held.append(held)
        self._follow(choice, asker, held, remembered=probe is not False)
        if self.notified != notified:
            self.settle()
        return held

    def release(self, held: Held) -> None:
        self.held.remove(held)
        held.real.release()
        held.model.release()

    def forget(self, askers: list[Asker], which: int) -> None:
        """The object dies, and may take along what it was given."""
        asker = askers.pop(which)
        given, before, reference = asker.all_given, len(self.devices[0].calls), weakref.ref(asker)
        del asker
        assert reference() is None, "a call keeps its buffer alive"
        gone = self.devices[0].calls[before:]
        assert len(gone) <= 1
        for call in gone:
            assert call.handle in given, f"{call.handle} was given up, which the object that died did not have"
            self.counted["retirements"] += 1
            if call.handle in self.lost:  # nobody had looked yet
                self.counted[self.lost[call.handle]] -= 1
                self.settle()
            else:
                self._give_up(call.handle)

    def _give_up(self, handle: object) -> None:
        try:
            self.model.give_up(handle)
        except usermm.ArgumentError as error:
            raise AssertionError(f"the real one gave {handle} up, which the model has not idle") from error

    def evict(self, asker: Asker) -> None:
        model = attempt(self.model.evict, asker.address, asker.size)
        assert attempt(self.real.evict, asker) == model

    def clear(self) -> None:
        assert self.real.clear() == self.model.clear()

    def expire(self, askers: list[Asker]) -> None:
        """As if it had been long ago that anybody asked: all goes that nobody holds and no living object was given."""
        self.settle()
        idle, before = self.idle(), len(self.devices[0].calls)
        self.real.expire(1)
        self.real.expire(1)
        gone = {call.handle for call in self.devices[0].calls[before:]}
        assert idle - {asker.given[2] for asker in askers if asker.given} <= gone <= idle
        for handle in gone:
            self._give_up(handle)
        self.counted["expirations"] += len(gone)
        self.recency.sweep()

    def settle(self) -> None:
        """What was invalidated is deregistered now."""
        self.real.stats()
        self.model.settle()

    def close(self) -> None:
        self.real.close()
        self.model.close()

    def abandon(self) -> None:
        """Leaves nothing of the real one behind, whatever state this is in."""
        self.real.close()
        for held in self.held:
            held.real.release()
        self.held.clear()

    # Comparing

    def compare_devices(self) -> None:
        """What was done since the last time, and what is registered now."""
        real, model = (account(device.calls) for device in self.devices)
        assert real == model, f"the device saw {real}, the model's {model}"
        real_pins, model_pins = (sorted(device.live) for device in self.devices)
        assert real_pins == model_pins
        for call in self.devices[0].calls:
            self.totals["failed" if call.name == "register" and call.error else call.name] += 1
        self.registrations = self.totals["register"] + self.totals["failed"]
        for device, cache in zip(self.devices, (self.real, self.model), strict=True):
            device.check()
            device.calls.clear()
            assert device.peak_bytes <= (self.model.max_bytes or device.peak_bytes), cache
            assert device.peak_count <= (self.model.max_count or device.peak_count), cache

    def compare(self) -> None:
        """All of it. This settles."""
        self.settle()
        rows = sorted((start, start + length, holders) for start, length, holders, _ in self.real.overlapping(0, 0))
        self.compare_devices()
        assert [row[:2] for row in rows] == list(self.model.live)
        for held in self.held:
            assert held.real.valid == held.model.valid, f"{answer(held.real)}: {held.real.valid}"
        self._compare_counts(sum(row[2] for row in rows))

    def _compare_counts(self, holders: int) -> None:
        stats = self.real.stats()
        assert holders == sum(held.model.valid for held in self.held)
        expected = self.counted | {
            "registrations": len(self.model.live),
            "held": len({held.real.handle for held in self.held}),
            "pinned": len(self.devices[1].live),
            "pinned_bytes": self.devices[1].pinned_bytes,
            "registered": self.totals["register"],
            "retries": self.totals["register"] - self.counted["misses"],
            "register_failures": self.totals["failed"],
            "deregistered": self.totals["deregister"],
            "doubts": 0,
            "waits": 0,
        }
        found = {name: getattr(stats, name) for name in expected}
        assert found == expected

    # Counting

    def _count(self, notification: Notification) -> None:
        name = {Cause.UNMAP: "unmapped", Cause.REMAP: "remapped", Cause.DISCARD: "discarded"}[notification.cause]
        gone = Range(notification.start, notification.end)
        self.notified += 1
        live = self.live_handles()
        hit = [live[each] for each in self.model.live if each.overlaps(gone)]
        self.lost |= dict.fromkeys(hit, name)
        making = sum(each.range.overlaps(gone) and not each.hit for each in self.model._pending)
        self.counted[name] += len(hit) + making

    def _count_get(self, model: ModelRegistration | tuple[str, int | None]) -> None:
        outcome = self.model.outcome
        if not isinstance(model, tuple):
            self.counted["hits" if outcome.hit else "misses"] += 1
        self.counted["evictions"] += len(outcome.evicted)
        self.counted["merges"] += len(outcome.merged)

    def _follow(self, choice: Choice, asker: Asker, held: Held | None, *, remembered: bool) -> None:
        if held:
            asker.all_given.add(held.real.handle)
            if self.model.outcome.hit:
                self.recency.hit(held.real.handle)
            if remembered:
                asker.given = asker.address, asker.size, held.real.handle
        evicted = {choice.handles.get(each) for each in self.model.outcome.evicted}
        assert None not in evicted, "the model gave up what the real one kept"
        self.recency.check(evicted, self.idle() if evicted else set())
        if not held:  # maybe for want of room, and then all have been looked at
            self.recency.sweep()

    def idle(self) -> set[object]:
        """The handles in the look-up that nobody holds."""
        live = self.live_handles()
        return {live[each] for each in self.model.live} - {held.real.handle for held in self.held}

    def live_handles(self) -> dict[Range, object]:
        """By what is registered: of several for the same memory the latest, which alone can be in the look-up."""
        return {Range(pin.address, pin.address + pin.length): pin.handle for pin in self.devices[1].live}
