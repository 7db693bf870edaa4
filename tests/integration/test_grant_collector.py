"""Granted memory that the garbage collector finds, with views of it in the same circle."""

from __future__ import annotations

import gc

import usermm
from usermm._core import Memory
from usermm.grants.session import status


class Circle:
    """Refers to itself, to a memory, and to a view of that."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.view, self.me = memory, memoryview(memory), self


def test_a_circle_with_a_view_is_let_go(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    """A view in the same garbage keeps close() from unmapping: the object's end does."""
    for count in (2, 1, 1, 1):
        allocation = one.gntalloc.allocate(two.domid, count)
        mapping = two.gntdev.map(one.domid, allocation.references)
        circles = [Circle(allocation), Circle(mapping)]
        del circles, allocation, mapping
        gc.collect()
    one.is_isolated_from(two.domid)  # what was only told goes before it
    two.is_isolated_from(one.domid)
    grants = status(hypervisor.socket)["grants"]
    assert [(grant["pooled"], sum(hold["pages"] for hold in grant["mapped_by"])) for grant in grants] == [(0, 0)]


def test_a_circle_without_one_is_let_go(
    hypervisor: usermm.Hypervisor, one: usermm.Domain, two: usermm.Domain
) -> None:
    allocation = one.gntalloc.allocate(two.domid, 3)
    mapping = two.gntdev.map(one.domid, allocation.references)
    circle = [allocation, mapping]
    circle.append(circle)  # type: ignore[arg-type]
    del circle, allocation, mapping
    gc.collect()
    one.is_isolated_from(two.domid)
    two.is_isolated_from(one.domid)
    assert status(hypervisor.socket)["grants"] == []
