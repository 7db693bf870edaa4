"""The file of a policy: TOML, read into plain rules. Everything in it is checked; one line says what is wrong."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from usermm.errors import ArgumentError
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED
from usermm.hypervisor import quotas
from usermm.hypervisor.quotas import Quotas

LAST_DOMID: Final = DOMID_FIRST_RESERVED - 1
DOMAINS_PER_USER: Final = 64
NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")
NAME_RULE: Final = "1 to 63 letters, digits, - and _"

_LONGEST_BYTES = 1 << 20
_DOMAIN_KEYS = ("domid", "user", "name", "control", "may_grant_to", "status")
_RULE_KEYS = ("user", "group", "allow", "domids", "domains_per_user", "may_grant_to", "status")
_TOP_KEYS = ("allow", "domains_per_user", "defaults", "domain", "rule")


def given_name(domid: int) -> str:
    """What a domain is called that asks for no name."""
    return f"domain-{domid}"


def is_of_another(name: str, domid: int) -> bool:
    """Whether a domain with another number would be given this name."""
    return re.fullmatch(r"domain-\d+", name) is not None and name != given_name(domid)


class PolicyError(ArgumentError):
    """The policy's file cannot be read or says what it must not: file, key, and what is allowed there."""


@dataclass(frozen=True, slots=True)
class FixedDomain:
    """A ``[[domain]]``: a number that belongs to one user. `may_grant_to` None: to everybody."""

    domid: int
    uid: int
    name: str | None
    control: bool
    status: bool
    may_grant_to: frozenset[int] | None
    quotas: Quotas


@dataclass(frozen=True, slots=True)
class Rule:
    """A ``[[rule]]``: what a user, or the members of a group, may do. Both None: everybody."""

    uids: frozenset[int] | None = None
    gid: int | None = None
    allow: bool = True
    domids: frozenset[int] = frozenset()
    domains_per_user: int = DOMAINS_PER_USER
    may_grant_to: frozenset[int] | None = None
    status: bool = False
    quotas: Quotas = field(default_factory=Quotas)

    def is_about(self, uid: int, gid: int) -> bool:
        """Whether a process with this user and this primary group falls under it."""
        return self.uids is None or uid in self.uids or gid == self.gid


@dataclass(frozen=True, slots=True)
class Rules:
    """A whole file. `last` is for whom no other rule is about."""

    domains: Mapping[int, FixedDomain] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    last: Rule = field(default_factory=Rule)


