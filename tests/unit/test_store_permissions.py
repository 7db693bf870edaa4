"""Who may do what with a node: owner, entries, everybody else, domain 0 and control domains, those who have gone."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from support.stores import World, refused, world

from usermm.errors import ArgumentError, ArgumentTypeError, BadReferenceError, PermissionDeniedError
from usermm.grants.store import Nodes, Store

READING: list[Callable[[Nodes, str], object]] = [Nodes.read, Nodes.list, Nodes.permissions, Nodes.exists]
WRITING: list[Callable[[Nodes, str], object]] = [lambda nodes, path: nodes.write(path, b""), Nodes.mkdir]
DOOR = "/local/domain/5/door"


@pytest.fixture
def here() -> Iterator[World]:
    with world() as here:
        yield here


@pytest.fixture
def owner(here: World) -> Store:
    store = here.arrive(5)
    store.write("door", b"closed")
    return store


@pytest.fixture
def other(here: World) -> Store:
    return here.arrive(6)


@pytest.mark.parametrize("entry", [False, True], ids=["everybody", "by name"])
@pytest.mark.parametrize("access", "nrwb")
def test_what_letters_allow(owner: Store, other: Store, access: str, entry: bool) -> None:
    reads, writes = access in "rb", access in "wb"
    if entry:
        owner.set_permissions("door", (5, "n"), (6, access))
    else:
        owner.set_permissions("door", (5, access))
    for nodes in (other, other.transaction()):
        for calls, allowed in ((READING, reads), (WRITING, writes)):
            for call in calls:
                if allowed:
                    call(nodes, DOOR)
                else:
                    with pytest.raises(PermissionDeniedError):
                        call(nodes, DOOR)
        with refused(errno.EACCES):
            nodes.set_permissions(DOOR, (5, "b"))
        if writes:
            nodes.write(f"{DOOR}/handle", b"")
            nodes.remove(f"{DOOR}/handle")
        else:
            with refused(errno.EACCES):
                nodes.write(f"{DOOR}/handle", b"")
            with refused(errno.EACCES):
                nodes.remove(DOOR)


def test_who_may_write_like_everybody_else_takes_nothing_away(here: World, owner: Store, other: Store) -> None:
    """Neither the directory nor what a third one put there, also within a transaction."""
    third = here.arrive(7)
    owner.set_permissions("door", (5, "b"))
    third.write(f"{DOOR}/note", b"of 7, who has not said yet who may write it")
    for nodes in (other, other.transaction()):
        nodes.write(f"{DOOR}/own", b"")
        for path in (DOOR, f"{DOOR}/note"):
            with refused(errno.EACCES):
                nodes.remove(path)
        nodes.remove(f"{DOOR}/own")
    third.set_permissions(f"{DOOR}/note", (7, "n"))
    owner.remove("door/note")  # who has the directory may
    third.write(f"{DOOR}/note", b"")
    third.remove(f"{DOOR}/note")


@pytest.mark.parametrize("access", "nrwb")
def test_whom_a_directory_names_may_remove_what_it_may_write(
    here: World, owner: Store, other: Store, access: str
) -> None:
    here.arrive(7)
    owner.set_permissions("door", (5, "n"), (6, "b"))
    owner.write("door/note", b"")
    owner.set_permissions("door/note", (5, "n"), (6, access))
    if access in "wb":
        other.remove(f"{DOOR}/note")
        assert not owner.exists("door/note")
    else:
        with refused(errno.EACCES):
            other.remove(f"{DOOR}/note")
    with refused(errno.EACCES):
        other.remove(DOOR)  # which the home's list would have to say


def test_a_removal_relies_on_the_directorys_list(owner: Store, other: Store) -> None:
    owner.set_permissions("door", (5, "n"), (6, "b"))
    owner.write("door/note", b"")
    transaction = other.transaction()
    transaction.remove(f"{DOOR}/note")
    owner.set_permissions("door", (5, "n"))
    with refused(errno.EAGAIN):
        transaction.commit()


def test_the_owner_may_everything_whatever_the_letters_say(owner: Store) -> None:
    owner.set_permissions("door", (5, "n"), (5, "n"))
    owner.write("door", b"open")
    assert owner.read("door") == b"open"
    owner.remove("door")


def test_the_first_entry_for_a_domain_counts(owner: Store, other: Store) -> None:
    owner.set_permissions("door", (5, "b"), (6, "n"), (6, "b"))
    with refused(errno.EACCES):
        other.read(DOOR)


@pytest.mark.parametrize("domid", [0, 9])
def test_domain_0_and_control_domains_pass(here: World, owner: Store, domid: int) -> None:
    control = here.arrive(domid, control=domid != 0)
    control.write(DOOR, b"open")
    control.set_permissions(DOOR, (5, "n"), (domid, "r"))
    assert (control.read(DOOR), owner.read("door")) == (b"open", b"open")
    control.remove(DOOR)
    assert not owner.exists("door")


def test_what_a_control_domain_puts_into_a_home_is_the_domains(here: World, owner: Store) -> None:
    here.arrive(0).write("/local/domain/5/device/ring", b"8")
    assert owner.permissions("device/ring") == [(5, "n")]
    owner.write("device/ring", b"9")


def test_children_inherit_and_belong_to_who_made_them(owner: Store, other: Store) -> None:
    owner.set_permissions("door", (5, "r"), (6, "b"))
    other.write(f"{DOOR}/of6/deep", b"")
    assert other.permissions(f"{DOOR}/of6/deep") == [(6, "r"), (6, "b")]
    assert owner.read("door/of6/deep") == b""
    with refused(errno.EACCES):
        owner.write("door/of6/deep", b"")
    owner.remove("door")  # who may write a node may remove what is below, whosever it is
    with refused(errno.EACCES):
        other.exists(f"{DOOR}/of6")  # gone, and the home above is not 6's to read


@pytest.mark.usefixtures("owner")
def test_what_is_hidden_is_not_told_from_what_is_not_there(other: Store) -> None:
    for path in (DOOR, "/local/domain/5/nothing", "/local/domain/5/nothing/below"):
        for call in (*READING, *WRITING, Nodes.remove):
            with refused(errno.EACCES):
                call(other, path)
    with refused(errno.ENOENT):
        other.read("/local/domain/77")  # who is there is no secret


def test_only_a_control_domain_gives_a_node_away(here: World, owner: Store, other: Store) -> None:
    with refused(errno.EPERM):
        owner.set_permissions("door", (6, "n"))
    here.arrive(0).set_permissions(DOOR, (6, "n"))
    other.write(DOOR, b"mine")
    with refused(errno.EACCES):
        owner.read("door")


def test_a_domain_that_is_not_there_gets_no_permission(owner: Store) -> None:
    with pytest.raises(BadReferenceError, match="there is no domain 6"):
        owner.set_permissions("door", (5, "n"), (6, "r"))
    assert owner.permissions("door") == [(5, "n")]


def test_a_later_domain_of_the_same_number_has_no_old_permissions(here: World, owner: Store) -> None:
    """A number is used again, by another program of maybe another user: it must not find doors open."""
    here.arrive(6)
    owner.set_permissions("door", (5, "n"), (6, "b"))
    here.leave(6)
    again = here.arrive(6)
    with refused(errno.EACCES):
        again.read(DOOR)
    assert owner.permissions("door") == [(5, "n")]
    owner.write("door/below", b"")
    with refused(errno.EACCES):
        again.read(f"{DOOR}/below")  # nor does what was made after it came bring them back


def test_bad_lists(owner: Store) -> None:
    with pytest.raises(ArgumentError, match="owner's entry first"):
        owner.set_permissions("door")
    with pytest.raises(ArgumentError, match="is not one of n, r, w and b"):
        owner.set_permissions("door", (5, "rw"))
    with pytest.raises(ArgumentError, match="domid must be in"):
        owner.set_permissions("door", (0x7FF0, "r"))
    with pytest.raises(ArgumentTypeError, match="domid must be an int"):
        owner.set_permissions("door", ("5", "r"))  # type: ignore[arg-type]
    with refused(errno.EDQUOT):
        owner.set_permissions("door", *[(5, "n")] * 33)
    owner.set_permissions("door", *[(5, "n")] * 32)
