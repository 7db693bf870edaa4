"""Who may be which domain, with which quotas, and who may grant to whom."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

from usermm.hypervisor import policy_file
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.policy_file import (
    LAST_DOMID,
    NAME,
    NAME_RULE,
    FixedDomain,
    PolicyError,
    Rule,
    Rules,
    given_name,
    is_of_another,
)
from usermm.hypervisor.quotas import Quotas

__all__ = ["Admission", "Grantor", "Policy", "PolicyError", "PolicyRefused"]

_CONTROL_DOMID = 0


class PolicyRefused(Refused):
    """No domain for this connection: EACCES (not allowed), EBUSY (taken), ENOSPC (too many), EINVAL (no such domid)."""


class Admission(NamedTuple):
    """What a connection becomes."""

    domid: int
    name: str
    control: bool
    quotas: Quotas


class Grantor(Protocol):
    """What of a domain decides to whom it may grant."""

    @property
    def domid(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...


class Policy:
    """Decides by `Rules`. Root, and the user `own_uid` that the hypervisor runs as, are trusted: the rules do not keep
    them out, and they may ask for any domid."""

    def __init__(self, rules: Rules, *, own_uid: int | None = None) -> None:
        self._rules = rules
        self._trusted = {0, os.geteuid() if own_uid is None else own_uid}
        self._by_name = {domain.name: domain for domain in rules.domains.values() if domain.name is not None}
        asked_for = {domid for rule in rules.rules for domid in rule.domids}
        self._automatic = [
            domid for domid in range(1, LAST_DOMID + 1) if domid not in rules.domains and domid not in asked_for
        ]
        self._last_automatic = 0

    @classmethod
    def default(cls) -> Policy:
        """Everybody may connect and grant to everybody, with Xen's quotas; domids are given, not asked for."""
        return cls(Rules())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, after: Policy | None = None) -> Policy:
        """Reads a file. `after` is the policy that this one follows: domids go on being handed out where it was.

        Raises `PolicyError`, and the policy before stays as it is.
        """
        policy = cls(policy_file.read(path))
        if not policy._automatic:
            raise PolicyError(f"policy({os.fsdecode(path)}): its domids leave none to hand out: list fewer of them")
        if after is not None:
            policy._last_automatic = after._last_automatic
        return policy

    def admit(  # noqa: PLR0917 - the server's one call
        self,
        uid: int,
        gid: int,
        wanted_domid: int | None,
        wanted_name: str | None,
        in_use: Callable[[int], bool],
        domains_of_uid: int,
        *,
        name_in_use: Callable[[str], bool] = lambda _: False,
    ) -> Admission:
        """Which domain a connection of this user becomes; `domains_of_uid` are those that it has already.

        A ``[[domain]]`` of the file is given to its user who asks for its number, for its name, or for nothing.
        Raises `PolicyRefused`.
        """
        wanted_name = wanted_name or None  # an empty one is none
        call = f"connect({_described(wanted_domid, wanted_name)})"
        rule = self._rule(uid, gid)
        trusted = uid in self._trusted
        fixed = self._fixed(call, uid, wanted_domid, wanted_name, in_use)
        if fixed is None and not (rule.allow or trusted):
            if any(domain.uid == uid for domain in self._rules.domains.values()):
                text = f"{call}: every domid that the policy has for user {uid} is connected already: close one"
                raise PolicyRefused(errno.EBUSY, text)
            raise PolicyRefused(errno.EACCES, f"{call}: the policy does not admit user {uid}: add a [[rule]] for it")
        domid = fixed.domid if fixed is not None else wanted_domid
        if domid is not None:
            if fixed is None:
                self._check_wanted(call, domid, rule, uid)
            if in_use(domid):
                raise PolicyRefused(errno.EBUSY, f"{call}: domid {domid} is connected already: ask for another")
        if fixed is None and domains_of_uid >= rule.domains_per_user:
            has = f"user {uid} has {domains_of_uid} domains of domains_per_user {rule.domains_per_user}"
            raise PolicyRefused(errno.ENOSPC, f"{call}: {has}: close some")
        name = fixed.name if fixed is not None and fixed.name is not None else wanted_name
        if domid is None:
            _check_name(call, name, None, name_in_use)
            domid = self._next_automatic(call, in_use)
        name = _check_name(call, name, domid, name_in_use) or given_name(domid)
        if fixed is None:
            return Admission(domid, name, domid == _CONTROL_DOMID, rule.quotas)
        return Admission(domid, name, fixed.control or domid == _CONTROL_DOMID, fixed.quotas)

    def may_grant(self, grantor: Grantor, grantee: int) -> bool:
        """Whether `grantor` may share pages with the domain `grantee`. To itself it always may."""
        fixed = self._rules.domains.get(grantor.domid)
        allowed = (self._rule(grantor.uid, grantor.gid) if fixed is None else fixed).may_grant_to
        return allowed is None or grantee in allowed or grantee == grantor.domid

    def may_read_status(self, uid: int, gid: int) -> bool:
        """Whether the user may see who shares what with whom: root, the hypervisor's own, and whom the file names."""
        if uid in self._trusted or self._rule(uid, gid).status:
            return True
        return any(domain.status and domain.uid == uid for domain in self._rules.domains.values())

    def _rule(self, uid: int, gid: int) -> Rule:
        """The first one about this user."""
        return next((rule for rule in self._rules.rules if rule.is_about(uid, gid)), self._rules.last)

    def _fixed(
        self, call: str, uid: int, wanted_domid: int | None, wanted_name: str | None, in_use: Callable[[int], bool]
    ) -> FixedDomain | None:
        """The ``[[domain]]`` that is meant, if one is."""
        by_name = self._by_name.get(wanted_name) if wanted_name is not None else None
        if wanted_domid is not None:
            domain = self._rules.domains.get(wanted_domid)
            if by_name is not None and by_name is not domain:
                raise PolicyRefused(errno.EACCES, f"{call}: the policy has that name for domid {by_name.domid}")
            if domain is not None and wanted_name is not None and domain.name not in (None, wanted_name):
                raise PolicyRefused(errno.EACCES, f"{call}: the policy names it {domain.name}: ask for that")
        elif wanted_name is not None:
            domain = by_name
        else:
            own = (domain for domain in self._rules.domains.values() if domain.uid == uid)
            return next((domain for domain in own if not in_use(domain.domid)), None)
        if domain is not None and uid != domain.uid and uid not in self._trusted:
            raise PolicyRefused(errno.EACCES, f"{call}: the policy has it for user {domain.uid}, this is user {uid}")
        return domain

    def _check_wanted(self, call: str, domid: int, rule: Rule, uid: int) -> None:
        if not 0 <= domid <= LAST_DOMID:
            raise PolicyRefused(errno.EINVAL, f"{call}: domids are 0 to {LAST_DOMID}")
        if uid in self._trusted or (domid in rule.domids and domid != _CONTROL_DOMID):
            return
        reason = f"user {uid} may not ask for it: ask for none, or let a [[rule]] of the policy have it in domids"
        raise PolicyRefused(errno.EACCES, f"{call}: {reason}")

    def _next_automatic(self, call: str, in_use: Callable[[int], bool]) -> int:
        """The next one that is free after the last one given, so that a number comes back as late as it can."""
        start = bisect.bisect_right(self._automatic, self._last_automatic)
        for step in range(len(self._automatic)):
            domid = self._automatic[(start + step) % len(self._automatic)]
            if not in_use(domid):
                self._last_automatic = domid
                return domid
        raise PolicyRefused(errno.ENOSPC, f"{call}: every domid is in use: close some domain")


def _check_name(call: str, name: str | None, domid: int | None, in_use: Callable[[str], bool]) -> str | None:
    """A name can be a key of the store, is nobody else's, and does not look like one that others are given."""
    if name is None:
        return None
    if not NAME.fullmatch(name) or (domid is not None and is_of_another(name, domid)):
        raise PolicyRefused(errno.EINVAL, f"{call}: a name is {NAME_RULE}, and not that of another number")
    if in_use(name):
        raise PolicyRefused(errno.EBUSY, f"{call}: another domain has that name: ask for another, or for none")
    return name


def _described(domid: int | None, name: str | None) -> str:
    parts = [f"domid {domid}"] if domid is not None else []
    parts += [f"name {name!r}"] if name is not None else []
    return ", ".join(parts) or "any domid"
