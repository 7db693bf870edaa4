"""The slot table of the real gntdev of 2007 against the model's whole device: thousands of steps a second."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from usermm.grants.slots import Slots
from usermm.testing.grant_gntdev2007 import ModelGntdev2007
from usermm.testing.grant_machine import GrantMachine
from usermm.uapi import xen_gntdev
from usermm.uapi.xen_gntdev import PAGE_BYTES, SLOTS_2007

slots = st.integers(-1, SLOTS_2007)
counts = st.sampled_from([1, 1, 2, 3, 8, 20, 50, 128])


class SlotsAgainstModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        machine = GrantMachine()
        self.user = machine.add_domain(2)
        self.reference = 1, machine.add_domain(1).grant(2, writable=False).reference
        self.model = ModelGntdev2007(self.user)
        self.slots = Slots()
        self.mappings: list[tuple[int, int, Any]] = []

    @rule(count=counts)
    def take(self, count: int) -> None:
        pointer = self.user.memory.place(xen_gntdev.REFERENCE.pack(*self.reference) * count)
        argument = bytearray(xen_gntdev.MAP_2007.pack(count, pointer, 0))

        def by_model() -> int:
            self.model.ioctl(xen_gntdev.MAP_GRANT_REF, argument)
            return int(xen_gntdev.MAP_2007.unpack(argument)[2] // PAGE_BYTES)

        assert outcome(by_model) == outcome(lambda: self.slots.take([self.reference] * count, "take"))

    @rule(slot=slots, count=counts)
    def free(self, slot: int, count: int) -> None:
        argument = bytearray(xen_gntdev.UNMAP_2007.pack(slot * PAGE_BYTES, count))
        by_model = outcome(lambda: self.model.ioctl(xen_gntdev.UNMAP_GRANT_REF, argument))
        assert (outcome(lambda: self.slots.free(slot, count, "free")) or 0) == by_model

    @rule(slot=slots, count=counts)
    def map(self, slot: int, count: int) -> None:
        length, offset = count * PAGE_BYTES, slot * PAGE_BYTES
        by_model = outcome(lambda: self.model.mmap(length, mmap.PROT_READ, mmap.MAP_SHARED, offset))
        by_slots = outcome(lambda: self.slots.map(slot, count, "map"))
        if isinstance(by_model, str) or isinstance(by_slots, str):
            assert by_model == by_slots
        else:
            self.mappings.append((slot, count, by_model))

    @precondition(lambda self: self.mappings)
    @rule(pick=st.integers(0, 100))
    def unmap(self, pick: int) -> None:
        slot, count, mapping = self.mappings.pop(pick % len(self.mappings))
        self.model.munmap(mapping)
        self.slots.unmapped(slot, count)

    @precondition(lambda self: hasattr(self, "slots"))
    @invariant()
    def states_agree(self) -> None:
        assert [self.slots.state(slot).value for slot in range(SLOTS_2007)] == [
            slot.state.value for slot in self.model.slots
        ]


def outcome(call: Callable[[], Any]) -> Any:
    """What it returned, or the name of the errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