def read(path: str | os.PathLike[str]) -> Rules:
    """Raises `PolicyError`."""
    name = os.fsdecode(path)
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IWOTH:
                raise PolicyError(f"policy({name}): everybody may write it: chmod o-w {name}")
            content = file.read(_LONGEST_BYTES + 1)
        if len(content) > _LONGEST_BYTES:
            raise PolicyError(f"policy({name}): longer than {_LONGEST_BYTES} bytes: that is no policy")
        return _File(name, tomllib.loads(content.decode())).rules()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name, no UTF-8, no TOML
        if isinstance(error, PolicyError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(f"policy({name}): {reason}") from None


class _File:
    """Takes values out of the tables; every refusal names the file, the table and the key."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self._name = name
        self._data = data
        self._names: dict[str, int] = {}

    def rules(self) -> Rules:
        data = self._data
        self._known("", data, _TOP_KEYS)
        defaults = self._quotas("[defaults]", self._table("defaults"), Quotas(), ())
        last = Rule(
            allow=self._flag("", data, "allow", True),
            domains_per_user=self._number("", data, "domains_per_user", DOMAINS_PER_USER, (0, LAST_DOMID)),
            quotas=defaults,
        )
        entries = self._tables("domain")
        for place, entry in entries:
            self._note_name(place, entry)
        domains: dict[int, FixedDomain] = {}
        for place, entry in entries:
            domain = self._domain(place, entry, defaults)
            if domain.domid in domains:
                raise self._wrong(place, "domid", domain.domid, "a number that no other [[domain]] has")
            domains[domain.domid] = domain
        return Rules(domains, tuple(self._rule(place, entry, last) for place, entry in self._tables("rule")), last)

    def _domain(self, place: str, entry: dict[str, Any], defaults: Quotas) -> FixedDomain:
        for key in ("domid", "user"):
            if key not in entry:
                raise PolicyError(f"policy({self._name}): {place} has no {key}: it belongs to one user, by one number")
        return FixedDomain(
            domid=self._number(place, entry, "domid", 0, (0, LAST_DOMID)),
            uid=self._user(place, entry["user"]),
            name=entry.get("name"),
            control=self._flag(place, entry, "control", False),
            status=self._flag(place, entry, "status", False),
            may_grant_to=self._domids(place, entry, "may_grant_to"),
            quotas=self._quotas(place, entry, defaults, _DOMAIN_KEYS),
        )

    def _rule(self, place: str, entry: dict[str, Any], last: Rule) -> Rule:
        if ("user" in entry) == ("group" in entry):
            raise PolicyError(f"policy({self._name}): {place} has to have either user or group")
        if "user" in entry:
            uids, gid = {self._user(place, entry["user"])}, None
        else:
            gid, uids = self._group(place, entry["group"])
        return Rule(
            uids=frozenset(uids),
            gid=gid,
            allow=self._flag(place, entry, "allow", True),
            domids=self._domids(place, entry, "domids") or frozenset(),
            domains_per_user=self._number(place, entry, "domains_per_user", last.domains_per_user, (0, LAST_DOMID)),
            may_grant_to=self._domids(place, entry, "may_grant_to"),
            status=self._flag(place, entry, "status", False),
            quotas=self._quotas(place, entry, last.quotas, _RULE_KEYS),
        )

    def _note_name(self, place: str, entry: dict[str, Any]) -> None:
        name = entry.get("name")
        if name is None:
            return
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise self._wrong(place, "name", name, NAME_RULE)
        if name in self._names:
            raise self._wrong(place, "name", name, "a name that no other [[domain]] has")
        domid = entry.get("domid")
        number = domid if isinstance(domid, int) else 0  # what is no number is refused with its entry
        if is_of_another(name, number):
            raise self._wrong(place, "name", name, f"one that is not given to others, such as {given_name(number)}")
        self._names[name] = number

    def _user(self, place: str, value: object) -> int:
        return self._identity(place, "user", value, lambda name: pwd.getpwnam(name).pw_uid)

    def _group(self, place: str, value: object) -> tuple[int, set[int]]:
        """Its number, and the users that are members of it beside those whose primary group it is."""
        gid = self._identity(place, "group", value, lambda name: grp.getgrnam(name).gr_gid)
        uids = set()
        try:
            members = grp.getgrgid(gid).gr_mem
        except KeyError:
            members = []  # a bare number: whoever has it as primary group
        for member in members:
            try:
                uids.add(pwd.getpwnam(member).pw_uid)
            except KeyError:
                continue  # /etc/group may list users that are gone
        return gid, uids

    def _identity(self, place: str, key: str, value: object, look_up: Callable[[str], int]) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 - 1:
            return value
        if not isinstance(value, str):
            raise self._wrong(place, key, value, f"the name or the number of a {key}")
        try:
            return look_up(value)
        except (KeyError, ValueError):
            raise self._wrong(place, key, value, f"a {key} of this system, by name or number") from None

    def _domids(self, place: str, entry: dict[str, Any], key: str) -> frozenset[int] | None:
        if key not in entry:
            return None
        allowed = f'a list of domids (0 to {LAST_DOMID}), ranges such as "100-199", and names of [[domain]]'
        if not isinstance(entry[key], list):
            raise self._wrong(place, key, entry[key], allowed)
        found: set[int] = set()
        for item in entry[key]:
            bounds = re.fullmatch(r"(\d{1,5})-(\d{1,5})", item) if isinstance(item, str) else None
            if isinstance(item, str) and item in self._names:
                first = last = self._names[item]
            elif bounds:
                first, last = int(bounds[1]), int(bounds[2])
            elif isinstance(item, int) and not isinstance(item, bool):
                first = last = item
            elif isinstance(item, str) and NAME.fullmatch(item):
                raise PolicyError(f"policy({self._name}): {place} {key} has {item!r}: no [[domain]] has this name")
            else:
                raise self._wrong(place, key, item, allowed)
            if not 0 <= first <= last <= LAST_DOMID:
                raise self._wrong(place, key, item, allowed)
            found.update(range(first, last + 1))
        return frozenset(found)

    def _quotas(self, place: str, entry: dict[str, Any], defaults: Quotas, others: tuple[str, ...]) -> Quotas:
        self._known(place, entry, (*others, *quotas.NAMES))
        try:
            return defaults.replace({name: value for name, value in entry.items() if name in quotas.NAMES})
        except ArgumentError as error:
            raise PolicyError(f"policy({self._name}): {place} {error}") from None

    def _flag(self, place: str, entry: dict[str, Any], key: str, default: bool) -> bool:
        value = entry.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(place, key, value, "true or false")
        return value

    def _number(
        self, place: str, entry: dict[str, Any], key: str, default: int, allowed: tuple[int, int]
    ) -> int:
        value = entry.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not allowed[0] <= value <= allowed[1]:
            raise self._wrong(place, key, value, f"a whole number from {allowed[0]} to {allowed[1]}")
        return value

    def _table(self, key: str) -> dict[str, Any]:
        value = self._data.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong("", key, value, f"a table, [{key}]")
        return value

    def _tables(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        value = self._data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._wrong("", key, value, f"tables, each headed [[{key}]]")
        return [(f"[[{key}]] {number}", entry) for number, entry in enumerate(value, 1)]

    def _known(self, place: str, entry: dict[str, Any], keys: tuple[str, ...]) -> None:
        for key in entry:
            if key not in keys:
                where = f"{place} " if place else ""
                raise PolicyError(f"policy({self._name}): {where}{key}: no such key: give {', '.join(keys)}")

    def _wrong(self, place: str, key: str, value: object, allowed: str) -> PolicyError:
        where = f"{place} " if place else ""
        return PolicyError(f"policy({self._name}): {where}{key} = {value!r}: give {allowed}")
