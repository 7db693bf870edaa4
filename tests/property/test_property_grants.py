"""The grant devices under random steps: the model alone, and usermm's own hypervisor beside it."""

from __future__ import annotations

import os

from conformance.grants_world_local import LocalInProcess
from conformance.grants_world_model import ModelWorld, _Domain
from hypothesis import settings
from hypothesis.stateful import invariant
from property.grants_side_by_side import GrantsSideBySide
from property.slots_machine import SlotsAgainstModel

from usermm.testing.grant_gntdev2007 import ModelGntdev2007, State


class ModelAlone(GrantsSideBySide):
    """What must hold of the model whatever happens."""

    @invariant()
    def slots_are_consistent(self) -> None:
        if not hasattr(self, "parties"):
            return
        for (party,) in self.parties:
            file = party.seed.file.model  # type: ignore[attr-defined]
            assert isinstance(file, ModelGntdev2007)
            free = [slot for slot, each in enumerate(file.slots) if each.state is State.INVALID]
            assert sorted(file._free) == free
            covered = [slot for first, count in file._mapped.values() for slot in range(first, first + count)]
            mapped = [slot for slot, each in enumerate(file.slots) if each.state is State.MAPPED]
            assert sorted(covered) == mapped

    @invariant()
    def grants_are_consistent(self) -> None:
        """An entry that nobody uses and that has ended is out of the table; who uses it is there."""
        if not hasattr(self, "parties"):
            return
        for (party,) in self.parties:
            assert isinstance(party.driver, _Domain)
            for reference, entry in party.driver.model.grants.items():
                assert reference == entry.reference >= 8
                assert entry.local_users or entry.remote or not entry.ended
                assert all(not mapping.closed for mapping, _ in entry.remote + entry.local)


class SideBySide(GrantsSideBySide):
    kinds = (ModelWorld, LocalInProcess)


TestModelAlone = ModelAlone.TestCase
TestModelAlone.settings = settings(max_examples=100, stateful_step_count=50)

if os.environ.get("USERMM_STRESS") != "1":  # each example starts a hypervisor
    SideBySide.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestSideBySide = SideBySide.TestCase

TestSlotsAgainstModel = SlotsAgainstModel.TestCase
