"""Memory that other processes and hosts read and write through UCX: ucp_mem_map, and the key that peers need.

UCX keeps a registration cache of its own, and to hear of lost memory it patches munmap and others in libc as soon as
its library is loaded. Below a cache that hears of it from the kernel both are in the way: a library that is loaded here
is loaded with UCX_MEM_EVENTS=n (unless that variable is set), which turns both off for all users of this library in the
process, and a context made here is made with RCACHE_ENABLE=n as well. Make one of your own the same way. Where UCX was
loaded before (UCXX, an MPI), libc is patched already; that costs time and takes nothing from what usermm promises.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Self

from usermm.errors import ArgumentError, ClosedError, DeviceError, ForkedError, LimitError
from usermm.registrars import _ucp
from usermm.registrars.base import Traits


@dataclass(frozen=True, slots=True)
class UcxRegistration:
    """What a peer needs, `remote_key` and an address, and what a local call can use, `memh`."""

    memh: int
    """The ucp_mem_h, for ucp_request_param_t.memh. It dies with the registration."""
    address: int
    length: int
    """In bytes."""
    remote_key: bytes
    """For ucp_ep_rkey_unpack. It holds for the whole range, whatever part of it a peer is told of."""


class UcxMemory:
    """Registers memory with a UCP context; a handle is a `UcxRegistration`.

    `context` is the address of a ucp_context_h that stays yours (UCXX: ``UCXContext.handle``); close the cache before
    it is cleaned up. None: a context for put and get is made here, its address is in `context`, and `close` ends it.
    `library` is the path of libucp where the process has several, or none under its own name; a context must be given
    to the library that made it.

    Any thread may call if the context is shared by threads (mt_workers_shared), as one made here is; see `traits`. In
    a forked child nothing is done to the parent's registrations.

    Raises UnavailableError (no library), DeviceError (UCX made no context), ArgumentError (a context, but no library
    that could have made it).
    """

    def __init__(self, context: int | None = None, *, library: str | None = None) -> None:
        self._pid = os.getpid()
        self._ucp = _ucp.loaded(library, may_load=context is None)
        self._ours = context is None
        self._mapped: set[int] = set()
        self.context = _ucp.created(self._ucp) if context is None else context
        self._traits = Traits(any_thread=_ucp.any_thread(self._ucp, self.context))

    @property
    def traits(self) -> Traits:
        """Overlaps are allowed, at any byte."""
        return self._traits

    def register(self, address: int, length: int) -> UcxRegistration:
        """ucp_mem_map of `length` bytes (at least 1) at `address`, for local and remote reading and writing.

        The key is packed at once, which takes 1.5 us (UCX 1.22): one that was packed later could meet memory that is
        registered no more, in another thread or after the registrar was closed.

        Raises LimitError (UCX has no memory or no resource), DeviceError with EINVAL (it refuses for another reason,
        which is quoted), ClosedError, ForkedError, ArgumentError.
        """
        self._check_usable()
        if length < 1:
            raise ArgumentError(f"ucp_mem_map: {length} bytes at {address:#x}: pass at least 1 byte")
        memh = ctypes.c_void_p()
        parameters = _ucp.MapParameters(field_mask=_ucp.MAP_FIELDS, address=address, length=length)
        status = self._ucp.ucp_mem_map(self.context, ctypes.byref(parameters), ctypes.byref(memh))
        if status < 0 or memh.value is None:
            raise self._refused("ucp_mem_map", status, address, length)
        try:
            key = self._packed(memh.value, address, length)
        except BaseException:
            self._ucp.ucp_mem_unmap(self.context, memh)
            raise
        self._mapped.add(memh.value)
        return UcxRegistration(memh.value, address, length, key)

    def deregister(self, handle: UcxRegistration) -> None:
        """ucp_mem_unmap. Nothing is done for what is not mapped any more, nor in a forked child.

        DeviceError: UCX refused, and says why.
        """
        if os.getpid() != self._pid:
            return
        try:
            self._mapped.remove(handle.memh)  # first: once it is unmapped, UCX may give its number to the next one
        except KeyError:
            return
        status = self._ucp.ucp_mem_unmap(self.context, handle.memh)
        if status < 0:
            raise self._refused("ucp_mem_unmap", status, handle.address, handle.length)

    def close(self) -> None:
        """Unmaps everything; ends the context if it was made here (its workers and endpoints must be gone by then)."""
        if os.getpid() != self._pid or not self.context:
            return
        while self._mapped:
            self._ucp.ucp_mem_unmap(self.context, self._mapped.pop())
        if self._ours:
            self._ucp.ucp_cleanup(self.context)
        self.context = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<usermm.registrars.UcxMemory, {len(self._mapped)} mapped>"

    def _packed(self, memh: int, address: int, length: int) -> bytes:
        buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
        status = self._ucp.ucp_rkey_pack(self.context, memh, ctypes.byref(buffer), ctypes.byref(size))
        if status < 0:
            raise self._refused("ucp_rkey_pack", status, address, length)
        try:
            return ctypes.string_at(buffer, size.value)
        finally:
            self._ucp.ucp_rkey_buffer_release(buffer)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(errno.ECHILD, "ucp_mem_map: the context is the parent's: make a UcxMemory in this child")
        if not self.context:
            raise ClosedError(errno.EBADF, "ucp_mem_map: this UcxMemory is closed: make a new one")

    def _refused(self, call: str, status: int, address: int, length: int) -> DeviceError:
        what = f"{call}: {length} bytes at {address:#x}: {_ucp.reason(self._ucp, status)}"
        if status in _ucp.NO_RESOURCES:
            return LimitError(errno.ENOMEM, f"{what}; deregister some memory, or raise ulimit -l")
        return DeviceError(errno.EINVAL, f"{what}; is it memory of this process?")
