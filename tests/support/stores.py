"""The hypervisor's store and the domains' own side of it in one thread, without sockets between them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Iterator
from typing import Any

from usermm.errors import DeviceError, grant_refused
from usermm.grants.store import Store
from usermm.hypercalls.wire import LONGEST_REPLY_BYTES, LONGEST_REQUEST_BYTES, Operation
from usermm.hypervisor import calls
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.quotas import Quotas
from usermm.hypervisor.store import service


class Wires:
    """Stands for a session: the request is carried out at once."""

    def __init__(self, store: service.Store, record: DomainRecord) -> None:
        self.store = store
        self.record = record

    def call(self, operation: Operation, payload: bytes = b"") -> tuple[bytes, list[int]]:
        assert len(payload) + 8 <= LONGEST_REQUEST_BYTES
        handler = self.store.request if operation == Operation.STORE else self.store.watch
        try:
            reply = handler(self.record, memoryview(payload))
        except calls.Refused as refused:
            assert "\n" not in refused.reason
            raise grant_refused(refused.errno, refused.reason) from None
        assert len(reply.payload) + 8 <= LONGEST_REPLY_BYTES
        return reply.payload, list(reply.descriptors)

    def tell(self, operation: Operation, payload: bytes) -> None:
        with contextlib.suppress(OSError):
            self.call(operation, payload)

    say = tell


def failing(error: Exception) -> None:
    raise AssertionError("a chore failed") from error


class World:
    """A store, the domains in it, and what stands for the loop: `turn` calls back who can write."""

    def __init__(self) -> None:
        self.writers: dict[int, Callable[[], None]] = {}
        at_once = lambda call: call()  # noqa: E731 - also what is long
        self.store = service.Store(self._when_writable, self._forget, Chores(at_once, failing))
        self.records: dict[int, DomainRecord] = {}

    def arrive(self, domid: int, *, control: bool = False, name: str | None = None, **quotas: Any) -> Store:
        """A domain comes; returns its side of the store."""
        identity = domid + 1000
        name = f"dom{domid}" if name is None else name
        record = DomainRecord(domid, name, identity, identity, os.getpid(), control, Quotas(**quotas))
        self.records[domid] = record
        self.store.domain_arrived(record)
        return Store(Wires(self.store, record))

    def leave(self, domid: int) -> None:
        self.store.domain_gone(self.records.pop(domid))

    def raw(self, domid: int, payload: bytes) -> bytes:
        """A payload of STORE as it is."""
        return Wires(self.store, self.records[domid]).call(Operation.STORE, payload)[0]

    def turn(self) -> None:
        """One round of a loop."""
        poll = select.poll()
        for descriptor in self.writers:
            poll.register(descriptor, select.POLLOUT)
        for descriptor, _ in poll.poll(0):
            self.writers[descriptor]()

    def close(self) -> None:
        self.store.close()
        assert not self.writers

    def _when_writable(self, descriptor: int, callback: Callable[[], None]) -> None:
        assert descriptor not in self.writers
        self.writers[descriptor] = callback

    def _forget(self, descriptor: int) -> None:
        os.fstat(descriptor)  # it is still open
        del self.writers[descriptor]


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """What is inside must raise a DeviceError with this errno."""
    try:
        yield
    except DeviceError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(f"nothing was raised: {errno.errorcode[number]} was expected")


@contextlib.contextmanager
def world() -> Iterator[World]:
    here = World()
    try:
        yield here
    finally:
        here.close()
