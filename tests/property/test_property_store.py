"""The store against its model, and the machine against mistakes that somebody could make in the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from property.store_machine import StoreMachine

from usermm.hypervisor.store import operations, service
from usermm.hypervisor.store.nodes import Presence
from usermm.hypervisor.store.transactions import Transaction
from usermm.hypervisor.store.tree import NAMES, Tree

TestStore = StoreMachine.TestCase


def without_names(self: Any, path: str, fact: int) -> None:
    if fact != NAMES and self._facts.get(path, 0) & fact:
        self._lose()


def always_exact(self: Any, path: str, **_: bool) -> None:
    self._announced[path] = True


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no transaction is ever lost": (Transaction, "learn", lambda *_: None),
    "a changed list of names loses nothing": (Transaction, "learn", without_names),
    "owners that go are forgotten": (Presence, "known", lambda self, domid, _: domid == 0 or domid in self._arrivals),
    "watches hear of what they may not read": (service.Store, "_may_hear", lambda *_: True),
    "quotas are not looked at": (operations, "_check_quota", lambda *_: None),
    "only the very path hears": (Tree, "announce", always_exact),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    owner, name, wrong = MISTAKES[mistake]
    with mock.patch.object(owner, name, wrong), pytest.raises(AssertionError):
        run_state_machine_as_test(StoreMachine, settings=settings.get_profile("usermm-planted"))
