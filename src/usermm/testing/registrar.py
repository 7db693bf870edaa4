"""`ScriptedRegistrar`: a device that only keeps accounts, and misbehaves when it is told to.

    registrar = ScriptedRegistrar(Traits(overlap=Overlap.REFUSED), max_bytes=1 << 20)
    registrar.at_register(3, raises=MemoryError())       # the third registration finds no memory
    registrar.at_deregister(1, runs=lambda: sleep(1))    # the first deregistration takes its time
    with usermm.RegistrationCache(registrar) as cache:
        ...
    registrar.check(empty=True)                          # the contract was kept, and nothing is registered

The cache breaks the contract when it registers overlapping memory with a device that refuses that, takes a handle back
twice, or ignores another trait: such a call raises `ContractError` and is remembered in `violations`, since an
exception in a deallocator or in a thread of its own is easily lost.
"""

from __future__ import annotations

import enum
import errno
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from usermm.errors import ArgumentError, LimitError
from usermm.registrars.base import Overlap, Traits


class ContractError(AssertionError):
    """The caller broke the contract of `usermm.registrars.Registrar`; the message says how."""


class Pin(NamedTuple):
    """Bytes [address, address + length) that are registered, and the handle they were given."""

    handle: object
    address: int
    length: int

    def overlaps(self, address: int, length: int) -> bool:
        return self.address < address + length and address < self.address + self.length


@dataclass(eq=False)
class Call:
    """One call, in order of entry."""

    name: str
    """"register" or "deregister"."""
    number: int
    """Counts the calls of this name, from 1."""
    address: int
    length: int
    """In bytes; 0 at 0 if deregister was given a handle that is not known."""
    handle: object
    """What the memory was registered under (None until then), or what deregister was given."""
    thread: int
    """threading.get_ident() of the caller."""
    error: type[BaseException] | None = None
    """What the call raised. (The exception itself would keep its caller's objects alive.)"""


_Raisable = BaseException | type[BaseException]
_Task = Callable[[], object]


class _Nothing(enum.Enum):
    NOTHING = 0


_NOTHING = _Nothing.NOTHING


@dataclass(frozen=True)
class _Step:
    """What the script says of one call."""

    raises: _Raisable | None = None
    raises_after: _Raisable | None = None
    returns: object = _NOTHING
    runs: _Task | None = None
    runs_after: _Task | None = None

    def before(self) -> None:
        if self.runs is not None:
            self.runs()
        if self.raises is not None:
            raise self.raises

    def after(self) -> None:
        if self.runs_after is not None:
            self.runs_after()
        if self.raises_after is not None:
            raise self.raises_after


