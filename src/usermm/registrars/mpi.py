"""Memory that the other ranks of an MPI program read and write: a dynamic window, and what is attached to it.

MPI 4.1 (12.2.4, Window of Dynamically Attached Memory) forbids attaching memory that overlaps what is attached, and
detaching what is not. MPICH checks neither, so the account of what is attached is kept here. Attaching is local: no
other rank has to take part, and none is told; peers learn of it by whatever message carries the `Attachment`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

from usermm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    DeviceError,
    ForkedError,
    LimitError,
    OverlapError,
    UnavailableError,
)
from usermm.registrars.base import Overlap, Traits


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a peer needs to read or write attached memory: small, and made to be sent (it can be pickled).

    The displacement counts bytes from MPI_BOTTOM of the rank that attached, and every target of a dynamic window takes
    it: ``window.Get([data, MPI.BYTE], owner, (attachment.displacement, attachment.length, MPI.BYTE))``.
    """

    displacement: int
    length: int
    """In bytes."""

    def part(self, offset: int, length: int) -> Attachment:
        """`length` bytes (at least 1) from byte `offset` on, so that a peer is shown no more than it is meant to use.

        A registration can be longer than the buffer that was asked for; the buffer is
        ``registration.handle.part(address - registration.address, length)``. Raises ArgumentError.
        """
        if offset < 0 or length < 1 or offset + length > self.length:
            raise ArgumentError(f"Attachment.part: {length} bytes at {offset} are not inside {self.length} bytes")
        return Attachment(self.displacement + offset, length)


