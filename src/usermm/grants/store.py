"""`Store`: a small tree of values that domains share, with permissions, transactions and watches, as xenstore has."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    BadReferenceError,
    ClosedError,
    ConflictError,
    DeviceError,
)
from usermm.grants.store_arguments import checked_domid, given_permissions, path_bytes, utf8, value_bytes
from usermm.grants.store_watch import Watch
from usermm.hypercalls import store as layout
from usermm.hypercalls.store import Permission, Type
from usermm.hypercalls.wire import Operation

_LISTING_TRIES = 16
_SHORTEST_PAUSE_S = 0.0001
_LONGEST_PAUSE_S = 0.02

Answer = TypeVar("Answer")


class Caller(Protocol):
    """What is needed of a `Session`."""

    def call(self, operation: Operation, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """The reply's payload and descriptors; raises what the hypervisor refused."""

    def tell(self, operation: Operation, payload: bytes) -> None:
        """A request without a reply; never raises."""

    def say(self, operation: Operation, payload: bytes) -> None:
        """As call where this thread may wait, else as tell; never raises."""


class Nodes:
    """The tree, as everybody sees it or as a transaction does.

    Paths are absolute, or relative to the home of this domain. All methods raise BadReferenceError (EINVAL: no path;
    ENOENT: no such node), PermissionDeniedError (EACCES) and HypervisorGoneError; in a transaction that is lost
    ConflictError (EAGAIN), in one that touches too many paths QuotaError (EDQUOT).
    """

    def __init__(self, session: Caller, transaction: int = 0) -> None:
        self._session = session
        self._number = transaction

    def read(self, path: str) -> bytes:
        """The value of the node."""
        return self._call(Type.READ, path)

    def write(self, path: str, value: bytes | bytearray | memoryview | str) -> None:
        """Sets the value (text as UTF-8), and makes the node and missing directories above it, owned by this domain.

        Raises QuotaError (ENOSPC): the owner has as many nodes as it may have; GrantError (E2BIG): the value is longer
        than `quota_maxsize`.
        """
        self._call(Type.WRITE, path, value_bytes(value))

    def mkdir(self, path: str) -> None:
        """Makes an empty node where there is none. Raises QuotaError (ENOSPC)."""
        self._call(Type.MKDIR, path)

    def remove(self, path: str) -> None:
        """Removes the node and all below. A node that is not there is no error if its directory is.

        For its owner, its directory's, and whom the directory names with "w" or "b", given that on the node, too.
        Raises GrantError (EBUSY) for what the hypervisor keeps: homes, names and the directories that they are in.
        """
        self._call(Type.RM, path)

    def let_go(self, path: str) -> None:
        """As remove(), but it never fails; in a signal handler it is done before this thread's next call."""
        self._session.say(Operation.STORE, _payload(Type.RM, self._number, path_bytes(Type.RM, path) + b"\0"))

    def list(self, path: str) -> list[str]:
        """The names of the node's children, sorted. Raises ConflictError when they kept changing meanwhile."""
        for _ in range(_LISTING_TRIES):
            names = self._list_once(path)
            if names is not None:
                return sorted(names)
        raise ConflictError(errno.EAGAIN, f"list({path}): its names kept changing: do it in a transaction")

    def exists(self, path: str) -> bool:
        """Whether there is such a node. PermissionDeniedError where this domain may not know."""
        try:
            self.permissions(path)
        except BadReferenceError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def permissions(self, path: str) -> list[Permission]:  # type: ignore[valid-type] # the method above hides list
        """The owner first, with what everybody else may; then the exceptions."""
        return [*layout.unpack_permissions(self._call(Type.GET_PERMS, path))]

    def set_permissions(self, path: str, *permissions: tuple[int, str]) -> None:
        """(domid, "n" none, "r" read, "w" write or "b" both): the owner with what everybody else may, then exceptions.

        `set_permissions("door", (3, "n"), (5, "r"))`: domain 3 owns it, domain 5 may read it, nobody else.
        Raises PermissionDeniedError (EACCES): not its owner; (EPERM): it cannot be given away; BadReferenceError
        (ENOENT): a domain that is not there; QuotaError (EDQUOT): too many, (ENOSPC): the new owner has too many nodes.
        """
        self._call(Type.SET_PERMS, path, layout.pack_permissions(given_permissions(permissions)))

    def _list_once(self, path: str) -> Iterable[str] | None:
        names: list[str] = []
        first = None
        while True:
            reply = self._call(Type.DIRECTORY, path, layout.SKIP.pack(len(names)))
            generation, left = layout.LISTING.unpack_from(reply)
            if first not in (None, generation):
                return None
            first = generation
            names += reply[layout.LISTING.size :].decode().split("\0")[:-1]
            if not left:
                return names

    def _call(self, kind: Type, path: str, rest: bytes = b"") -> bytes:
        return self._send(kind, path_bytes(kind, path) + b"\0" + rest)

    def _send(self, kind: Type, data: bytes) -> bytes:
        return _send(self._session, kind, self._number, data)


