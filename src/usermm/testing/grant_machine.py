"""`GrantMachine`: a machine with domains and what its hypervisor keeps for them: grant tables and event channels."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from usermm.errors import from_errno
from usermm.testing.grant_channels import EventChannels
from usermm.testing.grant_memory import ModelMapping, Page, UserMemory
from usermm.uapi.xen_gntalloc import FIRST_REFERENCE, LIMIT_PAGES
from usermm.uapi.xen_gntdev import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT, PAGE_BYTES, GrantStatus

DOMID_FIRST_RESERVED = 0x7FF0


class BadGrantError(Exception):
    """The hypervisor does not map or copy this grant. Devices turn the status into their own errno."""

    def __init__(self, status: GrantStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.index = 0
        """Of the first grant that was refused, among those asked for."""


@dataclass(frozen=True)
class Notification:
    """What happens once a page is no longer mapped: SET_UNMAP_NOTIFY's bits, with the byte's place in its page."""

    action: int = 0
    byte: int = 0
    port: int = 0


@dataclass(eq=False)
class Grant:
    """One entry of a grant table: one page, for one grantee, read-only or not."""

    reference: int
    grantor: ModelDomain
    grantee: int
    page: Page
    writable: bool
    ended: bool = False
    revoked: bool = False
    local_users: int = 0
    """The grantor's file that lists it, and the grantor's mappings."""
    remote: list[tuple[ModelMapping, int]] = field(default_factory=list)
    """Mappings of the grantee, with the page's index there."""
    local: list[tuple[ModelMapping, int]] = field(default_factory=list)


class File(Protocol):
    """An open device: the machine closes it when the domain ends."""

    def close(self) -> None: ...


class ModelDomain:
    """One domain with one process. `control`: it may bind virtual interrupts."""

    def __init__(self, machine: GrantMachine, domid: int, *, control: bool) -> None:
        self.machine = machine
        self.domid = domid
        self.control = control
        self.memory = UserMemory()
        self.grants: dict[int, Grant] = {}
        self.files: list[File] = []
        self.limit_pages = LIMIT_PAGES
        self.next_reference = FIRST_REFERENCE

    def grant(self, grantee: int, *, writable: bool) -> Grant:
        """A fresh page of zeros and its entry, under a reference that was never used before."""
        entry = Grant(self.next_reference, self, grantee, Page(PAGE_BYTES), writable)
        self.grants[entry.reference] = entry
        self.next_reference += 1
        return entry

    def end(self, entry: Grant) -> None:
        """Nobody can map it from here on. The page goes when the grantor's and the grantee's users are gone."""
        entry.ended = True
        self.settle(entry)

    def settle(self, entry: Grant) -> None:
        """Takes the entry out of the table if nothing keeps it. Ending a grant that is in use is deferred."""
        if entry.ended and not entry.local_users and not entry.remote:
            self.grants.pop(entry.reference, None)

    def revoke(self, reference: int) -> None:
        """Takes the page back: the grantor keeps its content, the grantee reads zeros."""
        entry = self.grants.get(reference)
        if entry is None or entry.ended:
            raise from_errno(errno.EINVAL, f"revoke({reference}): not granted")
        entry.revoked = entry.ended = True
        kept = Page(entry.page)
        for mapping, index in entry.local:
            mapping.pages[index] = kept
        left = Page(PAGE_BYTES)
        for mapping, index in entry.remote:
            mapping.pages[index] = left
        self.settle(entry)


class GrantMachine:
    """The domains by number, and what is between them."""

    def __init__(self) -> None:
        self.domains: dict[int, ModelDomain] = {}
        self.channels = EventChannels(self.domains.__contains__)

    def add_domain(self, domid: int, *, control: bool | None = None) -> ModelDomain:
        """Domain 0 has control unless told otherwise. EEXIST: the number is taken."""
        if domid in self.domains or not 0 <= domid < DOMID_FIRST_RESERVED:
            raise from_errno(errno.EEXIST, f"domain {domid}: taken, or not a domain's number")
        domain = ModelDomain(self, domid, control=domid == 0 if control is None else control)
        self.domains[domid] = domain
        return domain

    def crash(self, domain: ModelDomain) -> None:
        """Ends its process: mappings and files go, so its grants end and its ports close. Others keep what they map."""
        del self.domains[domain.domid]
        domain.memory.unmap_all()
        for file in tuple(domain.files):
            file.close()
        self.channels.domain_gone(domain.domid)

    def look_up(self, grantee: ModelDomain, domid: int, reference: int, *, writable: bool) -> Grant:
        """The entry that `grantee` may map or copy. BadGrantError otherwise."""
        grantor = self.domains.get(domid)
        if grantor is None:
            raise BadGrantError(GrantStatus.BAD_DOMAIN, f"there is no domain {domid}")
        entry = grantor.grants.get(reference)
        if entry is None or entry.ended:
            raise BadGrantError(GrantStatus.BAD_REFERENCE, f"domain {domid} grants nothing under {reference}")
        if entry.grantee != grantee.domid:
            raise BadGrantError(GrantStatus.PERMISSION_DENIED, f"{reference} of domain {domid} is for another domain")
        if writable and not entry.writable:
            raise BadGrantError(GrantStatus.PERMISSION_DENIED, f"{reference} of domain {domid} is read-only")
        return entry

    def map(
        self, grantee: ModelDomain, references: list[tuple[int, int]], *, writable: bool, on_unmap: Callable[[], None]
    ) -> ModelMapping:
        """Maps all of `references` (domid, reference) side by side, or none. BadGrantError: the first that cannot be.

        `on_unmap` is called when the mapping is gone, before the grants are given back.
        """
        entries = [self._checked(grantee, index, *each, writable) for index, each in enumerate(references)]
        mapping = grantee.memory.map([each.page for each in entries], writable=writable, inherit=False)

        def give_back() -> None:
            on_unmap()
            for index, entry in enumerate(entries):
                entry.remote.remove((mapping, index))
                entry.grantor.settle(entry)

        mapping.on_unmap = give_back
        for index, entry in enumerate(entries):
            entry.remote.append((mapping, index))
        return mapping

    def _checked(self, grantee: ModelDomain, index: int, domid: int, reference: int, writable: bool) -> Grant:
        try:
            return self.look_up(grantee, domid, reference, writable=writable)
        except BadGrantError as error:
            error.index = index
            raise

    def notify(self, domain: ModelDomain, what: Notification, page: Page) -> None:
        """Carries out an unmap notification of `domain`."""
        if what.action & NOTIFY_CLEAR_BYTE:
            page[what.byte] = 0
        if what.action & NOTIFY_SEND_EVENT:
            self.channels.send(domain.domid, what.port)
