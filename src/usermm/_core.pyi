"""The C part: a device over libusermm. Use `usermm.Ummunotify`, which adds the pleasant half."""

from collections.abc import Callable
from typing import Any, Final, Self

from typing_extensions import Buffer

REFUSE_HOLES: Final = 1
REFUSE_FILES: Final = 2

class Device:
    """One open device with its own regions, queue and generation. Any thread may call any method at any time."""

    def __new__(cls, abi: int = 2, *, flags: int = 0) -> Self:
        """Opens a device: abi 2 (/dev/ummunotify) or 1 (/dev/ummunot); `flags` as of open(2), never for writing.

        Raises UnavailableError (EPERM, ENOSYS) without userfaultfd, LimitError, DeviceError (EINVAL) for bad arguments.
        """

    @property
    def generation(self) -> int:
        """How many notifications hit this device (u64); every call of any thread that has returned is counted."""

    @property
    def closed(self) -> bool:
        """Whether close() was called."""

    @property
    def flags(self) -> int:
        """The flags given when it was opened."""

    def check(self, seen: int, /, probe: bool = True) -> bool:
        """True when no region of this device lost memory since its generation was `seen`.

        With `probe` (one system call) a change that another thread is still inside counts too: an address that it gave
        back and that was handed out again is never taken for the old one. Without, the answer is exact for all calls
        that have returned. False can also mean that other threads discarded watched memory for 100 ms without pause.
        """

    def watch(self, start: int, end: int, cookie: int | None, flags: int, /) -> int:
        """Registers [start, end) in bytes; flags REFUSE_HOLES | REFUSE_FILES. Returns the cookie."""

    def unregister(self, cookie: int, /) -> None:
        """Forgets a region and its event. Raises CookieError (EINVAL) when there is none with this cookie."""

    def read_within(self, timeout: float | None, count: int, /) -> bytes:
        """Up to `count` bytes of events (32 each, 4096 at most); waits `timeout` seconds (None: for ever), then b""."""

    def read_bytes(self, count: int = 4096, /) -> bytes:
        """The ABI's read(2): min(count, 4096) // 32 events of 32 bytes; b"" when count < 32 and one is there.

        Waits for the first one, or raises WouldBlockError (EAGAIN) on a device opened with O_NONBLOCK.
        """

    def readinto(self, address: int, count: int, /) -> int:
        """read_bytes into memory at `address`; a bad address raises EFAULT, and the events are lost."""

    def ioctl(self, request: int, argument: int | Buffer, /) -> int:
        """The ABI's ioctl(2): `argument` is an address, or a buffer of exactly the request's size."""

    def map_page(self, length: int, prot: int, flags: int, offset: int, /) -> memoryview:
        """See Ummunotify.mmap."""

    def fileno(self) -> int:
        """A descriptor that is readable exactly while read() has something; it can be polled, not read."""

    def close(self) -> None:
        """Forgets all regions and ends every waiting read with ClosedError. May be called again."""

class Registration:
    """One holder of a registration. The memory stays registered until every holder has let go, whatever becomes of it.

    To let go: `release()`, the end of a `with` block, or the last reference to this object; in any thread.
    """

    @property
    def handle(self) -> Any:
        """What the registrar returned for it. Raises ValueError once released, like the next two."""

    @property
    def address(self) -> int:
        """Where the registered memory starts: at or below the buffer that was asked for."""

    @property
    def length(self) -> int:
        """How many bytes are registered: all of the buffer, and maybe more on both sides."""

    @property
    def valid(self) -> bool:
        """Whether it still is the memory that is mapped there; False once released, evicted or the cache was closed.

        Exact for every unmapping whose call has returned. What was evicted stays registered for its holder.
        """

    def release(self) -> None:
        """Lets go. May be called again."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

class Cache:
    """The look-up of `usermm.RegistrationCache`, which adds the pleasant half. Any thread may call anything."""

    upkeep_due: bool
    """Whether `_begin_upkeep()` is called after the next registration; set anew in a forked child."""

    def __new__(
        cls,
        register: Callable[[int, int], object],
        deregister: Callable[[Any], None],
        *,
        overlap: int,
        merge_adjacent: bool,
        one_thread: bool,
        granularity: int,
        max_length: int,
        writes: bool,
        max_bytes: int,
        max_count: int,
        uncached: bool,
        watch_flags: int,
    ) -> Self:
        """`overlap` 0 allowed, 1 merged, 2 refused; a limit of 0 is none. Raises UnavailableError, LimitError."""

    def get(self, buffer: object, /, *, probe: bool | None = None) -> Registration:
        """A registration that covers `buffer`: a remembered one, or a new one. It is the caller's until it is released.

        `buffer`: the buffer protocol (contiguous; writable where the device writes), data_ptr() and nbytes, or address
        and size. `probe`, a system call, asks that no change of watched memory be under way. None: only if something is
        found and this very object did not ask before, which is exact across threads as long as an object's memory is
        not exchanged by a thread without the interpreter's lock; True: always, which is exact even then; False: never,
        which is exact for every change whose call has returned.

        Raises ArgumentError, ArgumentTypeError (the buffer; longer than the device takes), UnwatchableError (the memory
        can change unseen), LimitError (the cache's or the device's limits, and all is held), OverlapError,
        RegistrationError (the memory went on changing; a registrar that waits for itself), ClosedError,
        MonitorFailedError, and what the registrar raises.
        """

    def evict(self, buffer: object, /) -> int:
        """Takes every registration that overlaps this memory out of the look-up; says how many that were."""

    def clear(self) -> int:
        """Takes everything out of the look-up; says how many that were."""

    def expire(self, ages: int, /) -> int:
        """Takes out what nobody asked for since `ages` (1 to 8) calls of this ago, unless an object that did is alive.

        0: only what lost its memory. The cache's own upkeep calls it. Says how many that were.
        """

    def overlapping(self, address: int, length: int, /) -> list[tuple[int, int, int, Any]]:
        """(address, length, holders, handle) of what is in the look-up and overlaps the range; length 0: all of it."""

    def remembers(self, buffer: object, /) -> bool:
        """Whether get of this very object would need no probe."""

    def memory_of(self, buffer: object, /) -> tuple[int, int]:
        """Address and length in bytes of a buffer that get would take. Raises as get for one that it would not."""

    def counts(self) -> dict[str, int]:
        """The fields of `usermm.Statistics`."""

    def fileno(self) -> int:
        """A descriptor that polls readable once a registration lost its memory, until expire(); hangs up at close()."""

    def close(self) -> None:
        """Takes everything out for good; what is held is deregistered when it is let go. May be called again."""

def buffer_range(buffer: object, /) -> tuple[int, int]:
    """Address and length in bytes of a buffer: buffer protocol, data_ptr() and nbytes, or address and size."""

def track_registrations(*ignored: object) -> None:
    """Shows the registrations held now to the garbage collector, which need not see those of a moment: gc.callbacks."""

def counts() -> dict[str, int]:
    """What is alive in this process: devices, regions, monitors (reader threads), and notifications so far."""

def empty(*ignored: object) -> None:
    """Does nothing: the price of a call, for benchmarks."""
