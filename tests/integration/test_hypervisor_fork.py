"""A process with a hypervisor in it forks: the child has nothing of the hypervisor's, and can do it no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.hypervisors import socket_folder, wait_until
from support.processes import fork, in_child
from support.threads import alarm

from usermm.errors import HypervisorGoneError
from usermm.grants import session
from usermm.grants.domain import Domain
from usermm.hypervisor.embedded import Hypervisor

LIMIT_S = 5
GRANTOR, GRANTEE = 31, 32


@pytest.fixture
def path() -> Iterator[Path]:
    with socket_folder() as folder:
        yield folder / "s"


def of_the_hypervisor() -> list[str]:
    """What this process has open that a hypervisor would."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            where = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if where.startswith(("/memfd:usermm", "anon_inode:inotify", "anon_inode:[pidfd]")) or where.endswith(".lock"):
            found.append(where)
    return found


def test_child_has_none_of_its_descriptors(path: Path) -> None:
    with Hypervisor(str(path)) as hypervisor, Domain(str(path), domid=GRANTOR) as grantor:
        with closing(grantor.gntalloc.allocate(GRANTEE, 2)), grantor.store.watch("name"):
            assert len(of_the_hypervisor()) >= 4
            assert in_child(of_the_hypervisor) == []
            assert in_child(hypervisor.close) is None
        assert grantor.store.read("name")
    assert not path.exists()


def test_child_that_closes_it_takes_nothing_from_the_parent(path: Path) -> None:
    """Neither the socket's file, nor the lock on its name, nor anybody's connection."""
    with Hypervisor(str(path)) as hypervisor:
        with Domain(str(path)) as domain:
            in_child(hypervisor.close)
            assert path.exists()
            with pytest.raises(Exception, match="has this socket"):
                Hypervisor(str(path))
            domain.store.write("a", b"b")
        session.status(str(path))


def test_domains_hear_of_the_end_although_a_child_lives(path: Path) -> None:
    """The process is killed; a child that it forked before sleeps on, and has no copy of a connection."""
    read_end, write_end = os.pipe()
    server = fork()
    if server == 0:
        hypervisor = Hypervisor(str(path))
        child = -1
        with Domain(str(path)):
            os.write(write_end, b"1")
            while not child > 0:
                time.sleep(0.05)
                if len(session.status(str(path))["domains"]) == 2:
                    child = os.fork()
        os.write(write_end, b"%8d" % child)
        if child:
            time.sleep(20)
        assert hypervisor
        time.sleep(20)
        os._exit(0)
    child = 0
    try:
        assert os.read(read_end, 1) == b"1"
        with Domain(str(path)) as domain:
            child = max(int(os.read(read_end, 8)), int(os.read(read_end, 8)))
            domain.store.read("name")
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            with alarm(lambda *_: pytest.fail("nobody tells"), LIMIT_S):
                with pytest.raises(HypervisorGoneError):
                    domain.store.read("name")
                with pytest.raises(HypervisorGoneError):
                    Domain(str(path))
    finally:
        if child > 0:
            os.kill(child, signal.SIGKILL)  # not ours to wait for
        os.close(read_end)
        os.close(write_end)


def share_for_ever(path: Path) -> None:
    """A process of two domains, which connects as soon as a hypervisor listens."""
    grantor = None
    while grantor is None:
        with contextlib.suppress(HypervisorGoneError):  # not there, or not listening yet
            grantor = Domain(str(path), domid=GRANTOR)
    grantee = Domain(str(path), domid=GRANTEE)
    while True:
        with closing(grantor.gntalloc.allocate(GRANTEE, 2, writable=True)) as pages:
            grantee.gntdev.map(GRANTOR, pages.references, writable=True).close()


def test_no_grant_stays_mapped_by_a_fork_in_the_midst(path: Path) -> None:
    """Children are forked while descriptors are on their way to a domain. They live, and keep nothing."""
    children = [fork()]
    if not children[0]:
        try:
            share_for_ever(path)
        finally:
            os._exit(1)  # or the test would go on here, too
    try:
        with Hypervisor(str(path)):
            wait_until(lambda: any(grant["mapped_by"] for grant in session.status(str(path))["grants"]), LIMIT_S)
            for _ in range(30):
                child = fork()
                if child == 0:
                    time.sleep(20)
                    os._exit(0)
                children.append(child)
            end(children.pop(0))
            wait_until(lambda: not session.status(str(path))["grants"], LIMIT_S)
    finally:
        for child in children:
            end(child)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
