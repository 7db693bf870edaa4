"""`RegistrationCache.explain`: what it says of a get is what the get then does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.caches import PAGE, Block, cache_over
from support.calls import refused_line

import usermm
from usermm import ArgumentError
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

MERGED = Traits(overlap=Overlap.MERGED)
REFUSED = Traits(overlap=Overlap.REFUSED)
ROUNDED = Traits(granularity_bytes=PAGE)
Cache = usermm.RegistrationCache[object]


class Scene:
    """Eight pages, and a cache in which pages 2 and 3 are registered, by an object that is alive."""

    def __init__(self, cache: Cache, registrar: ScriptedRegistrar) -> None:
        self.cache, self.registrar, self.block = cache, registrar, Block(8 * PAGE)
        self.asked = self.block.part(2 * PAGE, 2 * PAGE)
        cache.get(self.asked)
        self.held: list[usermm.Registration] = []

    def hold(self) -> None:
        self.held.append(self.cache.get(self.asked))

    def lose(self) -> None:
        self.block.discard()

    def pages(self, first: int, end: int) -> Any:
        return self.block.part(first * PAGE, (end - first) * PAGE)


def _same(scene: Scene) -> object:
    return scene.asked


def _same_after_loss(scene: Scene) -> object:
    scene.lose()
    return scene.asked


def _same_after_loss_while_held(scene: Scene) -> object:
    scene.hold()
    scene.lose()
    return scene.asked


def _same_after_eviction(scene: Scene) -> object:
    scene.cache.evict(scene.asked)
    return scene.asked


def _same_after_eviction_while_held(scene: Scene) -> object:
    """Registered anew by another object meanwhile: it asked before, but for another registration."""
    scene.hold()
    scene.cache.evict(scene.asked)
    scene.cache.get(scene.pages(2, 4))
    return scene.asked


def _same_elsewhere(scene: Scene) -> object:
    scene.asked.address += PAGE
    scene.asked.size -= PAGE
    return scene.asked


def _another(scene: Scene) -> object:
    return scene.block.part(2 * PAGE, 5)


def _overlapping(scene: Scene) -> object:
    return scene.pages(3, 5)


def _overlapping_held(scene: Scene) -> object:
    scene.hold()
    return scene.pages(3, 5)


def _overlapping_dead(scene: Scene) -> object:
    """It left the look-up, but somebody holds it still."""
    scene.hold()
    scene.lose()
    return scene.pages(3, 5)


def _elsewhere_held(scene: Scene) -> object:
    scene.hold()
    return scene.pages(6, 7)


def _elsewhere(scene: Scene) -> object:
    return scene.pages(6, 7)


def _across_a_border(scene: Scene) -> object:
    return scene.block.part(6 * PAGE - 50, 100)


def _whole(scene: Scene) -> object:
    return scene.block


HERE = "this very object asked before, so no system call is needed"
NEW = "this object did not ask before or cannot be remembered, so one system call asks for a quiet moment"

SCENES: list[tuple[Callable[[Scene], object], Traits, dict[str, int], str, str]] = [
    (_same, Traits(), {}, "hit", HERE),
    (_another, Traits(), {}, "hit", NEW),
    (_same_elsewhere, Traits(), {}, "hit", NEW),
    (_same_after_loss, Traits(), {}, "miss", "nothing there overlaps"),
    (_same_after_loss_while_held, Traits(), {}, "miss", "nothing there overlaps"),
    (_same_after_eviction, Traits(), {}, "miss", "nothing there overlaps"),
    (_same_after_eviction_while_held, Traits(), {}, "hit", NEW),
    (_elsewhere, Traits(), {}, "miss", "nothing there overlaps"),
    (_elsewhere, Traits(), {"max_count": 1}, "miss", "1 of 1 registrations are in use, so another makes room first"),
    (_elsewhere, Traits(), {"max_bytes": 2 * PAGE}, "miss", f"{2 * PAGE} of {2 * PAGE} bytes are in use, so others"),
    (_elsewhere, Traits(), {"max_bytes": 3 * PAGE}, "miss", "nothing there overlaps"),
    (_across_a_border, ROUNDED, {"max_bytes": 3 * PAGE}, "miss", "so others make room first"),
    (_overlapping, Traits(), {}, "miss", "may stay beside it"),
    (_overlapping, MERGED, {}, "miss", "give way to one registration of them all"),
    (_overlapping, REFUSED, {}, "miss", "give way to one registration of them all"),
    (_overlapping_held, MERGED, {}, "miss", "give way to one registration of them all"),
    (_overlapping_held, REFUSED, {}, "refused", "the device refuses overlaps: release what is held first"),
    (_overlapping_dead, REFUSED, {}, "refused", "held"),
    (_elsewhere_held, Traits(), {"max_count": 1}, "refused", "held"),
    (_elsewhere_held, Traits(), {"max_bytes": 2 * PAGE}, "refused", "held"),
    (_whole, Traits(), {"max_bytes": 7 * PAGE}, "refused", f"cannot be: more than the cache's max_bytes, {7 * PAGE}"),
    (_whole, Traits(max_length_bytes=7 * PAGE), {}, "refused", f"and cannot be: the device takes {7 * PAGE} bytes"),
    (_across_a_border, Traits(granularity_bytes=PAGE, max_length_bytes=2 * PAGE), {"max_bytes": 2 * PAGE}, "miss", ""),
]


def _outcome(cache: Cache, buffer: object) -> tuple[str, bool]:
    """What the get does, and whether it asks for a quiet moment."""
    before = cache.stats()
    try:
        cache.get(buffer)
    except usermm.UsermmError:
        return "refused", True
    after = cache.stats()
    return "hit" if after.hits > before.hits else "miss", after.probes > before.probes


@pytest.mark.parametrize(
    ("arrange", "traits", "limits", "outcome", "words"),
    SCENES,
    ids=[f"{scene[0].__name__[1:]}, {scene[1].overlap.value}, {scene[2]}" for scene in SCENES],
)
def test_it_says_what_then_happens(
    arrange: Callable[[Scene], object], traits: Traits, limits: dict[str, int], outcome: str, words: str
) -> None:
    registrar = ScriptedRegistrar(traits)
    with cache_over(registrar, linger_s=None, **limits) as cache:
        scene = Scene(cache, registrar)
        buffer = arrange(scene)
        text = cache.explain(buffer)
        assert words in text
        assert "\n" not in text
        assert text == cache.explain(buffer), "asking changes nothing"
        happened, probed = _outcome(cache, buffer)
        assert happened == outcome
        assert text.startswith("hit: " if outcome == "hit" else "miss: ")
        if outcome == "hit":
            assert probed == ("one system call" in text)
        scene.held.clear()


def test_it_names_the_registration() -> None:
    registrar, block = ScriptedRegistrar(), Block(2 * PAGE)
    registrar.at_register(1, returns="the handle")
    with cache_over(registrar) as cache:
        with cache.get(block), cache.get(block):
            registered = f"the registration of {2 * PAGE} bytes at {block.address:#x} (handle 'the handle', held "
            assert f"hit: 5 bytes at {block.address + 7:#x} are inside {registered}2 times)" in cache.explain(
                block.part(7, 5)
            )
        assert f"{registered}by nobody)" in cache.explain(block)
        text = cache.explain(block.part(PAGE, 2 * PAGE))
        assert f"1 that overlap, the first {registered}by nobody), may stay beside it" in text


def test_it_asks_no_more_of_a_buffer_than_get() -> None:
    """A view that this device may not write to is refused, though the memory is registered."""
    memory = bytearray(5000)
    frozen = memoryview(memory).toreadonly()
    with cache_over(ScriptedRegistrar()) as cache:
        cache.get(memory)
        refused_line(lambda: cache.explain(frozen), ArgumentError)
    with cache_over(ScriptedRegistrar(Traits(writes=False))) as cache:
        cache.get(frozen)
        assert cache.explain(frozen).startswith("hit")


@pytest.mark.parametrize("buffer", [None, 5, b"", np.zeros((4, 4))[:, ::2]], ids=["None", "number", "empty", "gaps"])
def test_what_get_refuses(buffer: object) -> None:
    with cache_over(ScriptedRegistrar()) as cache:
        lines = []
        for call in (cache.get, cache.explain):
            with pytest.raises((usermm.ArgumentError, usermm.ArgumentTypeError)) as caught:
                call(buffer)
            lines.append(str(caught.value))
        assert lines[0].split(":")[0] == lines[1].split(":")[0]


def test_a_closed_cache() -> None:
    block = Block()
    cache = usermm.RegistrationCache(ScriptedRegistrar())
    cache.get(block)
    cache.close()
    assert "the cache is closed" in refused_line(lambda: cache.explain(block), usermm.ClosedError)


def test_it_registers_nothing_and_holds_nothing() -> None:
    registrar, block = ScriptedRegistrar(), Block()
    with cache_over(registrar) as cache:
        for _ in range(3):
            cache.explain(block)
        assert registrar.calls == []
        cache.get(block)
        before = cache.stats()
        for _ in range(3):
            cache.explain(block)
        assert cache.stats() == before
