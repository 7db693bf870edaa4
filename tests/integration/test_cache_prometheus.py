"""The collector, asked by the real prometheus_client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import usermm
from usermm.errors import ArgumentError, LimitError
from usermm.registrars import Traits

client = pytest.importorskip("prometheus_client", reason="needs pip install usermm[prometheus]")

if client:
    from usermm.rcache.prometheus import Collector


class Counting:
    """A device that takes everything but the second thing it is asked for."""

    traits = Traits()

    def __init__(self) -> None:
        self.asked = 0

    def register(self, _address: int, _length: int) -> int:
        self.asked += 1
        if self.asked == 2:
            raise LimitError(28, "Counting.register: full")
        return self.asked

    def deregister(self, handle: int) -> None:
        """Nothing to give back."""


class Values:
    """What a scrape finds, by name and labels."""

    def __init__(self, collector: Collector) -> None:
        self.registry = client.CollectorRegistry(auto_describe=True)
        self.registry.register(collector)

    def __call__(self, name: str, **labels: str) -> float | None:
        value: float | None = self.registry.get_sample_value(f"usermm_cache_{name}", labels)
        return value


def test_the_numbers_are_those_of_the_statistics() -> None:
    frames = [np.zeros(1 << 20, np.uint8) for _ in range(2)]
    with usermm.RegistrationCache(Counting()) as cache:
        value = Values(Collector(cache, name="frames"))
        for frame in (frames[0], frames[0], frames[1]):
            cache.get(frame).release()
        held = cache.get(frames[1])
        assert value("gets_total", cache="frames", result="hit") == 2
        assert value("gets_total", cache="frames", result="miss") == 2
        assert value("register_calls_total", cache="frames", result="success") == 2
        assert value("register_calls_total", cache="frames", result="failure") == 1
        assert value("evictions_total", cache="frames") == 1
        assert value("held_registrations", cache="frames") == 1
        assert value("pinned_bytes", cache="frames") == frames[1].nbytes
        held.release()
        seconds = value("register_seconds_total", cache="frames")
        assert seconds == pytest.approx(cache.stats().register_ns / 1e9)


@pytest.mark.parametrize("take", ["unmap", "discard"])
def test_invalidations_are_told_by_their_cause(take: str) -> None:
    import mmap

    memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with usermm.RegistrationCache(Counting()) as cache:
        value = Values(Collector(cache))
        cache.get(memory).release()
        if take == "unmap":
            memory.close()
        else:
            memory.madvise(mmap.MADV_DONTNEED)
        cache.clear()  # finds out
        for cause, number in (("unmapped", take == "unmap"), ("discarded", take == "discard"), ("remapped", 0)):
            assert value("invalidations_total", cache="default", cause=cause) == number
    memory.close()


def test_every_field_of_the_statistics_is_shown() -> None:
    from usermm.rcache import prometheus

    shown: list[str] = []
    for metric in (*prometheus._GAUGES, *prometheus._COUNTERS):
        shown += [metric.fields] if isinstance(metric.fields, str) else metric.fields.values()
    assert sorted(shown) == sorted(usermm.Statistics.__dataclass_fields__)


def test_names_follow_the_conventions() -> None:
    with usermm.RegistrationCache(Counting()) as cache:
        for family in Collector(cache).collect():
            assert family.documentation
            for sample in family.samples:
                assert sample.name.startswith("usermm_cache_")
                assert sample.name.endswith("_total") == (family.type == "counter")
                assert "_ns" not in sample.name


def test_two_caches_are_told_apart_by_a_label() -> None:
    array = np.zeros(1 << 20, np.uint8)
    with usermm.RegistrationCache(Counting()) as one, usermm.RegistrationCache(Counting()) as two:
        collector = Collector(one, name="one")
        collector.add(two, name="two")
        collector.add(two, name="two")  # may be said again
        value = Values(collector)
        one.get(array).release()
        assert value("registrations", cache="one") == 1
        assert value("registrations", cache="two") == 0
        with pytest.raises(ArgumentError, match="'one'"):
            collector.add(two, name="one")


def test_a_registry_takes_one_collector() -> None:
    with usermm.RegistrationCache(Counting()) as cache:
        value = Values(Collector(cache, name="one"))
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            value.registry.register(Collector(cache, name="two"))


def test_a_cache_is_not_kept_alive() -> None:
    cache = usermm.RegistrationCache(Counting())
    collector = Collector(cache, name="gone")
    value = Values(collector)
    assert value("registrations", cache="gone") == 0
    cache.close()
    assert value("registrations", cache="gone") == 0  # closed, but there
    del cache
    assert value("registrations", cache="gone") is None
    with usermm.RegistrationCache(Counting()) as other:
        collector.add(other, name="gone")
        assert value("registrations", cache="gone") == 0


def test_the_text_that_a_server_reads() -> None:
    with usermm.RegistrationCache(Counting()) as cache:
        registry = Values(Collector(cache, name='a "name"')).registry
        text: Any = client.generate_latest(registry).decode()
        assert 'usermm_cache_gets_total{cache="a \\"name\\"",result="hit"} 0.0' in text
        assert "# TYPE usermm_cache_pinned_bytes gauge" in text
