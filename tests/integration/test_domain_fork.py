"""A forked child and its parent's domain: it can close everything, use nothing, and waits for nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.processes import in_child

import usermm
from usermm.errors import DeviceError


def test_a_child_waits_for_no_lock_of_a_thread_that_is_not_there(one: usermm.Domain, two: usermm.Domain) -> None:
    """Whatever it closes or calls while another thread of the parent was inside every device."""
    grantor, grantee = one, two
    pages = [grantor.gntalloc.allocate(grantee.domid) for _ in range(3)]  # the last ones of a pool
    mappings = [grantee.gntdev.map(grantor.domid, page.references) for page in pages]
    old = grantee.open_gntdev("seed2007")
    events = grantee.evtchn

    def close_all() -> str:
        for each in (*mappings, *pages, old, events, grantee.gntdev, grantor.gntalloc, grantor, grantee):
            each.close()
        for call in (events.fileno, lambda: events.read(0), lambda: events.notify(1), lambda: old.map(1, 8)):
            with pytest.raises(DeviceError):
                call()
        return "done"

    devices = (grantor.gntalloc, *(each._file for each in (events, grantor.gntalloc, grantee.gntdev, old)))
    objects = (*devices, grantor, grantee, grantor._session, grantee._session)
    locks = [each._alone._lock for each in objects]  # type: ignore[union-attr]
    with contextlib.ExitStack() as held:
        for lock in (*locks, grantor._limit._lock, grantee._foreign._attachments._lock):
            held.enter_context(held_by_another(lock))
        assert in_child(close_all, timeout_s=10) == "done"
    pages[2].write(0, b"kept")
    assert mappings[2].read(0, 4) == b"kept" and mappings[2].is_mapped
    for each in (*mappings, *pages):
        each.close()


@contextlib.contextmanager
def held_by_another(lock: Any) -> Iterator[None]:
    ready, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            ready.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        go_on.set()
        thread.join()
