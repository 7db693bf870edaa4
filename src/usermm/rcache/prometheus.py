"""What caches did, as Prometheus metrics: ``pip install usermm[prometheus]``.

Names follow Prometheus' conventions: counters end in _total, base units are bytes and seconds, and what tells caches
apart is the label `cache`. See docs/how-to/observe.md for what each is good for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from usermm.errors import ArgumentError
from usermm.rcache.cache import RegistrationCache
from usermm.rcache.statistics import Statistics

try:
    from prometheus_client import registry  # type: ignore[import-not-found, unused-ignore]
    from prometheus_client.core import (  # type: ignore[import-not-found, unused-ignore]
        CounterMetricFamily,
        GaugeMetricFamily,
    )
except ModuleNotFoundError as error:
    if error.name != "prometheus_client":
        raise
    reason = "usermm.rcache.prometheus: prometheus_client is missing: pip install usermm[prometheus]"
    raise ModuleNotFoundError(reason, name=error.name) from None

_PREFIX = "usermm_cache_"
_NS = 1e-9


@dataclass(frozen=True, slots=True)
class _Metric:
    """One family: a single field of `Statistics`, or one for each value of `label`."""

    name: str
    text: str
    fields: str | Mapping[str, str]
    label: str = ""
    unit: float = 1

    def samples(self, now: Statistics) -> Iterator[tuple[list[str], float]]:
        """Values of `label`, and the number."""
        fields = {"": self.fields} if isinstance(self.fields, str) else self.fields
        for value, field in fields.items():
            yield [value] if self.label else [], getattr(now, field) * self.unit


_GAUGES = (
    _Metric("registrations", "Registrations in the look-up", "registrations"),
    _Metric("held_registrations", "Registrations that somebody holds", "held"),
    _Metric("pinned_registrations", "What is registered with the device", "pinned"),
    _Metric("pinned_bytes", "What is registered with the device", "pinned_bytes"),
    _Metric("pinned_peak_bytes", "The most that was registered with the device at once", "pinned_bytes_max"),
)

_COUNTERS = (
    _Metric("gets", "Answers of get", {"hit": "hits", "miss": "misses"}, "result"),
    _Metric("probes", "System calls that asked for a quiet moment", "probes"),
    _Metric("doubts", "Probes that found no quiet moment for 100 ms", "doubts"),
    _Metric("waits", "Waits for a registration that another thread was making", "waits"),
    _Metric(
        "invalidations",
        "Registrations whose memory went",
        {"unmapped": "unmapped", "remapped": "remapped", "discarded": "discarded"},
        "cause",
    ),
    _Metric("evictions", "Registrations given up for want of room", "evictions"),
    _Metric("expirations", "Registrations given up because nobody asked any more", "expirations"),
    _Metric("retirements", "Registrations given up before the owner of the memory freed it", "retirements"),
    _Metric("merges", "Registrations that gave way to a larger one", "merges"),
    _Metric("retries", "Registrations made again, since the memory changed meanwhile", "retries"),
    _Metric(
        "register_calls",
        "Calls of the registrar's register",
        {"success": "registered", "failure": "register_failures"},
        "result",
    ),
    _Metric("register_seconds", "Time in the registrar's register", "register_ns", unit=_NS),
    _Metric("deregister_calls", "Calls of the registrar's deregister", "deregistered"),
    _Metric("deregister_seconds", "Time in the registrar's deregister", "deregister_ns", unit=_NS),
)


class Collector(registry.Collector):  # type: ignore[misc, unused-ignore]
    """One or more caches for a registry: ``prometheus_client.REGISTRY.register(Collector(cache, name="frames"))``.

    A registry takes one of these, since the names of its metrics are the same: `add` further caches to it. It does not
    keep a cache alive; one that is gone is no longer shown. Raises ArgumentError (`name` is another living cache's).
    """

    def __init__(self, cache: RegistrationCache[Any], *, name: str = "default") -> None:
        self._caches: dict[str, weakref.ref[RegistrationCache[Any]]] = {}
        self.add(cache, name=name)

    def add(self, cache: RegistrationCache[Any], *, name: str) -> None:
        """Shows another cache as well, with the value `name` of the label `cache`."""
        other = self._caches.get(name)
        if other is not None and other() not in (None, cache):
            raise ArgumentError(f"Collector: another cache has the name {name!r}: give each its own")
        self._caches[name] = weakref.ref(cache)

    def describe(self) -> Iterable[Any]:
        """The families without samples, so that a registry notices a second collector."""
        return self._families({})

    def collect(self) -> Iterable[Any]:
        """The families with the numbers of now; each cache is asked once."""
        living = [(name, reference()) for name, reference in list(self._caches.items())]
        return self._families({name: cache.stats() for name, cache in living if cache is not None})

    @staticmethod
    def _families(numbers: Mapping[str, Statistics]) -> Iterator[Any]:
        for kind, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for metric in metrics:
                labels = ["cache", metric.label] if metric.label else ["cache"]
                family = kind(_PREFIX + metric.name, f"{metric.text}.", labels=labels)
                for name, now in numbers.items():
                    for values, number in metric.samples(now):
                        family.add_metric([name, *values], number)
                yield family
