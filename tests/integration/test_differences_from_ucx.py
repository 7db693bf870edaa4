"""Each row of docs/differences-from-ucx.md, on both sides: what UCX 1.22's ucs_rcache does, and what usermm's cache.

UCX cannot be unloaded: each story runs in a process of its own, which is this file with the story's name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import ucx_rcache
from support.arena import Arena
from support.available import needs_userfaultfd
from support.processes import SOURCE
from support.ucx_rcache import UcxCache

import usermm
from usermm.registrars import Overlap, Traits
from usermm.testing import ScriptedRegistrar

PAGE = 4096
MERGED = Traits(overlap=Overlap.MERGED, granularity_bytes=PAGE)


class Pages:
    """Some pages of an arena, counted from 0."""

    def __init__(self, arena: Arena, first: int, count: int = 1) -> None:
        self.address = arena.start + first * PAGE
        self.size = count * PAGE


class Ours:
    def __init__(self, traits: Traits = MERGED, **limits: int) -> None:
        self.device = ScriptedRegistrar(traits)
        self.cache = usermm.RegistrationCache(self.device, linger_s=None, **limits)
        self.cache.upkeep_due = False

    def keep(self, pages: Pages) -> bool:
        """Leaves it there, idle. Whether it was there before."""
        before = self.cache.stats().hits
        self.cache.get(pages).release()
        return self.cache.stats().hits > before


class Theirs(UcxCache):
    def keep(self, pages: Pages) -> bool:
        before = self.registered
        self.put(self.get(pages.address, pages.size))
        return self.registered == before


@contextlib.contextmanager
def memory(count: int = 20) -> Iterator[Arena]:
    arena = Arena()
    arena.mmap(arena.start, count * PAGE)
    yield arena
    arena.close()


# The stories, in the table's order


def late(shared_object: Path) -> None:
    """What is idle and has lost its memory is deregistered by UCX in the next get that misses."""
    with memory() as arena:
        ours, theirs, first, other, third = Ours(), Theirs(shared_object, PAGE), *(Pages(arena, n) for n in (0, 2, 4))
        for cache in (ours, theirs):
            cache.keep(first)
            cache.keep(other)
        arena.mmap(first.address, PAGE)
        theirs.invalidate(first.address, PAGE)
        assert (ours.keep(other), theirs.keep(other)) == (True, True)
        assert (len(ours.device.live), theirs.live) == (1, 2)
        theirs.keep(third)
        assert theirs.live == 2


def limits(shared_object: Path) -> None:
    """UCX passes its limits while regions are held, and afterwards until the next registration."""
    with memory() as arena:
        ours, theirs = Ours(max_count=2), Theirs(shared_object, PAGE, max_regions=2)
        pages = [Pages(arena, 2 * number) for number in range(4)]
        regions = [theirs.get(each.address, PAGE) for each in pages]
        with ours.cache.get(pages[0]), ours.cache.get(pages[1]), pytest.raises(usermm.LimitError):
            ours.cache.get(pages[2])
        assert theirs.live == 4
        for region in regions:
            theirs.put(region)
        assert theirs.live == 4
        theirs.keep(Pages(arena, 10))
        assert (theirs.live, ours.device.peak_count) == (2, 2)


def order(shared_object: Path) -> None:
    """All were asked for again, the first one last: UCX gives up the second one, ours the first."""
    with memory() as arena:
        ours, theirs = Ours(max_count=3), Theirs(shared_object, PAGE, max_regions=3)
        first, second, third, fourth = (Pages(arena, 2 * number) for number in range(4))
        for cache in (ours, theirs):
            for pages in (first, second, third, second, third, first, fourth):
                cache.keep(pages)
        assert [pin.address for pin in ours.device.live] == [second.address, third.address, fourth.address]
        assert (theirs.keep(first), theirs.keep(second)) == (True, False)


def unused_goes_first(shared_object: Path) -> None:
    """No difference: where one was never asked for again, both give up that one."""
    with memory() as arena:
        first, second, third, fourth = (Pages(arena, 2 * number) for number in range(4))
        for cache in (Ours(max_count=3), Theirs(shared_object, PAGE, max_regions=3)):
            for pages in (first, second, third, first, third, fourth):
                cache.keep(pages)
            assert (cache.keep(first), cache.keep(third), cache.keep(second)) == (True, True, False)


def neighbours(shared_object: Path) -> None:
    """UCX merges what overlaps, ours what touches, too, if the device wants that."""
    with memory() as arena:
        adjacent = Traits(overlap=Overlap.MERGED, granularity_bytes=PAGE, merge_adjacent=True)
        ours, plain, theirs = Ours(adjacent), Ours(), Theirs(shared_object, PAGE)
        for cache in (ours, plain, theirs):
            cache.keep(Pages(arena, 0))
            cache.keep(Pages(arena, 1))
        assert (len(ours.device.live), len(plain.device.live), theirs.live) == (1, 2, 2)


def overlaps(shared_object: Path) -> None:
    """What is held and overlaps: UCX registers the union beside it. Ours does what the device can."""
    with memory() as arena:
        whole, part = Pages(arena, 0, 3), Pages(arena, 2, 3)
        theirs = Theirs(shared_object, PAGE)
        held = theirs.get(whole.address, whole.size)
        union = theirs.get(part.address, part.size)
        assert (union.contents.end - union.contents.start, theirs.live) == (5 * PAGE, 2)
        for overlap, pages in ((Overlap.MERGED, 5), (Overlap.ALLOWED, 3), (Overlap.REFUSED, 0)):
            ours = Ours(Traits(overlap=overlap))
            with ours.cache.get(whole):
                refused = pytest.raises(usermm.OverlapError) if overlap is Overlap.REFUSED else contextlib.nullcontext()
                with refused, ours.cache.get(part) as registration:
                    assert registration.length == pages * PAGE
        theirs.put(held)
        theirs.put(union)


def holes(shared_object: Path) -> None:
    """For memory that is not mapped UCX asks the device, and gives up what overlaps; ours does neither."""
    with memory(count=2) as arena:
        ours, theirs, beyond = Ours(), Theirs(shared_object, PAGE), Pages(arena, 1, 2)
        for cache in (ours, theirs):
            cache.keep(Pages(arena, 1))
        theirs.keep(beyond)
        with pytest.raises(usermm.DeviceError) as caught:
            ours.keep(beyond)
        assert caught.value.errno == errno.EFAULT
        assert (len(ours.device.calls), theirs.registered) == (1, 2)
        assert ours.keep(Pages(arena, 1))


def bytes_(shared_object: Path) -> None:
    """Three bytes: UCX's smallest region has 16, ours what the device can take. None: UCX fails, or finds a region."""
    with memory() as arena:
        ours, theirs, three = Ours(Traits()), Theirs(shared_object, 16), Pages(arena, 0)
        three.size = 3
        region = theirs.get(three.address + 5, three.size)
        with ours.cache.get(three) as registration:
            assert (region.contents.end - region.contents.start, registration.length) == (16, 3)
        theirs.put(region)
        three.address, three.size = three.address + PAGE, 0
        with pytest.raises(usermm.ArgumentError):
            ours.keep(three)
        with pytest.raises(AssertionError, match="ucs_rcache_get refused"):
            theirs.keep(three)


STORIES: dict[str, Callable[[Path], None]] = {
    story.__name__: story for story in (late, limits, order, unused_goes_first, neighbours, overlaps, holes, bytes_)
}


@pytest.fixture(scope="module")
def shared_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = ucx_rcache.missing()
    if reason is not None:
        pytest.skip(f"nothing to compare with: {reason}")
    return ucx_rcache.build(tmp_path_factory.mktemp("ucx"))


@needs_userfaultfd
@pytest.mark.parametrize("story", sorted(STORIES))
def test_a_difference(story: str, shared_object: Path) -> None:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(SOURCE)])
    done = subprocess.run(
        [sys.executable, __file__, story, str(shared_object)],
        env={**os.environ, "PYTHONPATH": path, "UCX_LOG_LEVEL": "fatal"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    STORIES[sys.argv[1]](Path(sys.argv[2]))
