"""A hypervisor in this process, and two domains of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import usermm


@pytest.fixture
def hypervisor() -> Iterator[usermm.Hypervisor]:
    with usermm.Hypervisor() as hypervisor:
        yield hypervisor


@pytest.fixture
def one(hypervisor: usermm.Hypervisor) -> Iterator[usermm.Domain]:
    with usermm.Domain(hypervisor.socket) as domain:
        yield domain


@pytest.fixture
def two(hypervisor: usermm.Hypervisor) -> Iterator[usermm.Domain]:
    with usermm.Domain(hypervisor.socket) as domain:
        yield domain
