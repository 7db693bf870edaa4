"""The other side of a registration with UCX: a worker, an endpoint, and one-sided reads and writes through its key.

Only as much of ucp.h as a test needs. Run as a program it is such a side in a process of its own; see `main`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

_INPROGRESS = 1
_PATIENCE_S = 30.0
_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ucp_worker_create": (ctypes.c_int8, [_POINTER] * 3),
    "ucp_worker_get_address": (ctypes.c_int8, [_POINTER] * 3),
    "ucp_worker_release_address": (None, [_POINTER] * 2),
    "ucp_worker_progress": (ctypes.c_uint, [_POINTER]),
    "ucp_worker_destroy": (None, [_POINTER]),
    "ucp_ep_create": (ctypes.c_int8, [_POINTER] * 3),
    "ucp_ep_rkey_unpack": (ctypes.c_int8, [_POINTER] * 3),
    "ucp_rkey_destroy": (None, [_POINTER]),
    "ucp_put_nbx": (_POINTER, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_uint64, _POINTER, _POINTER]),
    "ucp_get_nbx": (_POINTER, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_uint64, _POINTER, _POINTER]),
    "ucp_ep_flush_nbx": (_POINTER, [_POINTER] * 2),
    "ucp_ep_close_nbx": (_POINTER, [_POINTER] * 2),
    "ucp_request_check_status": (ctypes.c_int8, [_POINTER]),
    "ucp_request_free": (None, [_POINTER]),
}


class Worker:
    """One worker on a context, for one thread. Call `progress` while the other side works."""

    def __init__(self, ucp: ctypes.CDLL, context: int) -> None:
        for name, (result, arguments) in _FUNCTIONS.items():
            getattr(ucp, name).restype, getattr(ucp, name).argtypes = result, arguments
        self.ucp = ucp
        self.worker = ctypes.c_void_p()
        _check(ucp.ucp_worker_create(context, _zeros(), ctypes.byref(self.worker)))

    def address(self) -> bytes:
        address, size = ctypes.c_void_p(), ctypes.c_size_t()
        _check(self.ucp.ucp_worker_get_address(self.worker, ctypes.byref(address), ctypes.byref(size)))
        found = ctypes.string_at(address, size.value)
        self.ucp.ucp_worker_release_address(self.worker, address)
        return found

    def progress(self) -> None:
        self.ucp.ucp_worker_progress(self.worker)

    def close(self) -> None:
        self.ucp.ucp_worker_destroy(self.worker)


class Peer:
    """An endpoint of `worker` to the worker at `address`; `others` are pushed on while it waits."""

    def __init__(self, worker: Worker, address: bytes, others: Iterable[Worker] = ()) -> None:
        self.worker, self.others, self.ucp = worker, tuple(others), worker.ucp
        self._address = ctypes.create_string_buffer(address, len(address))
        self._nothing = _zeros()
        parameters = (ctypes.c_uint64 * 32)(1, ctypes.addressof(self._address))  # field_mask: address
        self.endpoint = ctypes.c_void_p()
        _check(self.ucp.ucp_ep_create(worker.worker, parameters, ctypes.byref(self.endpoint)))

    def put(self, key: bytes, address: int, data: bytes) -> None:
        """Writes `data` at `address` of the other side, and waits until it is there."""
        self._one_sided(self.ucp.ucp_put_nbx, key, address, ctypes.create_string_buffer(data, len(data)))

    def get(self, key: bytes, address: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        self._one_sided(self.ucp.ucp_get_nbx, key, address, buffer)
        return buffer.raw

    def close(self) -> None:
        self._wait(self.ucp.ucp_ep_close_nbx(self.endpoint, self._nothing))

    def _one_sided(self, call: Callable[..., Any], key: bytes, address: int, buffer: Any) -> None:
        packed, remote_key = ctypes.create_string_buffer(key, len(key)), ctypes.c_void_p()
        _check(self.ucp.ucp_ep_rkey_unpack(self.endpoint, packed, ctypes.byref(remote_key)))
        try:
            self._wait(call(self.endpoint, buffer, len(buffer), address, remote_key, self._nothing))
            self._wait(self.ucp.ucp_ep_flush_nbx(self.endpoint, self._nothing))
        finally:
            self.ucp.ucp_rkey_destroy(remote_key)

    def _wait(self, request: int | None) -> None:
        if not request:
            return
        if request >= (1 << 64) - 100:  # a ucs_status_t in a pointer's clothes
            _check(request - (1 << 64))
        until = time.monotonic() + _PATIENCE_S
        while (status := self.ucp.ucp_request_check_status(request)) == _INPROGRESS:
            assert time.monotonic() < until, "the other side does not answer"
            for worker in (self.worker, *self.others):
                worker.progress()
        self.ucp.ucp_request_free(request)
        _check(status)


def _check(status: int) -> None:
    assert status >= 0, f"UCX answered {status}"


def _zeros() -> Any:
    """Parameters of which none is given."""
    return (ctypes.c_uint64 * 32)()


def main() -> None:
    """One line comes in: whom to write to. One line goes out when it is written, with what was there before."""
    from usermm.registrars import UcxMemory

    told = json.loads(sys.stdin.readline())
    with UcxMemory() as registrar:
        worker = Worker(registrar._ucp, registrar.context)
        peer = Peer(worker, bytes.fromhex(told["worker"]))
        key, data = bytes.fromhex(told["key"]), bytes.fromhex(told["data"])
        before = peer.get(key, told["address"], len(data))
        peer.put(key, told["address"], data)
        sys.stdout.write(before.hex() + "\n")
        sys.stdout.flush()
        sys.stdin.readline()  # the other side goes first
        peer.close()
        worker.close()


if __name__ == "__main__":
    main()