class MpiWindow:
    """Registers memory by attaching it to a dynamic window; a handle is an `Attachment`.

    `window_or_comm` is a window from ``MPI.Win.Create_dynamic``, which stays the caller's, or an intracommunicator:
    then a window is made here (collective over its ranks), is found in `window`, and `close` frees it. Once MPI was
    finalized or that window object was freed, nothing is attached any more and deregistering does nothing.

    Raises UnavailableError (mpi4py or the MPI library is missing, or MPI does not run), ArgumentError (a window of
    another flavor; too low a level of threads for this one), ArgumentTypeError, ClosedError (a freed window).
    """

    def __init__(self, window_or_comm: Any) -> None:
        self._mpi = _running_mpi()
        self._pid = os.getpid()
        # A deallocator or a signal handler can come back here while its own thread is inside. So the lock, which keeps
        # two threads from entering memory that overlaps, can be taken twice, and nobody needs it to leave.
        self._lock = threading.RLock()
        self._starts: list[int] = []  # sorted, of what is attached
        self._attached: dict[int, tuple[int, Any]] = {}  # start: end, and what mpi4py calls the memory
        self._traits = Traits(overlap=Overlap.REFUSED, any_thread=_any_thread(self._mpi))
        self._ours = not isinstance(window_or_comm, self._mpi.Win)
        self.window = self._create(window_or_comm) if self._ours else _dynamic(self._mpi, window_or_comm)

    @property
    def traits(self) -> Traits:
        """Overlaps are refused; any thread may call if MPI was initialized with MPI_THREAD_MULTIPLE."""
        return self._traits

    @property
    def attached(self) -> list[tuple[int, int]]:
        """[start, end) of what is attached now, in order of displacements. Freeing the window empties it."""
        return sorted((start, end) for start, (end, _) in self._attached.copy().items()) if self._alive() else []

    def register(self, address: int, length: int) -> Attachment:
        """Attach `length` bytes (at least 1) at `address`.

        Raises OverlapError (part of it is attached already), LimitError (MPI ran out of resources), DeviceError with
        EINVAL (MPI refuses it for another reason, which is quoted), ClosedError, ForkedError, ArgumentError.
        """
        self._require_alive()
        if length < 1:
            raise ArgumentError(f"MPI_Win_attach: {length} bytes at {address:#x}: pass at least 1 byte")
        memory = self._mpi.memory.fromaddress(address, length)
        attachment = Attachment(self._mpi.Get_address(memory), length)
        self._enter(attachment, memory)
        try:
            self.window.Attach(memory)
        except BaseException as error:
            self._leave(attachment.displacement)
            if isinstance(error, self._mpi.Exception):
                raise self._refused(error, address, length) from None
            raise
        return attachment

    def deregister(self, handle: Attachment) -> None:
        """Detach it. Nothing is done for what is not attached any more, nor in a forked child."""
        end, memory = self._attached.get(handle.displacement, (0, None))
        if end != handle.displacement + handle.length or not self._alive():
            return
        with contextlib.suppress(self._mpi.Exception):  # a window freed through another object: detached all the same
            self.window.Detach(memory)
        self._leave(handle.displacement)  # last, so that nobody attaches it again before it was detached

    def close(self) -> None:
        """Free the window if it was made here, which every rank has to do, and which detaches everything."""
        if self._ours and self._alive():
            self.window.Free()

    def __repr__(self) -> str:
        return f"<usermm.registrars.MpiWindow, {len(self._starts)} attached>"

    def _create(self, comm: Any) -> Any:
        if not isinstance(comm, self._mpi.Intracomm):
            kind = type(comm).__name__
            raise ArgumentTypeError(f"MpiWindow: a dynamic window or an intracommunicator is needed, not {kind}")
        if comm == self._mpi.COMM_NULL:
            raise ArgumentError("MpiWindow: MPI.COMM_NULL has no ranks: pass MPI.COMM_WORLD, or a window")
        return self._mpi.Win.Create_dynamic(comm=comm)

    def _alive(self) -> bool:
        """Asked before each call: MPICH ends the process when it is called after MPI_Finalize."""
        return os.getpid() == self._pid and not self._mpi.Is_finalized() and bool(self.window)

    def _require_alive(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(errno.ECHILD, "MPI_Win_attach: MPI runs in the parent process only: register there")
        if not self._alive():
            reason = "MPI was finalized" if self._mpi.Is_finalized() else "the window was freed: make a new MpiWindow"
            raise ClosedError(errno.EBADF, f"MPI_Win_attach: {reason}")

    def _enter(self, attachment: Attachment, memory: Any) -> None:
        start = attachment.displacement
        end = start + attachment.length
        with self._lock:
            index = bisect_left(self._starts, end)  # the first that begins behind it; only the one before can overlap
            for other in self._starts[max(index - 1, 0) : index]:
                other_end = self._attached.get(other, (other, None))[0]
                if other < end and start < other_end:
                    what = f"{attachment.length} bytes at {start:#x} overlap the {other_end - other} at {other:#x}"
                    raise OverlapError(errno.EADDRINUSE, f"MPI_Win_attach: {what}: deregister those first")
            self._attached[start] = end, memory
            insort(self._starts, start)

    def _leave(self, start: int) -> None:
        if self._attached.pop(start, None):
            with contextlib.suppress(ValueError):
                self._starts.remove(start)  # by value and in one step: an index can be wrong by the time it is used

    def _refused(self, error: Any, address: int, length: int) -> DeviceError:
        what = f"MPI_Win_attach: {length} bytes at {address:#x}: {error.Get_error_string()}"
        if error.Get_error_class() in (self._mpi.ERR_NO_MEM, self._mpi.ERR_RMA_ATTACH):
            return LimitError(errno.ENOMEM, f"{what}; deregister some memory first")
        return DeviceError(errno.EINVAL, f"{what}; is it memory of this process?")


def _running_mpi() -> Any:
    """The module mpi4py.MPI, which is not imported before somebody makes a window."""
    try:
        from mpi4py import MPI  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UnavailableError(errno.ENOSYS, "MpiWindow: mpi4py is missing: pip install usermm[mpi]") from None
    except RuntimeError as error:
        step = "install an MPI library (pip install usermm[mpi] brings MPICH)"
        raise UnavailableError(errno.ENOSYS, f"MpiWindow: mpi4py finds no MPI library: {error}; {step}") from None
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise UnavailableError(errno.ENOSYS, "MpiWindow: MPI does not run: call it between MPI_Init and MPI_Finalize")
    return MPI


def _any_thread(mpi: Any) -> bool:
    """Whether MPI may be called from several threads at once; below that it must at least be callable from this one."""
    level = mpi.Query_thread()
    if level < mpi.THREAD_SERIALIZED and not mpi.Is_thread_main():
        step = "make it in the thread that initialized MPI, or initialize MPI with MPI_THREAD_MULTIPLE"
        raise ArgumentError(f"MpiWindow: MPI may only be called from its main thread here: {step}")
    return bool(level == mpi.THREAD_MULTIPLE)


def _dynamic(mpi: Any, window: Any) -> Any:
    if window == mpi.WIN_NULL:
        raise ClosedError(errno.EBADF, "MpiWindow: the window was freed: pass a new one, or a communicator")
    if window.flavor != mpi.WIN_FLAVOR_DYNAMIC:
        raise ArgumentError("MpiWindow: memory cannot be attached to this window: make it by MPI.Win.Create_dynamic")
    return window
