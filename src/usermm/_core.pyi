"""The C part: a device over libusermm. Use `usermm.Ummunotify`, which adds the pleasant half."""

from collections.abc import Callable, Iterable
from typing import Any, Final, Self

from typing_extensions import Buffer

REFUSE_HOLES: Final = 1
REFUSE_FILES: Final = 2

class Device:
    """One open device with its own regions, queue and generation. `usermm.Ummunotify` says what its methods do."""

    def __new__(cls, abi: int = 2, *, flags: int = 0) -> Self: ...
    @property
    def generation(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def flags(self) -> int: ...
    def check(self, seen: int, /, probe: bool = True) -> bool: ...
    def watch(self, start: int, end: int, cookie: int | None, flags: int, /) -> int: ...
    def unregister(self, cookie: int, /) -> None: ...
    def retire(self, cookie: int, /) -> None: ...
    def read_within(self, timeout: float | None, count: int, /) -> bytes: ...
    def read_bytes(self, count: int = 4096, /) -> bytes: ...
    def readinto(self, address: int, count: int, /) -> int: ...
    def ioctl(self, request: int, argument: int | Buffer, /) -> int: ...
    def map_page(self, length: int, prot: int, flags: int, offset: int, /) -> memoryview: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

class TryLock:
    """`with TryLock(lock) as got:` whether the threading lock was free; it is held until the end of the block then.

    No signal handler runs between its being taken and the block: a call of `acquire` and a `try` cannot promise that.
    """

    def __new__(cls, lock: Any) -> Self: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *_: object) -> None: ...

class Memory:
    """Pages of files, mapped side by side: a buffer of bytes, unmapped by close() or with the object."""

    def __new__(
        cls, runs: Iterable[tuple[int, int, int]], *, writable: bool, shared: bool, inherit: bool, length: int = 0
    ) -> Self:
        """Maps `runs`, each (descriptor, offset in bytes, length in bytes), at one address: all or none.

        `length`: of all, where that is more than the runs have; the rest cannot be touched before fill().

        `shared`: MAP_SHARED, else MAP_PRIVATE. Without `inherit` a forked child has nothing there, and does nothing
        when it closes this. Raises OSError of mmap(2); ValueError and TypeError for runs that are none.
        """

    @classmethod
    def part(cls, memory: Memory, offset: int, length: int, /) -> Self:
        """Bytes of another memory, which cannot be closed before this is; closing this unmaps nothing."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    @property
    def address(self) -> int:
        """Of the first byte. Raises ValueError once closed."""

    @property
    def writable(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def exports(self) -> int:
        """How many buffers of it there are."""

    def close(self) -> None:
        """Unmaps it. Raises BufferError while a buffer of it exists. May be called again."""

    def unmap(self) -> bool:
        """close(); whether it was open until now: of several threads one is told so."""

    def abandon(self) -> bool:
        """It is closed, and nothing is unmapped: somebody else did that. Whether it was open until now."""

    def fill(self, offset: int, runs: Iterable[tuple[int, int, int]], /) -> None:
        """Maps runs as the constructor does, from a page on. Raises as it; then some may be mapped."""

    def detach(self, offset: int, length: int, descriptor: int, /) -> None:
        """Puts a private mapping of a file, from its start, with the same content in the place of these pages; buffers
        stay valid.

        A page that is gone, since its file was truncated, becomes zeros. Raises OSError (ENOMEM): nothing was changed.
        """

    def read(self, offset: int = 0, length: int = ..., /) -> bytes:
        """A copy. Raises OSError (EFAULT) where a page is gone, and touching it would be SIGBUS."""

    def write(self, offset: int, data: Buffer, /) -> None:
        """The other direction; EFAULT likewise, maybe after a part."""

    def load(self, offset: int, /) -> int:
        """The u32 at `offset`, a multiple of 4, and whatever was written before it was stored (acquire)."""

    def store(self, offset: int, value: int, /) -> None:
        """Stores a u32 after everything written before (release)."""

    def exchange(self, offset: int, value: int, /) -> int:
        """Stores a u32 and returns the one before, in one order with all others (sequentially consistent)."""

    def add(self, offset: int, change: int, /) -> int:
        """Adds to a u32, modulo 2**32, and returns the sum; likewise sequentially consistent."""

    def fence(self) -> None:
        """Nothing after it is done before what is before it (sequentially consistent)."""

class MessageSender:
    """The messages of a channel that this side sends: docs/channels.md. Any thread may call anything.

    In a forked child every call raises ForkedError.
    """

    def __new__(
        cls, own: Memory, peer: Memory, data: Memory, notify: Callable[[], None], slots: int, first: int,
        slot_bytes: int,
    ) -> Self:
        """`own` and `peer` are the sides' control pages, `data` has `slots` of `slot_bytes` from byte `first` on.

        `notify` wakes the peer. Raises ArgumentError.
        """

    def unconfirmed(self) -> tuple[int, int]:
        """(messages not taken, messages taken but not given back), as far as the peer said."""

    def close(self) -> None:
        """Lets the memory go; slots on loan keep theirs."""

class MessageSlot:
    """Memory on loan from a MessageSender: a writable buffer. Its end without send() is cancel()."""

    @classmethod
    def take(
        cls, sender: MessageSender, length: int, item_type: bytes, shape: tuple[int, ...], /
    ) -> Self | None:
        """`length` bytes of a slot that nobody uses; None: all are out.

        `item_type` has 16 bytes, `shape` 8 items at most. Raises ArgumentError, ClosedError.
        """

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    @property
    def view(self) -> memoryview:
        """The bytes, writable. ClosedError once sent."""

    @property
    def item_type(self) -> bytes:
        """As it was made with; empty: no array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it was made with."""

    def fill(self, data: object, /) -> None:
        """Copies a C-contiguous buffer of just this length. Raises ArgumentError, BufferError, ClosedError."""

    def send(self) -> int:
        """Hands it over without a copy; the message's number, from 1. ClosedError (EBADF), and what `notify` raises."""

    def cancel(self) -> None:
        """Gives the slot back unsent. May be called again."""

