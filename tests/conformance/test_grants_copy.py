"""GRANT_COPY of mainline: between granted pages and a process's memory, with a status for each segment."""

from __future__ import annotations

from collections.abc import Sequence

from conformance.grants_client import Owner, User
from conformance.grants_world import PAGE, World, errno_of

from usermm.uapi import xen_gntdev
from usermm.uapi.xen_gntdev import COPY_DEST_GRANTED, COPY_SOURCE_GRANTED, GrantStatus

Segment = tuple[bytes, bytes, int, int]
_NEVER = 99


def local(address: int) -> bytes:
    return xen_gntdev.COPY_LOCAL.pack(address)


def granted(reference: tuple[int, int], offset: int = 0) -> bytes:
    return xen_gntdev.COPY_GRANTED.pack(reference[1], offset, reference[0])


def copy(user: User, segments: Sequence[Segment]) -> list[int]:
    """The status of each."""
    pointer = user.domain.place(b"".join(xen_gntdev.SEGMENT.pack(*segment, _NEVER) for segment in segments))
    argument = bytearray(xen_gntdev.COPY.pack(len(segments), pointer))
    assert user.file.ioctl(xen_gntdev.GRANT_COPY, argument) == 0
    answered = user.domain.peek(pointer, len(segments) * xen_gntdev.SEGMENT.size) if segments else b""
    fields = list(xen_gntdev.SEGMENT.iter_unpack(answered))
    assert [tuple(each[:4]) for each in fields] == list(segments)
    return [status for *_, status in fields]


def test_from_a_grant(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"0123456789"])
    buffer = user.domain.place(bytes(16))
    assert copy(user, [(granted(made.granted[0], 3), local(buffer + 1), 4, COPY_SOURCE_GRANTED)]) == [0]
    assert user.domain.peek(buffer, 6) == b"\0003456\0"


def test_to_a_grant(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"0123456789"], writable=True)
    buffer = user.domain.place(b"abc")
    assert copy(user, [(local(buffer), granted(made.granted[0], 2), 3, COPY_DEST_GRANTED)]) == [0]
    assert owner.domain.peek(address, 10) == b"01abc56789"


def test_between_grants_of_two_domains(world: World, owner: Owner, user: User) -> None:
    another = Owner(world.make_domain())
    source, _ = owner.share(user.domain.domid, [b"from one to the other"])
    dest, address = another.share(user.domain.domid, [b""], writable=True)
    both = COPY_SOURCE_GRANTED | COPY_DEST_GRANTED
    assert copy(user, [(granted(source.granted[0]), granted(dest.granted[0], PAGE - 8), 8, both)]) == [0]
    assert another.domain.peek(address + PAGE - 8, 8) == b"from one"


def test_a_whole_page_and_nothing(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"x" * PAGE])
    buffer = user.domain.place(bytes(2 * PAGE))
    source = granted(made.granted[0])
    assert copy(user, [(source, local(buffer + 7), PAGE, COPY_SOURCE_GRANTED)]) == [0]
    assert user.domain.peek(buffer + 7, PAGE) == b"x" * PAGE
    assert copy(user, [(source, local(buffer), 0, COPY_SOURCE_GRANTED)]) == [0]
    assert copy(user, []) == []


def test_of_an_empty_segment_nothing_is_looked_at(user: User) -> None:
    nobody = granted((0x7E00, 0xFFFF_FFF0))
    nowhere = local(user.domain.bad_address)
    assert copy(user, [(nobody, nowhere, 0, COPY_SOURCE_GRANTED), (nowhere, nobody, 0, COPY_DEST_GRANTED)]) == [0, 0]
    assert errno_of(copy, user, [(local(0), local(0), 0, 0)]) == "EINVAL"


def test_other_flags_mean_nothing(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"0123"])
    buffer = user.domain.place(bytes(4))
    assert copy(user, [(granted(made.granted[0]), local(buffer), 4, 0xFFFC | COPY_SOURCE_GRANTED)]) == [0]
    assert user.domain.peek(buffer, 4) == b"0123"
    assert errno_of(copy, user, [(local(buffer), local(buffer), 4, 0xFFFC)]) == "EINVAL"


