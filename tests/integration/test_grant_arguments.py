"""Arguments that are none, to a domain and its devices: one line, no struct.error, and nothing was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.calls import refused_line

import usermm


@pytest.fixture(scope="module")
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as found:
        yield found


CALLS: dict[str, Callable[[Any], Any]] = {
    "is_isolated_from(70000)": lambda domain: domain.is_isolated_from(70000),
    "is_isolated_from(-1)": lambda domain: domain.is_isolated_from(-1),
    "get_offset_for_vaddr(2**64)": lambda domain: domain.gntdev.get_offset_for_vaddr(1 << 64),
    "get_offset_for_vaddr(-1)": lambda domain: domain.gntdev.get_offset_for_vaddr(-1),
    "gntdev.set_unmap_notify(-1)": lambda domain: domain.gntdev.set_unmap_notify(-1),
    "gntdev.set_unmap_notify(0, port=-1)": lambda domain: domain.gntdev.set_unmap_notify(0, port=-1),
    "gntalloc.set_unmap_notify(2**64)": lambda domain: domain.gntalloc.set_unmap_notify(1 << 64),
    "allocate(1, 1.0)": lambda domain: domain.gntalloc.allocate(1, 1.0),
    "allocate(1, -1)": lambda domain: domain.gntalloc.allocate(1, -1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_that_is_none(hypervisor: usermm.Hypervisor, name: str) -> None:
    with usermm.Domain(hypervisor.socket) as domain:
        refused_line(lambda: CALLS[name](domain), usermm.ArgumentError)
        assert domain.gntalloc.allocate(domain.domid, 1024).closed is False  # the limit is untouched


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"domid": 1.5}, usermm.ArgumentTypeError),
        ({"domid": 1 << 40}, usermm.ArgumentError),
        ({"domid": -1}, usermm.ArgumentError),
        ({"name": "\ud800"}, usermm.ArgumentError),
        ({"name": 5}, usermm.ArgumentError),
        ({"limit": "x"}, usermm.ArgumentTypeError),
        ({"limit": -1}, usermm.ArgumentError),
    ],
)
def test_a_domain_that_is_none(hypervisor: usermm.Hypervisor, given: dict[str, Any], kind: type) -> None:
    refused_line(lambda: usermm.Domain(hypervisor.socket, **given), kind)
