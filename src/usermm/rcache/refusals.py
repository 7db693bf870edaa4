"""What it means when the C half refuses a get: one line that names the call, the memory and the next step."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from usermm import _core
from usermm.errors import ArgumentError, LimitError, OverlapError, RegistrationError, refused
from usermm.ummunotify import memory

_ADDRESS_LIMIT = (1 << 63) - 1  # the upper half belongs to the kernel on every architecture


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cache was made with."""

    max_bytes: int | None
    max_count: int | None
    max_length_bytes: int | None
    granularity_bytes: int
    accept_file_memory: bool

    def rounded(self, address: int, length: int) -> int:
        """How many bytes are registered for it, unless it is merged with others."""
        granularity = self.granularity_bytes
        return -(-(address + length) // granularity) * granularity - address // granularity * granularity

    def refusal(self, address: int, length: int) -> str | None:
        """Why this memory can never be registered, whatever room there is; None: it can."""
        rounded = self.rounded(address, length)
        if address + length > _ADDRESS_LIMIT:
            return "that is no range of addresses of a process: pass a live buffer"
        if self.max_length_bytes is not None and rounded > self.max_length_bytes:
            return f"the device takes {self.max_length_bytes} bytes at most; rounded it is {rounded}: register parts"
        if self.max_bytes is not None and rounded > self.max_bytes:
            return f"more than the cache's max_bytes, {self.max_bytes}, can hold: raise that, or register parts"
        return None


def judge(number: int, address: int, length: int, limits: Limits) -> int:
    """Raises what errno `number` means for [address, address + length), or returns watch flags to try again with."""
    call = f"get({length} bytes at {address:#x})"
    if number in (errno.EOPNOTSUPP, errno.EFAULT):
        refusal = memory.refusal(call, number, address, address + length, strict=not limits.accept_file_memory)
        if refusal is None:
            return _core.REFUSE_HOLES
        try:
            raise refusal
        finally:
            del refusal  # with its traceback it would be a cycle that keeps the caller's buffer alive
    never = limits.refusal(address, length)
    if number == errno.EDQUOT:
        raise LimitError(number, f"{call}: {never or _full(limits)}")
    if number == errno.EINVAL and never:
        raise ArgumentError(f"{call}: {never}")
    if number == errno.EADDRINUSE:
        raise OverlapError(number, f"{call}: it overlaps a registration that is held: release that first")
    if number in _REGISTRATION:
        raise RegistrationError(number, f"{call}: {_REGISTRATION[number]}")
    raise refused(number, call, _REASONS.get(number))


_REGISTRATION = {
    errno.EAGAIN: "the memory went on changing while it was registered: stop what unmaps or discards it",
    errno.EDEADLK: "asked for by a registrar that is at work on memory of this cache: it must not wait for itself",
    errno.EXDEV: "this registrar works in one thread only, the one that made the cache: ask there",
}

_REASONS = {
    errno.EBADF: "the cache is closed: make a new one",
    errno.EIO: "the monitor failed, and nothing is remembered: close this cache and all devices, and make new ones",
}


def _full(limits: Limits) -> str:
    named = (("max_bytes", limits.max_bytes), ("max_count", limits.max_count))
    text = ", ".join(f"{name} {value}" for name, value in named if value is not None)
    return f"the cache is full ({text}) and everything in it is held: release some, or raise the limit"