def test_what_a_domain_grants_to_itself_by_its_other_name(owner: Owner) -> None:
    """DOMID_SELF; MAP_GRANT_REF does not know it."""
    user = User(owner.domain)
    made, address = owner.share(owner.domain.domid, [b"0123"], writable=True)
    itself = (0x7FF0, made.references[0])
    buffer = user.domain.place(bytes(4))
    assert copy(user, [(granted(itself), local(buffer), 4, COPY_SOURCE_GRANTED)]) == [0]
    assert user.domain.peek(buffer, 4) == b"0123"
    assert copy(user, [(local(buffer + 2), granted(itself), 2, COPY_DEST_GRANTED)]) == [0]
    assert owner.domain.peek(address, 4) == b"2323"
    assert errno_of(user.map, [itself]) == "EINVAL"


def test_each_segment_has_a_status(world: World, owner: Owner, user: User) -> None:
    """One that fails is no reason for another to fail, and the call returns 0."""
    world.needs("several domains")
    good, _ = owner.share(user.domain.domid, [b"ab"])
    for_another = owner.alloc(world.make_domain().domid)
    buffer = user.domain.place(bytes(PAGE))
    references = [good.granted[0], (world.unused_domid, 8), (owner.domain.domid, 0xFFFF_FFF0), for_another.granted[0]]
    segments = [(granted(each), local(buffer), 1, COPY_SOURCE_GRANTED) for each in references]
    segments.append((local(buffer), granted(good.granted[0]), 1, COPY_DEST_GRANTED))
    segments.append((granted(good.granted[0], 1), local(buffer + 1), 1, COPY_SOURCE_GRANTED))
    status = copy(user, segments)
    assert status[:2] == [GrantStatus.OKAY, GrantStatus.BAD_DOMAIN]
    assert status[2] in (GrantStatus.BAD_REFERENCE, GrantStatus.GENERAL_ERROR)
    assert status[3] in (GrantStatus.BAD_REFERENCE, GrantStatus.PERMISSION_DENIED, GrantStatus.GENERAL_ERROR)
    assert status[4] in (GrantStatus.PERMISSION_DENIED, GrantStatus.GENERAL_ERROR)
    assert status[5] == GrantStatus.OKAY
    assert user.domain.peek(buffer, 2) == b"ab"


def test_local_to_local(user: User) -> None:
    buffer = user.domain.place(b"ab")
    assert errno_of(copy, user, [(local(buffer), local(buffer + 1), 1, 0)]) == "EINVAL"
    assert user.domain.peek(buffer, 2) == b"ab"


def test_across_the_end_of_a_granted_page(owner: Owner, user: User) -> None:
    made, address = owner.share(user.domain.domid, [b"a", b"b"], writable=True)
    buffer = user.domain.place(bytes(2 * PAGE))
    for offset, length in ((1, PAGE), (PAGE - 1, 2), (PAGE, 1), (0, PAGE + 1)):
        source = granted(made.granted[0], offset)
        assert errno_of(copy, user, [(source, local(buffer), length, COPY_SOURCE_GRANTED)]) == "EINVAL"
        assert errno_of(copy, user, [(local(buffer), source, length, COPY_DEST_GRANTED)]) == "EINVAL"
    assert owner.domain.peek(address + PAGE) == b"b"


def test_bad_pointers(owner: Owner, user: User) -> None:
    made, _ = owner.share(user.domain.domid, [b"a"], writable=True)
    nowhere = user.domain.bad_address
    assert errno_of(copy, user, [(granted(made.granted[0]), local(nowhere), 1, COPY_SOURCE_GRANTED)]) == "EFAULT"
    assert errno_of(copy, user, [(local(nowhere), granted(made.granted[0]), 1, COPY_DEST_GRANTED)]) == "EFAULT"
    argument = bytearray(xen_gntdev.COPY.pack(1, nowhere))
    assert errno_of(user.file.ioctl, xen_gntdev.GRANT_COPY, argument) == "EFAULT"


def test_copying_maps_nothing(owner: Owner, user: User) -> None:
    """The owner can end the grant at once, and the page is free."""
    made, _ = owner.share(user.domain.domid, [b"a"])
    buffer = user.domain.place(bytes(8))
    segment = granted(made.granted[0]), local(buffer), 1, COPY_SOURCE_GRANTED
    assert copy(user, [segment]) == [0]
    owner.file.munmap(owner.map(made.index))
    owner.dealloc(made.index)
