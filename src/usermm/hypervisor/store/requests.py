"""STORE's payloads taken apart, carried out and answered, by type."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Type
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.store import operations, paths
from usermm.hypervisor.store.nodes import Presence
from usermm.hypervisor.store.operations import Act
from usermm.hypervisor.store.transactions import Transactions
from usermm.hypervisor.store.tree import Tree
from usermm.hypervisor.store.watches import Watches

_YES, _NO = b"T\0", b"F\0"


@dataclass(frozen=True, slots=True)
class Parts:
    """What requests work on."""

    tree: Tree
    presence: Presence
    transactions: Transactions
    watches: Watches
    chores: Chores


@dataclass(frozen=True, slots=True)
class Request:
    """One payload without its header."""

    parts: Parts
    domain: DomainRecord
    kind: Type
    transaction: int
    data: bytes

    def act(self, raw: bytes) -> Act:
        """What the request does to the path `raw`, in its transaction if it has one."""
        parts, call = self.parts, self.kind.call
        view = parts.transactions.get(self.domain, self.transaction) if self.transaction else parts.tree
        path = paths.resolve(raw, layout.home(self.domain.domid), self.domain.quotas.quota_pathmax, call)
        return Act(view, parts.presence, self.domain, call, path)

    def split(self) -> tuple[Act, bytes]:
        """A path and what follows its NUL byte."""
        raw, nul, rest = self.data.partition(b"\0")
        if not nul:
            raise self.malformed("a path ends with a NUL byte")
        return self.act(raw), rest

    def only_path(self) -> Act:
        """A path and nothing more."""
        act, rest = self.split()
        if rest:
            raise self.malformed("something follows the path")
        return act

    def malformed(self, why: str) -> Refused:
        """Not the layout of this type."""
        return Refused(errno.EINVAL, f"{self.kind.call}: {why}: see docs/hypercalls.md")


def answer(parts: Parts, domain: DomainRecord, payload: memoryview) -> bytes:
    """The reply's payload. Raises Refused, and struct.error for a payload that is too short."""
    number, reserved, transaction = layout.HEADER.unpack_from(payload)
    handler = _HANDLERS.get(number)
    if handler is None:
        raise Refused(errno.ENOSYS, f"store: type {number} is not one that can be asked for")
    request = Request(parts, domain, Type(number), transaction, bytes(payload[layout.HEADER.size :]))
    if reserved:
        raise request.malformed(f"the reserved field is {reserved}, not 0")
    return handler(request)


def _directory(request: Request) -> bytes:
    act, rest = request.split()
    (skip,) = layout.SKIP.unpack(rest)
    names, generation = operations.listing(act)
    room = layout.LONGEST_ANSWER_BYTES - layout.LISTING.size
    given = []
    for name in names[skip:]:
        room -= len(name) + 1
        if room < 0:
            break
        given.append(name.encode() + b"\0")
    left = max(0, len(names) - skip - len(given))
    return layout.LISTING.pack(generation, left) + b"".join(given)


def _read(request: Request) -> bytes:
    return operations.read(request.only_path())


def _get_permissions(request: Request) -> bytes:
    return layout.pack_permissions(operations.permissions(request.only_path()))


def _write(request: Request) -> bytes:
    act, value = request.split()
    operations.write(act, value)
    return b""


def _mkdir(request: Request) -> bytes:
    operations.mkdir(request.only_path())
    return b""


def _remove(request: Request) -> bytes:
    steps = operations.removal(request.only_path())
    if request.transaction:
        for _ in steps:
            pass
    else:
        request.parts.chores.add(steps)
    return b""


def _set_permissions(request: Request) -> bytes:
    act, rest = request.split()
    try:
        wanted = layout.unpack_permissions(rest)
    except ValueError as error:
        raise act.refused(errno.EINVAL, str(error)) from None
    operations.set_permissions(act, wanted)
    return b""


def _unwatch(request: Request) -> bytes:
    raw, _, token = request.data.partition(b"\0")
    domain = request.domain
    home, longest = layout.home(domain.domid), domain.quotas.quota_pathmax
    path = paths.resolve_watched(raw, home, longest, "unwatch")
    request.parts.watches.remove(domain.domid, path, token)
    return b""


def _start(request: Request) -> bytes:
    if request.transaction:
        raise Refused(errno.EBUSY, "transaction: there are none within another: end this one first")
    if request.data:
        raise request.malformed("nothing follows the header")
    return layout.TRANSACTION.pack(request.parts.transactions.start(request.domain))


def _end(request: Request) -> bytes:
    if request.data not in (_YES, _NO):
        raise request.malformed("T commits, F forgets")
    request.parts.transactions.finish(request.domain, request.transaction, commit=request.data == _YES)
    return b""


def _domain_path(request: Request) -> bytes:
    return layout.home(*layout.DOMAIN.unpack(request.data)).encode()


def _is_introduced(request: Request) -> bytes:
    return _YES if request.parts.presence.here(*layout.DOMAIN.unpack(request.data)) else _NO


_HANDLERS: dict[int, Callable[[Request], bytes]] = {
    Type.DIRECTORY: _directory,
    Type.READ: _read,
    Type.GET_PERMS: _get_permissions,
    Type.UNWATCH: _unwatch,
    Type.TRANSACTION_START: _start,
    Type.TRANSACTION_END: _end,
    Type.GET_DOMAIN_PATH: _domain_path,
    Type.WRITE: _write,
    Type.MKDIR: _mkdir,
    Type.RM: _remove,
    Type.SET_PERMS: _set_permissions,
    Type.IS_DOMAIN_INTRODUCED: _is_introduced,
}
