"""A grantee lets go by munmap, MAP_FIXED, mremap, fork or death: it is noticed at once here, for good over there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from support.available import why_not
from support.processes import fork

from usermm.errors import BadReferenceError, UnavailableError
from usermm.grants import session, watching
from usermm.grants.domain import Domain
from usermm.grants.gntdev import Gntdev, Mapping
from usermm.grants.session import Session
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import wire
from usermm.hypercalls.wire import Operation
from usermm.hypervisor.embedded import Hypervisor

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LIMIT_S = 1.0
MANY = 2000
A_WHILE_S = 0.05  # long after a wake-up would have come
GRANTOR, GRANTEE = 31, 32
MAYMOVE, FIXED = 1, 2  # linux/mman.h, of mremap
MAP_FIXED, MAP_ANONYMOUS, MAP_PRIVATE = 0x10, 0x20, 2

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def munmap(address: int, length: int) -> None:
    assert _libc.munmap(address, length) == 0


def map_over(address: int, length: int) -> None:
    assert _libc.mmap(address, length, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == address


def reserve(length: int) -> int:
    return int(_libc.mmap(None, length, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))


class World(NamedTuple):
    """A hypervisor, and two domains of this process."""

    socket: str
    grantor: Domain
    grantee: Domain

    def grants(self) -> list[dict[str, Any]]:
        """In the hypervisor's words."""
        found: list[dict[str, Any]] = session.status(self.socket)["grants"]
        return found

    def is_mapped(self) -> bool:
        return any(grant["mapped_by"] for grant in self.grants())

    def soon(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < end, f"not within {LIMIT_S} s: {self.grants()!r:.500}"
            time.sleep(0.005)


def refused(*_: object, **__: object) -> None:
    raise UnavailableError(errno.EPERM, "no userfaultfd in this test")


@pytest.fixture
def world() -> Iterator[World]:
    yield from made_world()


@pytest.fixture(params=["notified", "looking"])
def either_world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Also one whose process may not have a userfaultfd."""
    if request.param == "looking":
        monkeypatch.setattr(watching, "Ummunotify", refused)
    elif why_not():
        pytest.skip(f"needs userfaultfd: {why_not()}")
    yield from made_world()


def made_world() -> Iterator[World]:
    with (
        Hypervisor() as hypervisor,
        Domain(hypervisor.socket, domid=GRANTOR) as grantor,
        Domain(hypervisor.socket, domid=GRANTEE) as grantee,
    ):
        yield World(hypervisor.socket, grantor, grantee)


def unmapped_behind_its_back(mapping: Mapping) -> None:
    munmap(mapping.address, len(mapping))


def mapped_over(mapping: Mapping) -> None:
    map_over(mapping.address, len(mapping))


def moved_and_unmapped(mapping: Mapping) -> None:
    target = reserve(len(mapping))
    assert _libc.mremap(mapping.address, len(mapping), len(mapping), MAYMOVE | FIXED, target) == target
    munmap(target, len(mapping))


def in_pieces(mapping: Mapping) -> None:
    for page in reversed(range(len(mapping) // PAGE_BYTES)):
        assert mapping.is_mapped
        munmap(mapping.address + page * PAGE_BYTES, PAGE_BYTES)


WAYS = [unmapped_behind_its_back, mapped_over, moved_and_unmapped, in_pieces]


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
@pytest.mark.parametrize("way", WAYS)
def test_is_noticed_at_once_here_and_soon_there(
    either_world: World, way: Callable[[Mapping], None], writable: bool
) -> None:
    world = either_world
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 3, writable=writable)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references, writable=writable)
        address = mapping.address
        assert world.grantee.gntdev.get_offset_for_vaddr(address) == (mapping.index, 3)
        assert world.is_mapped()
        way(mapping)
        assert not mapping.is_mapped
        with pytest.raises(BadReferenceError):
            world.grantee.gntdev.get_offset_for_vaddr(address)
        world.soon(lambda: not world.is_mapped())
        mapping.close()  # nothing of what is there now
        if way is mapped_over:
            assert ctypes.string_at(address, 1) == b"\0"
            munmap(address, 3 * PAGE_BYTES)
        [grant] = world.grants()
        assert grant["count"] == 3 and not grant["released"]
    world.soon(lambda: not world.grants())


@pytest.mark.parametrize("way", [unmapped_behind_its_back, mapped_over, moved_and_unmapped])
def test_slots_of_2007_can_be_mapped_again_at_once(either_world: World, way: Callable[[Mapping], None]) -> None:
    """munmap makes a slot NOT_YET_MAPPED, whoever calls it; UNMAP_GRANT_REF is EBUSY before, and succeeds after."""
    world = either_world
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 2)) as pages:
        device: Gntdev = world.grantee.open_gntdev("seed2007")
        mapping = device.map(GRANTOR, pages.references)
        address = mapping.address
        way(mapping)
        again = device.mmap(mapping.index, 2)
        assert again.read(0, 1) == b"\0"
        again.close()
        mapping.close()
        if way is mapped_over:
            munmap(address, 2 * PAGE_BYTES)
        world.soon(lambda: not world.is_mapped())


def test_moved_memory_stays_mapped_in_the_hypervisors_eyes(world: World) -> None:
    """It is gone from where the device had mapped it, and whoever moved it still reads the grant."""
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 2)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references)
        length = len(mapping)
        target = reserve(length)
        assert _libc.mremap(mapping.address, length, length, MAYMOVE | FIXED, target) == target
        assert not mapping.is_mapped
        mapping.close()
        time.sleep(A_WHILE_S)
        assert world.is_mapped()
        pages.write(0, b"read by who moved it")
        assert ctypes.string_at(target, 4) == b"read"
        munmap(target, length)
        world.soon(lambda: not world.is_mapped())


def test_part_is_not_the_whole(either_world: World) -> None:
    world = either_world
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 3)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references)
        munmap(mapping.address + PAGE_BYTES, PAGE_BYTES)
        time.sleep(A_WHILE_S)
        assert mapping.is_mapped
        assert world.is_mapped()
        mapping.close()
        world.soon(lambda: not world.is_mapped())


def test_what_the_grantor_no_longer_has_is_not_taken_back(either_world: World) -> None:
    """Somebody mapped over a page of the allocation: revoking and closing touch nothing of what is there now."""
    pages = either_world.grantor.gntalloc.allocate(GRANTEE, 3, writable=True)
    mapping = either_world.grantee.gntdev.map(GRANTOR, pages.references)
    address = pages.address
    pages.write(0, b"first")
    map_over(address + PAGE_BYTES, PAGE_BYTES)
    ctypes.memset(address + PAGE_BYTES, 7, PAGE_BYTES)
    pages.revoke()
    assert mapping.read(0, 5) == bytes(5)
    assert pages.read(0, 5) == b"first"
    pages.close()
    assert ctypes.string_at(address + PAGE_BYTES, PAGE_BYTES) == b"\7" * PAGE_BYTES
    for page in (0, 2):
        assert not is_there(address + page * PAGE_BYTES)
    munmap(address + PAGE_BYTES, PAGE_BYTES)
    mapping.close()


def test_a_pool_that_somebody_tore_gives_no_more_pages(either_world: World) -> None:
    """Of the grantor's own: the page that was mapped over is gone, the others go on, and new ones come from a new pool.
    """
    allocate = either_world.grantor.gntalloc.allocate
    pages = [allocate(GRANTEE) for _ in range(5)][1:]  # the first is from no pool
    address = pages[2].address
    map_over(address, PAGE_BYTES)
    ctypes.memset(address, 7, PAGE_BYTES)
    assert [page.is_mapped for page in pages] == [True, True, False, True]
    more = [allocate(GRANTEE) for _ in range(40)]
    for page in (*more, pages[0]):
        page.write(0, b"used")
        with either_world.grantee.gntdev.map(GRANTOR, page.references) as mapping:
            assert mapping.read(0, 4) == b"used"
    pages[2].revoke()
    for page in (*more, *pages):
        page.close()
    del page, more, pages
    gc.collect()
    assert ctypes.string_at(address, PAGE_BYTES) == b"\7" * PAGE_BYTES
    munmap(address, PAGE_BYTES)


def test_a_page_that_was_taken_back_leaves_its_pool_whole(either_world: World) -> None:
    allocate = either_world.grantor.gntalloc.allocate
    _, page, another = allocate(GRANTEE), allocate(GRANTEE), allocate(GRANTEE)
    page.write(0, b"kept")
    page.revoke()
    assert page.is_mapped and another.is_mapped
    assert allocate(GRANTEE)._pool_mapping is page._pool_mapping is not None
    assert page.read(0, 4) == b"kept"


def test_what_could_not_be_looked_at_is_looked_at_later(either_world: World) -> None:
    """Without a free descriptor nobody can see what is left: nothing is unmapped then, and nothing is forgotten."""
    with closing(either_world.grantor.gntalloc.allocate(GRANTEE, 2)) as pages:
        mappings = [either_world.grantee.gntdev.map(GRANTOR, pages.references) for _ in range(2)]
        addresses = [mapping.address for mapping in mappings]
        with no_descriptors():
            for address in addresses:
                map_over(address, 2 * PAGE_BYTES)
                ctypes.memset(address, 7, 1)
            assert mappings[0].is_mapped in (True, False)  # the hypervisor here may just have closed a descriptor
            with contextlib.suppress(OSError):
                mappings[1].close()
        assert not mappings[0].is_mapped
        for mapping, address in zip(mappings, addresses, strict=True):
            mapping.close()
            assert ctypes.string_at(address, 1) == b"\7"
            munmap(address, 2 * PAGE_BYTES)
        either_world.soon(lambda: not either_world.is_mapped())


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    taken = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_revoked_allocation_is_still_mapped(either_world: World) -> None:
    pages = either_world.grantor.gntalloc.allocate(GRANTEE, 3)
    pages.write(PAGE_BYTES, b"kept")
    either_world.grantor.gntalloc.revoke(pages.references[1])
    assert pages.is_mapped
    pages.revoke()
    assert pages.is_mapped and pages.read(PAGE_BYTES, 4) == b"kept"
    address = pages.address
    pages.close()
    assert not any(is_there(address + page * PAGE_BYTES) for page in range(3))


@pytest.mark.parametrize("count", [1, 3], ids=["of a pool", "of its own"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_others_map_where_kept_pages_were_is_theirs(either_world: World, count: int, whole: bool) -> None:
    """Pages that were taken back are watched as the others are."""
    device = either_world.grantor.gntalloc
    device.allocate(GRANTEE).close()
    pages = device.allocate(GRANTEE, count)
    pages.write(0, b"kept")
    pages.revoke()
    hit = count if whole else 1
    address = pages.address
    map_over(address, hit * PAGE_BYTES)
    ctypes.memset(address, 77, PAGE_BYTES)
    assert pages.is_mapped == (hit < count)
    pages.close()
    gc.collect()
    assert ctypes.string_at(address, 4) == bytes([77] * 4)
    assert not any(is_there(address + page * PAGE_BYTES) for page in range(hit, count))
    munmap(address, hit * PAGE_BYTES)


def test_pages_that_are_taken_back_one_by_one(either_world: World) -> None:
    """Each is known by what it is now, whatever happens to the others."""
    device = either_world.grantor.gntalloc
    pages = device.allocate(GRANTEE, 4)
    for number, reference in enumerate(pages.references):
        pages.write(number * PAGE_BYTES, bytes([number]))
        device.revoke(reference)
    assert pages.is_mapped
    munmap(pages.address + PAGE_BYTES, PAGE_BYTES)
    assert pages.is_mapped and pages.read(2 * PAGE_BYTES, 1) == b"\2"
    address = pages.address
    pages.close()
    assert not any(is_there(address + page * PAGE_BYTES) for page in range(4))


def is_there(address: int) -> bool:
    return bool(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_BYTES), 0) == 0)  # MADV_NORMAL


def in_child(function: Callable[[], object]) -> int:
    """A forked child that runs `function` and then sleeps; its number."""
    read_end, write_end = os.pipe()
    child = fork()
    if child == 0:
        try:
            function()
            os.write(write_end, b"1")
            time.sleep(60)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 1) == b"1", "the child failed"
    finally:
        os.close(read_end)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
def test_forked_child_has_no_mapping(world: World, writable: bool) -> None:
    """MADV_DONTFORK: the child keeps nothing alive, and finds nothing at the address."""
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 1, writable=writable)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references, writable=writable)
        child = in_child(lambda: None)
        toucher = fork()
        if toucher == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.string_at(mapping.address, 1)
            os._exit(0)
        _, status = os.waitpid(toucher, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
        try:
            assert world.is_mapped()
            mapping.close()
            world.soon(lambda: not world.is_mapped())
        finally:
            end(child)


def test_child_that_forgets_its_copy_unmaps_nothing(world: World) -> None:
    """The object is there in the child, and other memory could be where its parent has the grant."""
    with closing(world.grantor.gntalloc.allocate(GRANTEE, 1)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references)

        def close_it() -> None:
            address = mapping.address
            map_over(address, PAGE_BYTES)
            ctypes.memset(address, 7, 1)
            mapping.close()
            assert ctypes.string_at(address, 1) == b"\7"

        end(in_child(close_it))
        assert mapping.is_mapped and world.is_mapped()
        assert mapping.read(0, 1) == b"\0"
        mapping.close()


class HostileClient:
    """Speaks the protocol and keeps what it is given."""

    def __init__(self, world: World, domid: int) -> None:
        self.session = Session(world.socket)
        self.session.call(Operation.HELLO, wire.HELLO.pack(wire.VERSION, domid, 0))

    def map(self, reference: int) -> tuple[int, int]:
        """A handle and a descriptor."""
        payload = layouts.MAP.pack(0, 0, 1) + layouts.RUN.pack(GRANTOR, reference, 1)
        answer, descriptors = self.session.call(Operation.MAP, payload)
        ((handle, *_),) = layouts.SEGMENT.iter_unpack(answer[layouts.MAPPED.size :])
        return handle, descriptors[0]


@pytest.fixture
def hostile(world: World) -> Iterator[HostileClient]:
    client = HostileClient(world, 66)
    yield client
    client.session.close()


def test_descriptor_that_is_kept_is_a_mapping(world: World, hostile: HostileClient) -> None:
    """It says that it unmapped, and lies: the lock tells. Once it does close it, without a word, it is gone."""
    with closing(world.grantor.gntalloc.allocate(66)) as pages:
        handle, descriptor = hostile.map(pages.references[0])
        hostile.session.call(Operation.UNMAPPED, layouts.HANDLE.pack(handle))
        time.sleep(A_WHILE_S)
        assert world.is_mapped()
        os.close(descriptor)
        world.soon(lambda: not world.is_mapped())


@pytest.fixture
def many_files() -> Iterator[int]:
    """How many descriptors this process may have besides those of its own."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield before[1] - 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_of_thousands_of_mappings_is_seen_to_go(many_files: int, world: World, hostile: HostileClient) -> None:
    """Looking at all of them takes long, and is done in parts; it is not given up, as it is where locks are strewn."""
    if many_files < MANY:
        pytest.skip(f"needs {MANY} more descriptors: raise ulimit -Hn")
    count = 500
    with closing(world.grantor.gntalloc.allocate(66, count)) as pages:
        descriptors = [hostile.map(pages.references[page % count])[1] for page in range(MANY)]

        def mapped() -> int:
            time.sleep(A_WHILE_S)  # each status is thousands of lines
            return sum(len(grant["mapped_by"]) for grant in world.grants())

        assert mapped() == MANY
        os.close(descriptors.pop(MANY // 3))  # without a word
        world.soon(lambda: mapped() == MANY - 1)
        for descriptor in descriptors:
            os.close(descriptor)
        world.soon(lambda: mapped() == 0)
        audit = session.status(world.socket)["audit"]
        assert not any(record["event"] == "slow" for record in audit)
    world.soon(lambda: not world.grants())


def test_descriptor_that_was_handed_on_is_a_mapping(world: World, hostile: HostileClient) -> None:
    """A copy in another process, of which the domain has nothing any more."""
    with closing(world.grantor.gntalloc.allocate(66)) as pages:
        handle, descriptor = hostile.map(pages.references[0])
        child = in_child(lambda: None)
        os.close(descriptor)
        hostile.session.call(Operation.UNMAPPED, layouts.HANDLE.pack(handle))
        time.sleep(A_WHILE_S)
        assert world.is_mapped()
        end(child)
        world.soon(lambda: not world.is_mapped())


def test_handle_of_another_domain_ends_nothing(world: World, hostile: HostileClient) -> None:
    with closing(world.grantor.gntalloc.allocate(GRANTEE)) as pages:
        mapping = world.grantee.gntdev.map(GRANTOR, pages.references)
        (grant,) = world.grants()
        ((handle,),) = [[held["handle"] for held in grant["mapped_by"]]]
        hostile.session.call(Operation.UNMAPPED, layouts.HANDLE.pack(handle))
        assert world.is_mapped()
        mapping.close()


def test_own_lock_beside_ours_keeps_nothing(world: World, hostile: HostileClient) -> None:
    """The client takes more locks on its own open file, also on bytes of other handles: they are gone with it."""
    with closing(world.grantor.gntalloc.allocate(66)) as pages:
        handle, descriptor = hostile.map(pages.references[0])
        other, kept = hostile.map(pages.references[0])
        everything = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(kept, fcntl.F_OFD_SETLK, everything)
        os.close(descriptor)
        time.sleep(A_WHILE_S)
        held = {each["handle"] for grant in world.grants() for each in grant["mapped_by"]}
        assert held == {handle, other}  # who locks our bytes keeps his own mapping charged, nobody else's
        os.close(kept)
        world.soon(lambda: not world.is_mapped())


@pytest.mark.parametrize("how", ["exit", "kill", "exec"])
def test_end_of_the_grantees_process(world: World, how: str) -> None:
    """It says nothing to anybody."""

    def grantee() -> None:
        domain = Domain(world.socket, domid=77)
        os.write(to_parent, b"1")
        reference = int(os.read(from_parent, 20))
        mapping = domain.gntdev.map(GRANTOR, reference, writable=True)
        domain.gntdev.set_unmap_notify(mapping.index + 5, clear_byte=True)
        os.write(to_parent, b"2")
        os.read(from_parent, 1)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exec":
            os.execv("/bin/sleep", ["sleep", "30"])
        os._exit(0)

    with closing(world.grantor.gntalloc.allocate(77, writable=True)) as pages:
        pages.write(0, b"abcdefgh")
        read_end, to_parent = os.pipe()
        from_parent, write_end = os.pipe()
        child = fork()
        if child == 0:
            grantee()
        try:
            assert os.read(read_end, 1) == b"1"
            os.write(write_end, b"%d" % pages.references[0])
            assert os.read(read_end, 1) == b"2"
            assert world.is_mapped()
            os.write(write_end, b"!")
            world.soon(lambda: not world.is_mapped())
            world.soon(lambda: pages.read(0, 8) == b"abcde\0gh")
        finally:
            end(child)
            for descriptor in (read_end, to_parent, from_parent, write_end):
                os.close(descriptor)
