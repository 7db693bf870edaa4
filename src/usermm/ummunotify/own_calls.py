"""The calls that each monitor has its own way for: what they promise, whoever answers them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from typing_extensions import Buffer

MonitorName = Literal["userfaultfd", "kernel"]


class OwnCalls:
    """The half of `Ummunotify` that a subclass for each monitor has to have."""

    __slots__ = ()

    if TYPE_CHECKING:  # at run time the monitor's class has it

        @property
        def monitor(self) -> MonitorName:
            """What is behind this device."""

    @classmethod
    def _open(cls, abi: Any, flags: Any) -> Self:
        raise NotImplementedError

    def _readiness(self) -> tuple[int, ...]:
        """Descriptors to close; the first polls readable with the next event, and once the device is closed.

        Nobody else's, since a second add_reader of asyncio would replace the callback of the first.
        """
        raise NotImplementedError

    @property
    def generation(self) -> int:
        """How many notifications hit this device (u64); every call of any thread that has returned is counted."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        raise NotImplementedError

    @property
    def flags(self) -> int:
        """The flags given when it was opened."""
        raise NotImplementedError

    def check(self, seen: int, /, probe: bool = True) -> bool:
        """True when no region of this device lost memory since its generation was `seen`.

        With `probe` (one system call) a change that another thread is still inside counts too: an address that it gave
        back and that was handed out again is never taken for the old one. Without, the answer is exact for all calls
        that have returned. False can also mean that other threads discarded watched memory for 100 ms without pause.
        """
        raise NotImplementedError

    def watch(self, start: int, end: int, cookie: int | None, flags: int, /) -> int:
        """Registers [start, end) in bytes; flags REFUSE_HOLES | REFUSE_FILES. Returns the cookie."""
        raise NotImplementedError

    def unregister(self, cookie: int, /) -> None:
        """Forgets a region and its event. Raises CookieError (EINVAL) when there is none with this cookie."""
        raise NotImplementedError

    def retire(self, cookie: int, /) -> None:
        """unregister, and unmapping the memory costs no event any more: for who is about to do that."""
        raise NotImplementedError

    def read_within(self, timeout: float | None, count: int, /) -> bytes:
        """Up to `count` bytes of events (32 each, 4096 at most); waits `timeout` seconds (None: for ever), then b""."""
        raise NotImplementedError

    def read_bytes(self, count: int = 4096, /) -> bytes:
        """The ABI's read(2): min(count, 4096) // 32 events of 32 bytes; b"" when count < 32 and one is there.

        Waits for the first one, or raises WouldBlockError (EAGAIN) on a device opened with O_NONBLOCK.
        """
        raise NotImplementedError

    def readinto(self, address: int, count: int, /) -> int:
        """read_bytes into memory at `address`; a bad address raises EFAULT, and the events are lost."""
        raise NotImplementedError

    def ioctl(self, request: int, argument: int | Buffer, /) -> int:
        """The ABI's ioctl(2): `argument` is an address, or a buffer of exactly the request's size."""
        raise NotImplementedError

    def map_page(self, length: int, prot: int, flags: int, offset: int, /) -> memoryview:
        """See mmap."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A descriptor that is readable exactly while read() has something; it can be polled, not read."""
        raise NotImplementedError

    def close(self) -> None:
        """Forgets all regions and ends every waiting read with ClosedError. May be called again."""
        raise NotImplementedError
