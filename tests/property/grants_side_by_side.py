"""The grant devices' model and the real ones, step by step: one operation goes to all, and all must say the same.

What is compared: the result or the errno of every call, and after each step every page that anybody maps.
References and addresses differ between the worlds; what names them here is their place in a list. Left out, as one way
is as good as the other: mapping ended grants of a domain that still maps them itself, and the limit on pages.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from conformance.grants_client import PRIVATE, READ, READ_WRITE, SHARED, Owner, User, User2007
from conformance.grants_world import PAGE, DomainDriver, World, eventually
from conformance.grants_world_model import ModelWorld
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE

DOMAINS = 3
picks = st.integers(0, 1000)
domains = st.integers(0, DOMAINS - 1)
counts = st.sampled_from([1, 1, 2, 3])
protections = st.sampled_from([*[(READ, SHARED), (READ_WRITE, SHARED), (READ, PRIVATE)] * 3, (READ_WRITE, PRIVATE)])
small = st.integers(0, 12)


class Party:
    """One domain in one world: its driver and a file of each device."""

    def __init__(self, driver: DomainDriver) -> None:
        self.driver = driver
        self.owner = Owner(driver)
        self.mainline = User(driver)
        self.seed = User2007(driver)


class Mapping:
    """The same mapping in every world: the domain it is in, its addresses, its pages; `mine`: by gntalloc."""

    def __init__(self, domain: int, addresses: Sequence[int], pages: int, device: str) -> None:
        self.domain, self.addresses, self.pages, self.device = domain, addresses, pages, device


class Grant:
    """A page that was granted: (domid, reference) in every world."""

    def __init__(self, domain: int, grantee: int, names: Sequence[tuple[int, int]], index: int) -> None:
        self.domain, self.grantee, self.names, self.index = domain, grantee, names, index
        self.listed = True
        self.local = 0


class GrantsSideBySide(RuleBasedStateMachine):
    """With the model alone the same steps check that it never contradicts itself."""

    kinds: ClassVar[tuple[type[World], ...]] = (ModelWorld,)

    @initialize()
    def begin(self) -> None:
        self.ends = contextlib.ExitStack()
        self.worlds = [self.ends.enter_context(contextlib.closing(kind())) for kind in self.kinds]
        self.parties = [[self.make(world) for world in self.worlds] for _ in range(DOMAINS)]
        self.grants: list[Grant] = []
        self.mappings: list[Mapping] = []
        self.maps: list[list[tuple[Sequence[int], int]]] = [[] for _ in range(DOMAINS)]

    def make(self, world: World) -> Party:
        return Party(world.make_domain())

    def teardown(self) -> None:
        if hasattr(self, "ends"):
            self.ends.close()

    # One call in all worlds

    def agree(self, domain: int, call: Callable[[Party, int], Any], *, same: bool = True) -> list[Any] | None:
        """The results, or None when all refused alike. `same`: they are equal, not only all successes."""
        results = [outcome(call, party, at) for at, party in enumerate(self.parties[domain])]
        for party in self.parties[domain]:
            party.driver.settle()
        refusals = [each if isinstance(each, Refused) else None for each in results]
        assert len(set(refusals)) == 1, f"the worlds disagree: {results}"
        if refusals[0] is not None:
            return None
        if same:
            assert all(each == results[0] for each in results), f"the worlds disagree: {results}"
        return results

    def grant(self, domain: int, pick: int) -> Grant | None:
        """Mostly one that `domain` can map."""
        granted = [each for each in self.grants if each.grantee == domain and each.listed]
        among = granted if granted and pick % 10 != 9 else self.grants
        return among[pick % len(among)] if among else None

    def references(self, domain: int, chosen: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each world; what nobody granted, too."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.worlds]
        for pick in chosen:
            grant = self.grant(domain, pick)
            for at, world in enumerate(self.worlds):
                bogus = (world.unused_domid, 8) if pick % 2 else (self.parties[0][at].driver.domid, 0xFFFF_FFF0)
                found[at].append(bogus if grant is None or pick % 17 == 16 or self.is_vague(grant) else grant.names[at])
        return found

    def is_vague(self, grant: Grant) -> bool:
        return not grant.listed and grant.local > 0

    # gntalloc

    @rule(domain=domains, grantee=domains, count=counts, writable=st.sampled_from([True, True, False]))
    def allocate(self, domain: int, grantee: int, count: int, writable: bool) -> None:
        """The owner maps all of it, as owners do."""
        made = self.agree(
            domain,
            lambda party, at: party.owner.alloc(self.parties[grantee][at].driver.domid, count, writable=writable),
            same=False,
        )
        assert made is not None
        assert len({each.index for each in made}) == 1
        new = [
            Grant(domain, grantee, [each.granted[page] for each in made], made[0].index + page * PAGE)
            for page in range(count)
        ]
        self.grants += new
        self.map_own(domain, new, made[0].index, count)

    def map_own(self, domain: int, covered: Sequence[Grant], index: int, count: int) -> None:
        addresses = self.agree(domain, lambda party, _: party.owner.map(index, count), same=False)
        if addresses is not None:
            mapping = Mapping(domain, addresses, count, "owner")
            self.mappings.append(mapping)
            mapping.covered = list(covered)  # type: ignore[attr-defined]
            for grant in covered:
                grant.local += 1
            full = b"\xff" * (count * PAGE)  # so that a byte that is cleared is seen
            self.agree(domain, lambda party, at: party.driver.poke(addresses[at], full))

    @precondition(lambda self: self.grants)
    @rule(pick=picks, count=st.integers(0, 3))
    def deallocate(self, pick: int, count: int) -> None:
        grant = self.grants[pick % len(self.grants)]
        if self.agree(grant.domain, lambda party, _: party.owner.dealloc(grant.index, count)) is not None:
            for each in self.grants:
                if each.domain == grant.domain and 0 <= each.index - grant.index < count * PAGE:
                    each.listed = False

    @precondition(lambda self: self.grants)
    @rule(pick=picks)
    def revoke(self, pick: int) -> None:
        """Of pages that their owner maps once: more than one mapping cannot keep the content in step."""
        grant = self.grants[pick % len(self.grants)]
        if not (grant.listed and grant.local == 1):
            return
        done = self.agree(
            grant.domain, lambda party, at: party.driver.revoke(party.owner.file, grant.names[at][1]), same=False
        )
        if done is not None:
            grant.local += 1000  # never again

    @precondition(lambda self: self.grants)
    @rule(pick=picks, byte=st.integers(0, PAGE - 1), action=st.sampled_from([0, NOTIFY_CLEAR_BYTE, 4]))
    def notify_owner(self, pick: int, byte: int, action: int) -> None:
        grant = self.grants[pick % len(self.grants)]
        if grant.listed and grant.local < 1000:
            self.agree(grant.domain, lambda party, _: party.owner.notify(grant.index + byte, action))

    # gntdev, mainline

    @rule(domain=domains, chosen=st.lists(picks, min_size=1, max_size=3), how=protections)
    def map_mainline(self, domain: int, chosen: list[int], how: tuple[int, int]) -> None:
        named = self.references(domain, chosen)
        indices = self.agree(domain, lambda party, at: party.mainline.map_grant_ref(named[at]), same=False)
        assert indices is not None
        self.maps[domain].append((indices, len(chosen)))
        self.mmap_mainline(domain, len(self.maps[domain]) - 1, 0, how)

    @rule(domain=domains, pick=picks, more=st.sampled_from([0, 0, 0, 1, -1]), how=protections)
    def mmap_mainline(self, domain: int, pick: int, more: int, how: tuple[int, int]) -> None:
        if not self.maps[domain]:
            return
        indices, count = self.maps[domain][pick % len(self.maps[domain])]
        if count + more < 1:
            return
        self.keep(domain, "mainline", count, lambda party, at: party.mainline.mmap(indices[at], count + more, *how))

    @rule(domain=domains, pick=picks, more=st.sampled_from([0, 0, 1]))
    def unmap_mainline(self, domain: int, pick: int, more: int) -> None:
        if self.maps[domain]:
            indices, count = self.maps[domain][pick % len(self.maps[domain])]
            self.agree(domain, lambda party, at: party.mainline.unmap_grant_ref(indices[at], count + more))

    @rule(domain=domains, pick=picks, byte=st.integers(0, 2 * PAGE), action=st.integers(0, 1))
    def notify_mainline(self, domain: int, pick: int, byte: int, action: int) -> None:
        if self.maps[domain]:
            indices, _ = self.maps[domain][pick % len(self.maps[domain])]
            self.agree(domain, lambda party, at: party.mainline.notify(indices[at] + byte, action))

    # gntdev of 2007: slots are the same in every world

    @rule(domain=domains, chosen=st.lists(picks, min_size=0, max_size=4), repeat=st.sampled_from([1, 1, 2, 5, 15]))
    def take_slots(self, domain: int, chosen: list[int], repeat: int) -> None:
        named = self.references(domain, chosen)
        self.agree(domain, lambda party, at: party.seed.take(named[at] * repeat))

    @rule(domain=domains, slot=small, count=st.sampled_from([1, 1, 1, 2, 3, 0]), how=protections)
    def mmap_slots(self, domain: int, slot: int, count: int, how: tuple[int, int]) -> None:
        self.keep(domain, "seed", count, lambda party, _: party.seed.mmap(slot, count, *how))

    @rule(domain=domains, slot=st.sampled_from([*range(12), 100, 127, -1]), count=small)
    def free_slots(self, domain: int, slot: int, count: int) -> None:
        self.agree(domain, lambda party, _: party.seed.free(slot, count))

    # Memory

    def keep(self, domain: int, device: str, pages: int, call: Callable[[Party, int], Any]) -> None:
        addresses = self.agree(domain, call, same=False)
        if addresses is not None:
            self.mappings.append(Mapping(domain, addresses, pages, device))

    @precondition(lambda self: self.mappings)
    @rule(pick=picks, page=st.integers(0, 5), byte=st.integers(0, PAGE - 4), data=st.binary(min_size=1, max_size=3))
    def write(self, pick: int, page: int, byte: int, data: bytes) -> None:
        mapping = self.mappings[pick % len(self.mappings)]
        offset = page % mapping.pages * PAGE + byte
        self.agree(mapping.domain, lambda party, at: party.driver.poke(mapping.addresses[at] + offset, data))

    @precondition(lambda self: self.mappings)
    @rule(pick=picks)
    def munmap(self, pick: int) -> None:
        mapping = self.mappings.pop(pick % len(self.mappings))
        self.agree(
            mapping.domain,
            lambda party, at: getattr(party, mapping.device).file.munmap(mapping.addresses[at]),
        )
        for grant in getattr(mapping, "covered", []):
            grant.local -= 1

    @precondition(lambda self: self.mappings)
    @rule(pick=picks, byte=st.sampled_from([0, 0, 1, PAGE]))
    def where(self, pick: int, byte: int) -> None:
        """GET_OFFSET_FOR_VADDR of both devices."""
        mapping = self.mappings[pick % len(self.mappings)]
        if mapping.pages * PAGE <= byte:
            return
        self.agree(mapping.domain, lambda party, at: party.seed.offset_of(mapping.addresses[at] + byte))
        self.agree(
            mapping.domain,
            lambda party, at: party.mainline.offset_of(mapping.addresses[at] + byte)[1],
        )

    @rule(domain=domains)
    def crash(self, domain: int) -> None:
        """The domain ends, and another one comes."""
        gone = [party.driver.domid for party in self.parties[domain]]
        for party in self.parties[domain]:
            party.driver.crash()
        self.mappings = [each for each in self.mappings if each.domain != domain]
        self.maps[domain] = []
        self.grants = [each for each in self.grants if domain not in (each.domain, each.grantee)]
        witness = self.parties[(domain + 1) % DOMAINS]
        for at, party in enumerate(witness):
            assert eventually(lambda party=party, at=at: party.driver.has_ended(gone[at]))  # type: ignore[misc]
        self.parties[domain] = [self.make(world) for world in self.worlds]

    @precondition(lambda self: hasattr(self, "mappings"))
    @invariant()
    def contents_agree(self) -> None:
        for mapping in self.mappings:
            for page in range(mapping.pages):
                pages = [
                    outcome(self.page_of, party, mapping.addresses[at] + page * PAGE)
                    for at, party in enumerate(self.parties[mapping.domain])
                ]
                assert all(each == pages[0] for each in pages), f"page {page} of a {mapping.device} mapping differs"

    @staticmethod
    def page_of(party: Party, address: int) -> bytes:
        return party.driver.peek(address, PAGE)


class Refused(str):
    """The name of an errno."""

    __slots__ = ()


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        return Refused(errno.errorcode[error.errno or 0])