class ScriptedRegistrar:
    """A registrar without a device: handles are 1, 2, 3, ... Any number of threads may use it.

    `traits` is what it says of itself, and what it holds its caller to. `max_bytes` and `max_count` are all that it has
    to give: beyond either, register raises LimitError and registers nothing.
    """

    def __init__(
        self, traits: Traits | None = None, *, max_bytes: int | None = None, max_count: int | None = None
    ) -> None:
        self.max_bytes = max_bytes
        self.max_count = max_count
        self.calls: list[Call] = []
        """All calls so far; clear it when it grows too long for you, numbers go on."""
        self.violations: list[str] = []
        self.pinned_bytes = 0
        """The lengths of all live registrations together; bytes that are in two of them count twice."""
        self.peak_bytes = 0
        self.peak_count = 0
        self._traits = Traits() if traits is None else traits
        self._thread = threading.get_ident()
        self._lock = threading.RLock()  # a deallocator can come back while its own thread is in here
        self._handles = itertools.count(1)
        self._numbers = {"register": itertools.count(1), "deregister": itertools.count(1)}
        self._script: dict[tuple[str, int | None], _Step] = {}
        self._live: list[Pin] = []
        self._leaving: list[Pin] = []  # taken back, and live until the work is done, or for ever if that failed

    # The script

    def at_register(
        self,
        number: int | None,
        *,
        raises: _Raisable | None = None,
        raises_after: _Raisable | None = None,
        returns: object = _NOTHING,
        runs: _Task | None = None,
        runs_after: _Task | None = None,
    ) -> None:
        """What to do at the `number`-th registration (from 1, every try counts); None: at each that has no own step.

        `runs` is called first, and may re-enter the cache, free the memory, or sleep; then `raises` is raised with
        nothing registered. Else the memory is registered, under `returns` if that is given; `runs_after` is called; and
        at last `raises_after` is raised, though the memory is registered and stays so: a registrar with a bug.
        """
        self._add("register", number, _Step(raises, raises_after, returns, runs, runs_after))

    def at_deregister(
        self,
        number: int | None,
        *,
        raises: _Raisable | None = None,
        raises_after: _Raisable | None = None,
        runs: _Task | None = None,
        runs_after: _Task | None = None,
    ) -> None:
        """The same for the `number`-th deregistration; after `raises` the memory stays registered for good."""
        self._add("deregister", number, _Step(raises, raises_after, _NOTHING, runs, runs_after))

    # What a cache calls

    @property
    def traits(self) -> Traits:
        return self._traits

    def register(self, address: int, length: int) -> object:
        """The next handle. LimitError: beyond the budget. ContractError: see above."""
        call = self._enter("register", address, length)
        try:
            step = self._step(call)
            step.before()
            self._reserve(call, step)
            step.after()
        except BaseException as error:
            call.error = type(error)
            raise
        return call.handle

    def deregister(self, handle: object) -> None:
        """Takes `handle` back. ContractError: it is not registered, or was taken back before."""
        call = self._enter("deregister", 0, 0, handle)
        try:
            pin = self._take_back(call)
            step = self._step(call)
            step.before()
            self._forget(pin)
            step.after()
        except BaseException as error:
            call.error = type(error)
            raise

    # The account

    @property
    def live(self) -> tuple[Pin, ...]:
        """What is registered now, in order of registration."""
        with self._lock:
            return tuple(self._live)

    def check(self, *, empty: bool = False) -> None:
        """ContractError with the first violation, if there was one; with `empty` also if anything is registered."""
        if self.violations:
            raise ContractError(self.violations[0])
        if empty and self.live:
            raise ContractError("still registered: " + ", ".join(_range(pin.address, pin.length) for pin in self.live))

    # How it does it

    def _add(self, name: str, number: int | None, step: _Step) -> None:
        if number is not None and number < 1:
            raise ArgumentError(f"at_{name}: calls are counted from 1, not {number}")
        self._script[name, number] = step

    def _enter(self, name: str, address: int, length: int, handle: object = None) -> Call:
        with self._lock:
            call = Call(name, next(self._numbers[name]), address, length, handle, threading.get_ident())
            self.calls.append(call)
        return call

    def _step(self, call: Call) -> _Step:
        if not self._traits.any_thread and call.thread != self._thread:
            raise self._violation(f"{call.name}: called from another thread than the registrar's, any_thread is False")
        return self._script.get((call.name, call.number)) or self._script.get((call.name, None)) or _Step()

    def _reserve(self, call: Call, step: _Step) -> None:
        with self._lock:
            self._check_range(call.address, call.length)
            count, pinned_bytes = len(self._live) + 1, self.pinned_bytes + call.length
            if self.max_count is not None and count > self.max_count:
                raise LimitError(errno.ENOMEM, f"register: {self.max_count} registrations are all there are")
            if self.max_bytes is not None and pinned_bytes > self.max_bytes:
                raise LimitError(errno.ENOMEM, f"register: {pinned_bytes} bytes, {self.max_bytes} are all there are")
            call.handle = next(self._handles) if step.returns is _NOTHING else step.returns
            self._live.append(Pin(call.handle, call.address, call.length))
            self.pinned_bytes = pinned_bytes
            self.peak_bytes = max(self.peak_bytes, pinned_bytes)
            self.peak_count = max(self.peak_count, count)

    def _check_range(self, address: int, length: int) -> None:
        traits, what = self._traits, f"register: {_range(address, length)}"
        if length <= 0 or address % traits.granularity_bytes or length % traits.granularity_bytes:
            raise self._violation(f"{what} is not made of pieces of {traits.granularity_bytes} bytes")
        if traits.max_length_bytes is not None and length > traits.max_length_bytes:
            raise self._violation(f"{what} is longer than {traits.max_length_bytes} bytes")
        if traits.overlap is Overlap.REFUSED:
            for pin in self._live:
                if pin.overlaps(address, length):
                    raise self._violation(f"{what} overlaps {_range(pin.address, pin.length)}, and that is refused")

    def _take_back(self, call: Call) -> Pin:
        """From here on the handle may not be given again; the memory is registered until `_forget`."""
        with self._lock:
            for pin in self._live:
                if pin.handle == call.handle and not any(pin is each for each in self._leaving):
                    self._leaving.append(pin)
                    call.address, call.length = pin.address, pin.length
                    return pin
            raise self._violation(f"deregister: {call.handle!r} is not registered, or was taken back before")

    def _forget(self, pin: Pin) -> None:
        with self._lock:
            for pins in (self._live, self._leaving):
                del pins[next(index for index, each in enumerate(pins) if each is pin)]
            self.pinned_bytes -= pin.length

    def _violation(self, text: str) -> ContractError:
        self.violations.append(text)
        return ContractError(text)


def _range(address: int, length: int) -> str:
    return f"[{address:#x}, {address + length:#x})"
