"""The C part: a device over libusermm. Use `usermm.Ummunotify`, which adds the pleasant half."""

from typing import Final, Self

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

def buffer_range(buffer: object, /) -> tuple[int, int]:
    """Address and length in bytes of a buffer: buffer protocol, data_ptr() and nbytes, or address and size."""

def counts() -> dict[str, int]:
    """What is alive in this process: devices, regions, monitors (reader threads), and notifications so far."""

def empty(*ignored: object) -> None:
    """Does nothing: the price of a call, for benchmarks."""
