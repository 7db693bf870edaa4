"""`RegistrationCache`: the pleasant half of a registration cache; the look-up is in C."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from usermm import _core
from usermm.errors import ArgumentError, ArgumentTypeError, DeviceError, UnavailableError
from usermm.rcache import explanation, refusals, upkeep
from usermm.rcache.statistics import Statistics
from usermm.registrars.base import Overlap, Registrar, Traits

Handle = TypeVar("Handle")

log = logging.getLogger("usermm.cache")

_OVERLAPS = {Overlap.ALLOWED: 0, Overlap.MERGED: 1, Overlap.REFUSED: 2}
_caches: weakref.WeakValueDictionary[int, RegistrationCache[Any]] = weakref.WeakValueDictionary()


class RegistrationCache(_core.Cache, Generic[Handle]):
    """Registrations of a device by the memory they are of, none of them ever stale.

        cache = usermm.RegistrationCache(usermm.registrars.IoUring(ring), max_bytes=1 << 30)
        with cache.get(array) as registration:
            read(ring, registration.handle, ...)

    `max_bytes` and `max_count` bound what is registered at any time; the least recently used makes room. `linger_s`: a
    registration is given up between that and twice that time after the last object that asked for it has died and
    nobody else asked (None: only for want of room). `fallback="uncached"`: where no exact monitor can run, every get
    registers and every release deregisters, instead of UnavailableError. `accept_file_memory`: see
    `Ummunotify.register_range`.

    Any thread may call anything; the registrar is called with no lock held. A forked child finds the cache empty and
    the parent's registrations are left alone. Raises UnavailableError, LimitError (no descriptor left), ArgumentError.
    """

    def __new__(
        cls,
        registrar: Registrar[Handle],
        *,
        max_bytes: int | None = None,
        max_count: int | None = None,
        linger_s: float | None = 1.0,
        fallback: Literal["raise", "uncached"] = "raise",
        accept_file_memory: bool = False,
    ) -> Self:
        traits = _traits_of(registrar)
        _require_limit("max_bytes", max_bytes)
        _require_limit("max_count", max_count)
        _require_linger(linger_s)
        if fallback not in ("raise", "uncached"):
            raise ArgumentError(f"RegistrationCache: fallback is {fallback!r}: pass 'raise' or 'uncached'")
        limits = refusals.Limits(
            max_bytes, max_count, traits.max_length_bytes, traits.granularity_bytes, accept_file_memory
        )
        try:
            self = cls._open(registrar, traits, limits, uncached=False)
        except UnavailableError as error:
            if fallback != "uncached":
                raise
            log.warning("every get registers anew, since nothing tells what went: %s", error.strerror)
            self = cls._open(registrar, traits, limits, uncached=True)
        self._linger_s = linger_s
        _caches[id(self)] = self
        return self

    @classmethod
    def _open(cls, registrar: Registrar[Handle], traits: Traits, limits: refusals.Limits, *, uncached: bool) -> Self:
        self = super().__new__(
            cls,
            registrar.register,
            _logged(registrar),
            overlap=_OVERLAPS[traits.overlap],
            merge_adjacent=traits.merge_adjacent,
            one_thread=not traits.any_thread,
            granularity=traits.granularity_bytes,
            max_length=traits.max_length_bytes or 0,
            writes=traits.writes,
            max_bytes=limits.max_bytes or 0,
            max_count=limits.max_count or 0,
            uncached=uncached,
            watch_flags=_core.REFUSE_HOLES | (0 if limits.accept_file_memory else _core.REFUSE_FILES),
        )
        self.registrar, self._traits, self._limits, self.uncached = registrar, traits, limits, uncached
        self.upkeep_due = not uncached
        return self

    registrar: Registrar[Handle]
    """What was given."""
    uncached: bool
    """Whether there is no exact monitor here, so that nothing is remembered."""
    _traits: Traits
    _limits: refusals.Limits
    _linger_s: float | None

    def stats(self) -> Statistics:
        """What was counted until now."""
        return Statistics(**self.counts())

    def explain(self, buffer: object) -> str:
        """In words: whether a get of this buffer would hit now, whether it would probe, and why. Changes nothing.

        It looks at the cache, not at the memory: what get would refuse for that it calls a miss.
        """
        return explanation.explain(self, self._traits, self._limits, buffer, self.memory_of(buffer))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self.stats()
        return f"<usermm.RegistrationCache of {now.registrations} registrations, {now.pinned_bytes} bytes pinned>"

    def _failed(self, number: int, address: int, length: int) -> int:
        """For the C half: what a refused get means. Raises, or returns flags to try again with."""
        return refusals.judge(number, address, length, self._limits)

    def _begin_upkeep(self) -> None:
        """For the C half, after the first registration in this process."""
        if sys.is_finalizing():
            return
        try:
            upkeep.begin(self, self._linger_s)
        except (DeviceError, OSError, RuntimeError) as error:  # the last: no thread can be started
            log.warning("nothing gives memory back but further calls of get: %s", error)


def _traits_of(registrar: Registrar[Handle]) -> Traits:
    calls = (getattr(registrar, "register", None), getattr(registrar, "deregister", None))
    traits = getattr(registrar, "traits", None)
    if not all(map(callable, calls)) or not isinstance(traits, Traits):
        raise ArgumentTypeError(
            f"RegistrationCache: {type(registrar).__name__} is no registrar: it needs register(address, length), "
            "deregister(handle) and traits"
        )
    return traits


def _require_limit(name: str, value: int | None) -> None:
    if value is not None and not isinstance(value, int):
        raise ArgumentTypeError(f"RegistrationCache: {name} must be an int or None, not {type(value).__name__}")
    if value is not None and not 0 < value < 1 << 63:
        raise ArgumentError(f"RegistrationCache: {name} is {value}: pass a positive number, or None for no limit")


def _require_linger(linger_s: float | None) -> None:
    if linger_s is not None and not isinstance(linger_s, (int, float)):
        raise ArgumentTypeError(f"RegistrationCache: linger_s must be seconds or None, not {type(linger_s).__name__}")
    if linger_s is not None and not 0.01 <= linger_s < 1 << 20:
        raise ArgumentError(f"RegistrationCache: linger_s is {linger_s}: pass at least 0.01 s, or None for no end")


def _logged(registrar: Registrar[Handle]) -> Callable[[Handle], None]:
    """What a registrar raises when it takes back must not reach whoever let go last: it may be a deallocator."""
    deregister = registrar.deregister

    def give_back(handle: Handle) -> None:
        try:
            deregister(handle)
        except BaseException as error:
            name = type(registrar).__name__
            log.exception("%s.deregister(%r) failed: the device may still use that memory", name, handle)
            if not isinstance(error, Exception):
                raise  # Ctrl-C: where nobody can be told, the interpreter prints it

    return give_back


def _after_fork() -> None:
    """The thread did not come along, and may be wanted here, too."""
    for cache in list(_caches.values()):
        cache.upkeep_due = not cache.uncached


@atexit.register
def _close_all() -> None:
    """While modules and the device's library are still whole."""
    for cache in list(_caches.values()):
        cache.close()


gc.callbacks.append(_core.track_registrations)
os.register_at_fork(after_in_child=_after_fork)