class Transaction(Nodes):
    """Several calls that happen together or not at all; what others change meanwhile is not seen, but ends it.

    A context manager: commits when the block ends, forgets everything when it raises.
    """

    def commit(self) -> None:
        """Makes it everybody's. Raises ConflictError (EAGAIN): lost, nothing has happened; QuotaError (ENOSPC)."""
        self._end(b"T\0")

    def abort(self) -> None:
        """It has never been. May be called after its end."""
        if self._number:
            self._end(b"F\0")

    @property
    def ended(self) -> bool:
        """Whether it was committed or aborted."""
        return not self._number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(DeviceError):  # the block's own exception says more
                self.abort()
        elif not self.ended:
            self.commit()

    def __del__(self) -> None:
        if getattr(self, "_number", 0):  # it would count for the quota as long as the domain lives
            self._session.tell(Operation.STORE, _payload(Type.TRANSACTION_END, self._number, b"F\0"))

    def _end(self, how: bytes) -> None:
        self._check()
        number, self._number = self._number, 0
        _send(self._session, Type.TRANSACTION_END, number, how)

    def _send(self, kind: Type, data: bytes) -> bytes:
        self._check()
        return super()._send(kind, data)

    def _check(self) -> None:
        if not self._number:
            raise ClosedError(errno.EBADF, "transaction: it has ended: begin a new one")


class Store(Nodes):
    """The store as a domain sees it. Any thread may call."""

    def transaction(self) -> Transaction:
        """Begins one. Raises QuotaError (EDQUOT): `quota_transaction` are open."""
        (number,) = layout.TRANSACTION.unpack(self._send(Type.TRANSACTION_START, b""))
        return Transaction(self._session, number)

    def atomically(self, function: Callable[[Transaction], Answer], *, tries: int = 1000) -> Answer:
        """What `function` returns, called with a transaction that is then committed; again while it is lost.

        Whenever several try, one gets through. Raises ConflictError after `tries` of them, and what `function` raises.
        """
        if not callable(function):
            raise ArgumentTypeError(f"atomically: pass a function of a transaction, not {type(function)!r}")
        if not isinstance(tries, int) or tries < 1:
            raise ArgumentError(f"atomically: tries must be a whole number of at least 1, not {tries!r}")
        for lost in range(tries):
            try:
                with self.transaction() as transaction:
                    return function(transaction)
            except ConflictError:
                if lost + 1 == tries:
                    raise
            # Apart from each other, those who collided do not collide again.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2 ** min(lost, 10))))
        raise AssertionError("the last try returned or raised")

    def watch(self, path: str, token: str = "") -> Watch:
        """Tells of changes to `path` and all below that this domain may read; also of "@introduceDomain" and
        "@releaseDomain". Close it when done.

        Raises GrantError (EEXIST): this domain watches it with this token; QuotaError (EDQUOT): `quota_maxwatch`.
        """
        if not isinstance(token, str):
            raise ArgumentTypeError(f"watch: token must be a str, not {type(token).__name__}")
        payload = path_bytes(Type.WATCH, path) + b"\0" + utf8("watch", token)
        _, (descriptor,) = self._session.call(Operation.WATCH, payload)
        return Watch(descriptor, path, token, lambda: self.is_introduced(0))

    def domain_path(self, domid: int) -> str:
        """The home of a domain, which need not be there: "/local/domain/5"."""
        return self._send(Type.GET_DOMAIN_PATH, layout.DOMAIN.pack(checked_domid(domid))).decode()

    def is_introduced(self, domid: int) -> bool:
        """Whether there is such a domain."""
        return self._send(Type.IS_DOMAIN_INTRODUCED, layout.DOMAIN.pack(checked_domid(domid))) == b"T\0"


def _send(session: Caller, kind: Type, transaction: int, data: bytes) -> bytes:
    return session.call(Operation.STORE, _payload(kind, transaction, data))[0]


def _payload(kind: Type, transaction: int, data: bytes) -> bytes:
    return layout.HEADER.pack(kind, 0, transaction) + data
