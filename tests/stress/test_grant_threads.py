"""Grants that threads make, map, take back, unmap behind their backs and let go, all at once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import threading
from collections.abc import Iterator
from functools import partial

from support.hypervisors import wait_until
from support.threads import running

import usermm
from usermm.errors import BadReferenceError
from usermm.grants import session
from usermm.grants.files import PAGE_BYTES
from usermm.grants.gntalloc import Allocation

ROUNDS = 5000 if os.environ.get("USERMM_STRESS") == "1" else 300
THREADS = 6
_libc = ctypes.CDLL(None)
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextlib.contextmanager
def two_domains() -> Iterator[tuple[usermm.Hypervisor, usermm.Domain, usermm.Domain]]:
    """Who grants, and to whom."""
    with (
        usermm.Hypervisor() as hypervisor,
        usermm.Domain(hypervisor.socket) as grantor,
        usermm.Domain(hypervisor.socket) as grantee,
    ):
        yield hypervisor, grantor, grantee


def use(grantor: usermm.Domain, grantee: usermm.Domain, seed: int) -> None:
    """One thread's rounds. Whoever is told that a mapping was hit is often not the thread whose it is."""
    chance = random.Random(seed)
    for _ in range(ROUNDS):
        count = chance.choice([1, 1, 1, 2, 3])
        pages: Allocation | None = grantor.gntalloc.allocate(grantee.domid, count, writable=chance.random() < 0.5)
        assert pages is not None
        pages.write(0, b"abc")
        mapping = grantee.gntdev.map(grantor.domid, pages.references)
        what = chance.choice(["revoke", "revoke one", "drop", "munmap", "munmap", "read"])
        if what == "revoke":
            pages.revoke()
            assert (pages.read(0, 3), mapping.read(0, 3)) == (b"abc", bytes(3))
        elif what == "revoke one":
            grantor.gntalloc.revoke(pages.references[-1])
        elif what == "drop":
            pages = None
        elif what == "munmap":
            assert _libc.munmap(mapping.address, PAGE_BYTES) == 0
        else:
            assert mapping.read(0, 3) == b"abc"
        if pages is not None:
            pages.close()
        if chance.random() < 0.5:
            mapping.close()


def test_threads_get_in_nobodys_way() -> None:
    """And nothing is let go twice, or never."""
    with two_domains() as (hypervisor, grantor, grantee):
        with running(*(partial(use, grantor, grantee, seed) for seed in range(THREADS))):
            pass
        gc.collect()
        grantor.gntalloc.allocate(grantee.domid, 1024).close()  # all of the limit
        grantor.gntalloc.close()
        with grantor.open_gntalloc() as last, last.allocate(grantee.domid), last.allocate(grantee.domid) as page:
            grantee.gntdev.map(grantor.domid, page.references).close()  # from a new pool: lets the old ones go
            wait_until(lambda: len(session.status(hypervisor.socket)["grants"]) == 2, 5)


def test_an_index_is_mapped_by_one_of_several_threads() -> None:
    with two_domains() as (_, grantor, grantee):
        pages = grantor.gntalloc.allocate(grantee.domid, 2)
        for _ in range(ROUNDS // 3):
            index = grantee.gntdev.map_grant_ref([(grantor.domid, number) for number in pages.references])
            barrier, mapped, refused = threading.Barrier(3), [], []

            def attempt(
                index: int = index, barrier: threading.Barrier = barrier, mapped: list = mapped, refused: list = refused  # type: ignore[type-arg]
            ) -> None:
                barrier.wait()
                try:
                    mapped.append(grantee.gntdev.mmap(index, 2))
                except BadReferenceError as error:
                    refused.append(error)

            with running(*[attempt] * 3):
                pass
            assert len(mapped) == 1 and len(refused) == 2
            mapped[0].close()
            grantee.gntdev.unmap_grant_ref(index, 2)
        pages.close()




def test_threads_that_take_back_and_close_the_same() -> None:
    """revoke() may be called again, and by several; close() waits for it. None of them fails, or leaves anything."""
    with two_domains() as (hypervisor, grantor, grantee):
        for count in (1, 1, 3) * (ROUNDS // 3):
            pages = grantor.gntalloc.allocate(grantee.domid, count)
            calls = [pages.revoke, pages.revoke, pages.close if count == 3 else pages.revoke]
            with running(*calls):
                pass
            pages.close()
        grantor.is_isolated_from(grantee.domid)
        assert all(grant["pooled"] == 0 for grant in session.status(hypervisor.socket)["grants"])


def test_a_pool_page_that_is_taken_back_and_closed_at_once_is_granted_no_more() -> None:
    """It is memory of the grantor's own by then: what was written to it later, its grantee never saw."""
    with two_domains() as (_, grantor, grantee):
        grantor.gntalloc.allocate(grantee.domid, writable=True).close()
        for _ in range(ROUNDS):
            page = grantor.gntalloc.allocate(grantee.domid, writable=True)
            with running(page.revoke):
                page.close()
            pages = [grantor.gntalloc.allocate(grantee.domid, writable=True) for _ in range(2)]
            for page in pages:
                page.write(0, b"hello")
                with grantee.gntdev.map(grantor.domid, page.references) as mapping:
                    assert mapping.read(0, 5) == b"hello"
                page.close()


def test_notifications_are_set_while_others_map() -> None:
    """The device's maps changed while they were gone through."""
    with two_domains() as (_, grantor, grantee):
        device, done = grantee.gntdev, threading.Event()
        indices = [device.map_grant_ref([(grantor.domid, 8)]) for _ in range(200)]

        def come_and_go() -> None:
            while not done.is_set():
                device.unmap_grant_ref(device.map_grant_ref([(grantor.domid, 8)]), 1)

        with running(come_and_go, come_and_go):
            for _ in range(ROUNDS):
                device.set_unmap_notify(indices[-1], clear_byte=True)
            done.set()