class MessageReceiver:
    """The messages of a channel that the other side sends, which is not trusted. Any thread may call anything."""

    def __new__(
        cls, own: Memory, peer: Memory, data: Memory, notify: Callable[[], None], slots: int, first: int,
        slot_bytes: int,
    ) -> Self:
        """As MessageSender; `data` is the peer's."""

    def next(self) -> Message | None:
        """Takes the next message, whose slot is held until its end. None: there is none, or this end was closed.

        Raises ProtocolError: the peer wrote nonsense.
        """

    def close(self) -> None:
        """Lets the memory go; what is held keeps it."""

class Message:
    """A message that was received: a read-only buffer where it is, inside its slot.

    Its numbers are those that were checked; the bytes, which are the peer's, may change. The slot goes back with the
    last reference to this, which every buffer of it is.
    """

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    @property
    def item_type(self) -> bytes:
        """As the peer wrote it; empty: no array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the peer wrote it: nothing was compared with the length."""

    @property
    def offset(self) -> int:
        """Of its first byte in the peer's data."""

    def release(self) -> None:
        """Gives the slot back now: the sender may write there. May be called again; what is looked at stays mapped."""

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

def process() -> int:
    """os.getpid() without a system call: forks of every kind wipe the page that it is read from."""

def give_way() -> None:
    """Lets others run on this core: sched_yield(2), without the interpreter's lock."""

def has_hung_up(descriptor: int, /) -> bool:
    """Whether a socket's peer is gone (POLLRDHUP, POLLHUP, POLLERR), or the descriptor is closed."""

def counts() -> dict[str, int]:
    """What is alive in this process: devices, regions, monitors (reader threads), and notifications so far."""

def empty(*ignored: object) -> None:
    """Does nothing: the price of a call, for benchmarks."""
