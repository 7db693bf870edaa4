"""What takes back that which a reply gave, when nobody is there to use it: a call that was left, a full table."""

from __future__ import annotations

from collections.abc import Callable

from usermm.hypercalls import grants, pools, ports, store
from usermm.hypercalls.wire import Operation

Request = tuple[Operation, bytes]


def undoing(operation: Operation, payload: bytes, answer: bytes) -> Request | None:
    """The request that undoes `operation`, which had this payload and this answer, once its descriptors are closed.

    None where nothing is left then, or where it cannot be: what was let go, written or revoked stays so.
    """
    undo = _UNDOING.get(operation)
    return None if undo is None else undo(payload, answer)


def _allocate(payload: bytes, answer: bytes) -> Request:
    _, _, count = grants.ALLOCATE.unpack(payload)
    first, _ = grants.ALLOCATED.unpack(answer)
    return Operation.RELEASE, grants.RANGE.pack(first, count, 0)


def _pool(_: bytes, answer: bytes) -> Request:
    first, _ = pools.POOL_MADE.unpack(answer)
    return Operation.RELEASE, grants.RANGE.pack(first, pools.BLOCK, 0)


def _map(_: bytes, answer: bytes) -> Request:
    segments = grants.SEGMENT.iter_unpack(answer[grants.MAPPED.size :])
    return Operation.UNMAPPED, b"".join(grants.HANDLE.pack(handle) for handle, *_ in segments)


def _bind(_: bytes, answer: bytes) -> Request:
    return Operation.PORT_CLOSE, answer[: ports.PORT.size]


def _store(payload: bytes, answer: bytes) -> Request | None:
    kind, _, _ = store.HEADER.unpack_from(payload)
    if kind != store.Type.TRANSACTION_START:
        return None
    (number,) = store.TRANSACTION.unpack(answer)
    return Operation.STORE, store.HEADER.pack(store.Type.TRANSACTION_END, 0, number) + b"F\0"


_UNDOING: dict[Operation, Callable[[bytes, bytes], Request | None]] = {
    Operation.ALLOCATE: _allocate,
    Operation.POOL: _pool,
    Operation.MAP: _map,
    Operation.PORT_UNBOUND: _bind,
    Operation.PORT_INTERDOMAIN: _bind,
    Operation.PORT_VIRQ: _bind,
    Operation.STORE: _store,
}
