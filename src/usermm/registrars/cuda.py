"""Host memory that GPUs copy from and to at full speed, or reach themselves: cudaHostRegister.

CUDA refuses to register bytes twice (cudaErrorHostMemoryAlreadyRegistered), whoever registered them first. It pins
whole pages. The manual of CUDA 4.0 asked for whole pages ("must be aligned to the host page size"); later ones do not,
and drivers compare the very bytes, so that two buffers in one page can be registered one by one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from usermm.errors import ArgumentError, DeviceError, ForkedError, LimitError, OverlapError, UnavailableError
from usermm.registrars.base import PAGE_BYTES, Overlap, Traits

# The registration is gone already: by somebody else's hand, with its context, or because the process ends.
_GONE = {
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_INVALID_CONTEXT",
    "cudaErrorContextIsDestroyed",
    "cudaErrorCudartUnloading",
    "cudaErrorHostMemoryNotRegistered",
}


@dataclass(frozen=True, slots=True)
class HostRegistration:
    """Bytes [address, address + length) of the host, as a GPU may address them."""

    address: int
    length: int
    device_pointer: int | None
    """Where the registrar's device finds `address`; None if the memory was not to be mapped."""


class Cuda:
    """Registers host memory with CUDA; a handle is a `HostRegistration`.

    `device` is the number of a GPU, by default the one that is current in this thread. Its primary context, the one
    that the CUDA runtime and torch use, is retained; whatever thread calls later, its own current device stays as it
    is. `portable`: all contexts take the memory for pinned. `mapped`: GPUs can address it. `read_only`: GPUs only read
    it, and memory that this process may not write can be registered (cudaDevAttrHostRegisterReadOnlySupported).

    `granularity_bytes`: with whole pages (the default) a cache's max_bytes is what is really pinned. Take 1 if small
    buffers that share a page are in use at the same time: at a page's granularity they overlap, which is refused.

    A forked child can use no CUDA that its parent used: nothing is done there.

    Raises UnavailableError (cuda-bindings, the driver or a GPU is missing), LimitError, DeviceError (the context).
    """

    def __init__(
        self,
        device: int | None = None,
        *,
        portable: bool = True,
        mapped: bool = True,
        read_only: bool = False,
        granularity_bytes: int = PAGE_BYTES,
    ) -> None:
        self._pid = os.getpid()
        self._runtime, self._driver = _bindings()
        self._mapped = mapped
        self._flags = _flags(self._runtime, portable, mapped, read_only)
        self._traits = Traits(overlap=Overlap.REFUSED, granularity_bytes=granularity_bytes, writes=not read_only)
        self.device = self._checked_device(device)
        self._context = self._drive("cuDevicePrimaryCtxRetain", self._drive("cuDeviceGet", self.device))

    @property
    def traits(self) -> Traits:
        """Overlaps are refused."""
        return self._traits

    def register(self, address: int, length: int) -> HostRegistration:
        """cudaHostRegister of `length` bytes (at least 1) at `address`.

        Raises OverlapError (part of it is registered already, maybe by another library), LimitError (CUDA cannot pin
        more), DeviceError with EINVAL (it refuses for another reason, which is quoted), ForkedError, ArgumentError.
        """
        if os.getpid() != self._pid:
            raise ForkedError(errno.ECHILD, "cudaHostRegister: CUDA does not survive fork: start this process by spawn")
        if length < 1:
            raise ArgumentError(f"cudaHostRegister: {length} bytes at {address:#x}: pass at least 1 byte")
        with self._in_context():
            _, result = self._tried("cudaHostRegister", address, length, self._flags)
            if result.value != 0:
                raise self._refused("cudaHostRegister", result, address, length)
            pointer = self._device_pointer(address, length) if self._mapped else None
        return HostRegistration(address, length, pointer)

    def deregister(self, handle: HostRegistration) -> None:
        """cudaHostUnregister. Nothing is done for what is not registered any more, nor in a forked child.

        DeviceError: CUDA refused, and says why.
        """
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(_GoneError), self._in_context():
            _, result = self._tried("cudaHostUnregister", handle.address)
            if result.value != 0 and result.name not in _GONE:
                raise self._refused("cudaHostUnregister", result, handle.address, handle.length)

    def __repr__(self) -> str:
        return f"<usermm.registrars.Cuda, device {self.device}>"

    def _checked_device(self, device: int | None) -> int:
        count = int(_asked(self._runtime, "cudaGetDeviceCount"))
        if device is None:
            return int(_asked(self._runtime, "cudaGetDevice"))
        if not 0 <= device < count:
            raise ArgumentError(f"Cuda: there is no device {device}: pass a number below {count}")
        return device

    def _device_pointer(self, address: int, length: int) -> int:
        pointer, result = self._tried("cudaHostGetDevicePointer", address, 0)
        if result.value != 0:
            self._runtime.cudaHostUnregister(address)
            raise self._refused("cudaHostGetDevicePointer", result, address, length)
        return int(pointer)

    @contextlib.contextmanager
    def _in_context(self) -> Iterator[None]:
        """Not by cudaSetDevice: to go back to a device that is not in use would make a (large) context there."""
        self._drive("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._drive("cuCtxPopCurrent")

    def _drive(self, call: str, *arguments: object) -> Any:
        """A call of the driver's API. DeviceError quotes it, LimitError if there is no memory."""
        result, *answers = getattr(self._driver, call)(*arguments)
        if result.value == 0:
            return answers[0] if answers else None
        text = f"Cuda: {call}: {result.name}: see what nvidia-smi says of device {self.device}"
        if result.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise LimitError(errno.ENOMEM, text)
        raise (_GoneError if result.name in _GONE else DeviceError)(errno.EIO, text)

    def _tried(self, call: str, *arguments: object) -> tuple[Any, Any]:
        """A call of the runtime: its answer, and its cudaError_t."""
        result, *answers = getattr(self._runtime, call)(*arguments)
        if result.value != 0:
            self._runtime.cudaGetLastError()  # or the next one who asks takes it for his own
        return answers[0] if answers else None, result

    def _refused(self, call: str, result: Any, address: int, length: int) -> DeviceError:
        what = f"{call}: {length} bytes at {address:#x}: {_text(self._runtime, result)}"
        if result.name == "cudaErrorHostMemoryAlreadyRegistered":
            step = "release it there first (another cache, torch's pin_memory)"
            return OverlapError(errno.EADDRINUSE, f"{what}; {step}")
        if result.name == "cudaErrorMemoryAllocation":
            return LimitError(errno.ENOMEM, f"{what}; deregister some memory first")
        return DeviceError(errno.EINVAL, f"{what}; is it plain memory of this process?")


class _GoneError(DeviceError):
    """The context has ended, and its registrations with it."""


def _bindings() -> tuple[Any, Any]:
    """cuda.bindings.runtime and .driver, which are not imported before somebody makes a registrar."""
    try:
        from cuda.bindings import driver, runtime  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise UnavailableError(errno.ENOSYS, "Cuda: cuda-bindings is missing: pip install usermm[cuda]") from None
    return runtime, driver


def _asked(runtime: Any, call: str) -> Any:
    """What is asked before anything else, and answered with what is missing."""
    try:
        result, answer = getattr(runtime, call)()
    except RuntimeError as error:  # what older cuda-bindings do when there is no driver
        raise UnavailableError(errno.ENODEV, f"Cuda: {error}: install NVIDIA's driver") from None
    if result.value != 0:
        step = "a GPU and NVIDIA's driver, not older than cuda-bindings, are needed: nvidia-smi lists them"
        raise UnavailableError(errno.ENODEV, f"Cuda: {call}: {_text(runtime, result)}: {step}")
    return answer


def _text(runtime: Any, result: Any) -> str:
    return f"{runtime.cudaGetErrorString(result)[1].decode()} ({result.name})"


def _flags(runtime: Any, portable: bool, mapped: bool, read_only: bool) -> int:
    portable_bit = runtime.cudaHostRegisterPortable if portable else 0
    mapped_bit = runtime.cudaHostRegisterMapped if mapped else 0
    return int(portable_bit | mapped_bit | (runtime.cudaHostRegisterReadOnly if read_only else 0))
